"""A base that stays in the blocks of its GGUF file: its numbers, runs on it, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.arithmetic.test_merge import write_base
from tests.exports.test_gguf import read
from tests.support.train_case import lose_the_end, losses, train_in_child, write_recipe
from tunekit.arithmetic.merge import merge
from tunekit.errors import InputError, ModelError
from tunekit.export import export_verb
from tunekit.exports.format import Options
from tunekit.model.load import load_model, make_meta_model
from tunekit.model.quantized import blocks
from tunekit.model.quantized.weights import packed_layers, stored_bytes, weight_of
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.supported import refuse_unsupported
from tunekit.targets.target import find_target

CPU = torch.device("cpu")
KINDS = [kind.name.lower() for kind in gguf.GGMLQuantizationType if blocks.block_size(kind.name.lower())]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, installed: None) -> Path:
    """A llama in Q4_K and Q6_K; its rows of 192 numbers are in Q5_0."""
    folder = tmp_path_factory.mktemp("file")
    shape = {"hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 4}
    base = write_base(folder / "base", "llama", **shape)
    export_verb(str(base), "gguf", str(folder / "base.gguf"), options=Options(type="Q4_K_M"), certify=False)
    return folder / "base.gguf"


def section(file: Path, quantization: str = "kept", dtype: str = "float32") -> ModelSection:
    return ModelSection(name_or_path=str(file), quantization=quantization, dtype=dtype)


@pytest.fixture
def recipe(stories: Path, installed: None, tmp_path: Path) -> Path:
    """A run on a real model in Q5_0 and Q8_0, whose tokenizer is in the file too."""
    file = tmp_path / "stories.gguf"
    export_verb(str(stories), "gguf", str(file), options=Options(type="Q4_K_M"), certify=False)
    model = {"name_or_path": str(file), "quantization": "kept", "dtype": "float32"}
    training = {"max_steps": 20, "epochs": None, "learning_rate": 1e-2, "save_steps": 8}
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "Once upon a time", "completion": f" there were {number} cats."} for number in range(20)]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    data = {"train": [{"path": str(rows)}], "max_length": 64}
    adapter = {"method": "lora", "r": 4}
    return write_recipe(tmp_path / "recipe", file, model=model, data=data, adapter=adapter, training=training)


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_have_the_numbers_of_gguf(kind: str) -> None:
    numbers, size = blocks.block_size(kind) or (0, 0)
    packed = np.random.default_rng(0).integers(0, 256, (33, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()]).astype(np.float32)
    unpacked = blocks.unpack(torch.from_numpy(packed), (33, 3 * numbers), kind, torch.float32).numpy()
    finite = np.isfinite(expected)
    assert finite.mean() > 0.8
    np.testing.assert_array_equal(unpacked[finite], expected[finite])


def test_all_common_types_can_be_kept() -> None:
    assert {"q4_0", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq2_xxs"} <= {*KINDS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_keep_the_bytes_of_the_file(file: Path, dtype: str) -> None:
    kept, dense = (
        load_model(section(file, dtype=dtype), device=CPU),
        load_model(section(file, "none", dtype), device=CPU),
    )
    layers = packed_layers(kept.net)
    assert len(layers) == 4 * 7
    assert {layer.quantization for layer in layers.values()} == {"q4_k", "q6_k", "q5_0", "q8_0"}
    assert read_bytes(file) >= {bytes(row) for row in _rows(layers["model.layers.1.mlp.up_proj"])}
    for name, layer in layers.items():
        weight = weight_of(dense.net.get_submodule(name))
        assert weight is not None
        assert torch.equal(layer.dequantize(kept.dtype), weight.read(kept.dtype)), name
    assert stored_bytes(kept.net) < 0.7 * stored_bytes(dense.net)
    planned = make_meta_model(section(file, dtype=dtype), device=CPU)
    assert stored_bytes(planned.net) == stored_bytes(kept.net)


def read_bytes(file: Path) -> set[bytes]:
    """The rows of a matrix in the file."""
    tensor = next(each for each in gguf.GGUFReader(str(file)).tensors if each.name == "blk.1.ffn_up.weight")
    return {bytes(row) for row in tensor.data}


def _rows(layer: torch.nn.Module) -> list[np.ndarray]:
    return list(layer.get_buffer("packed").numpy())


@pytest.mark.drawn
def test_a_run_is_the_run_on_the_unpacked_base(recipe: Path, tmp_path: Path) -> None:
    kept, dense = tmp_path / "kept", tmp_path / "dense"
    assert train_in_child(recipe, kept).code == 0
    assert train_in_child(recipe, dense, "model.quantization=none").code == 0
    assert losses(kept) == pytest.approx(losses(dense), rel=1e-5)
    ours, theirs = trained(kept), trained(dense)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4
    lose_the_end(kept)
    assert train_in_child(recipe, kept, resume=True).code == 0
    assert all(torch.equal(tensor, ours[name]) for name, tensor in trained(kept).items())


@pytest.mark.drawn
def test_an_adapter_is_merged_and_exported_for_the_same_file(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ended = train_in_child(recipe, run, "training.max_steps=3")
    assert ended.code == 0
    assert "weights in the quantized blocks of the file;" in " ".join(ended.output.split())
    target = find_target(str(run), None, [])
    merge(target, tmp_path / "merged")
    merge(find_target(str(run), None, ["model.quantization=none"]), tmp_path / "dense")
    merged, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "dense"))
    assert merged.keys() == dense.keys()
    assert all(torch.equal(merged[name], dense[name]) for name in dense)
    with pytest.raises(InputError, match="can only write nf4 and fp4 weights, but this base is kept"):
        merge(target, tmp_path / "packed", onto="quantized")
    export_verb(str(run), "gguf", str(tmp_path / "adapter.gguf"), certify=False)
    printed = capsys.readouterr()
    assert f"-m{tmp_path / 'stories.gguf'}--lora" in "".join((printed.out + printed.err).split())
    tensors, facts = read(tmp_path / "adapter.gguf")
    assert facts["general.type"] == "adapter"
    b = trained(run)["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    np.testing.assert_allclose(tensors["blk.1.ffn_up.weight.lora_b"][0], 8 * b, rtol=1e-5)  # alpha / r is folded into B


def test_only_a_gguf_file_has_blocks(file: Path, tmp_path: Path) -> None:
    folder = file.parent / "base"
    with pytest.raises(ModelError, match=r"kept reads the blocks of a \.gguf file"):
        load_model(section(folder), device=CPU)
    recipe = write_recipe(tmp_path, folder, model={"name_or_path": str(folder), "quantization": "kept"})
    problems = refuse_unsupported(load_recipe(recipe).recipe)
    assert [(problem.key, problem.how) for problem in problems] == [
        ("model.quantization", "name a .gguf file, or write nf4")
    ]


@pytest.mark.drawn
def test_a_streamed_run_leaves_the_same_adapter(recipe: Path, tmp_path: Path) -> None:
    runs = {}
    for streaming in ("off", "host", "disk"):
        run = tmp_path / streaming
        assert train_in_child(recipe, run, f"memory.streaming={streaming}", "training.max_steps=3").code == 0
        assert json.loads((run / "plan.json").read_text("utf-8"))["choice"]["streaming"] == streaming
        runs[streaming] = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert runs["off"] == runs["host"] == runs["disk"]
