"""A GGUF file that is read tensor by tensor has what transformers reads from it, also packed and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.arithmetic.test_merge import write_base
from tests.model.test_kept_base import assert_equal
from tunekit.export import export_verb
from tunekit.exports.format import Options
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.model.quantized.weights import packed_layers
from tunekit.model.storage import sidecar
from tunekit.recipe.model import ModelSection

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},  # rows of q and k are in another order in the file
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "num_hidden_layers": 6,
        "sliding_window": 64,
    },  # the file has its norms plus 1
    "phi3": {"num_key_value_heads": 4},
}
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {"mamba": {"intermediate_size": 512, "state_size": 8}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, installed: None) -> dict[str, Path]:
    """A Q4_K_M file of each kind; rows of 192 numbers are in Q5_0."""
    found = {}
    for kind, shape in {**SHAPES, **READ_BY_TRANSFORMERS}.items():
        folder = tmp_path_factory.mktemp(kind)
        base = write_base(folder / "base", kind, **{"hidden_size": 256, "intermediate_size": 192, **shape})
        export_verb(str(base), "gguf", str(folder / "base.gguf"), options=Options(type="Q4_K_M"), certify=False)
        found[kind] = folder / "base.gguf"
    return found


def section(file: Path, quantization: str, dtype: str) -> ModelSection:
    return ModelSection(name_or_path=str(file), quantization=quantization, dtype=dtype)


def by_transformers(section: ModelSection) -> LoadedModel:
    """The base as from_pretrained reads the file, and then packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunekit.model.load.open_net", lambda *_: None)
        return load_model(section, device=CPU)


def assert_unpacked_equal(dense: nn.Module, kept: nn.Module) -> None:
    """The blocks that a net keeps are the numbers of the dense net, and its other tensors are equal."""
    layers, tensors = packed_layers(kept), dense.state_dict()
    assert layers
    for name, layer in layers.items():
        weight = tensors.pop(f"{name}.weight")
        assert torch.equal(layer.dequantize(weight.dtype), weight), name
    others = kept.state_dict()
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("quantization", ["none", "kept", "nf4"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_file_has_the_numbers_that_transformers_reads(
    kind: str, quantization: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = section(files[kind], quantization, "bfloat16" if kind == "qwen3" else "float32")
    theirs = by_transformers(wanted if quantization != "kept" else section(files[kind], "none", wanted.dtype))
    monkeypatch.setattr("tunekit.model.load._read_weights", None)  # transformers is not asked
    ours = load_model(wanted, device=CPU)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sidecar, "MIN_BYTES", 0)
    streamed = load_model(wanted, device=CPU, streamed=True)
    assert streamed.mapped
    for loaded in (ours, streamed):
        if quantization == "kept":
            assert_unpacked_equal(theirs.net, loaded.net)
        else:
            assert_equal(theirs.net, loaded.net)
            assert (loaded.facts, loaded.notes) == (theirs.facts, theirs.notes)
        ours_settings, their_settings = loaded.generation_config, theirs.generation_config
        assert (ours_settings and ours_settings.to_dict()) == (their_settings and their_settings.to_dict())
    planned = make_meta_model(wanted, device=CPU)
    assert (planned.packed_while_read, planned.copied_while_read) == (quantization != "none", quantization == "none")


def test_other_files_are_read_by_transformers(files: dict[str, Path]) -> None:
    wanted = section(files["mamba"], "kept", "float32")  # its numbers are changed in the file
    assert not make_meta_model(wanted, device=CPU).packed_while_read
    assert_equal(by_transformers(wanted).net, load_model(wanted, device=CPU).net)


def test_a_changed_file_is_read_again(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sidecar, "MIN_BYTES", 0)
    nets = []
    for kind in ("llama", "qwen2"):
        file = tmp_path / "base.gguf"
        file.write_bytes(files[kind].read_bytes())
        wanted = section(file, "nf4", "float32")
        nets.append(load_model(wanted, device=CPU).net)
        assert_equal(by_transformers(wanted).net, nets[-1])
