"""GGUF files of composite models: the language model under llama.cpp's names, as an adapter and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.arithmetic.test_composite_models import load, save_adapter, tensors_of
from tests.exports.test_gguf import read
from tests.support import composite_case
from tests.support.composite_case import SHAPES, write_composite
from tunekit.arithmetic.merge import merge
from tunekit.errors import ModelError
from tunekit.exports import gguf as format
from tunekit.exports import vllm
from tunekit.exports.format import Evidence, Options
from tunekit.exports.llama_cpp.converter import imported, knows, text_architecture
from tunekit.exports.programs.program import find_program
from tunekit.exports.questions import make_questions
from tunekit.targets.exportable import Exportable, make_exportable
from tunekit.targets.target import find_target

pytestmark = pytest.mark.usefixtures("installed")
EVIDENCE = Evidence(lambda count, tokens: ([[5, 9, 17]], "rows"), None, "model")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
FOUR = {"num_hidden_layers": 4}
# Settings that llama.cpp fixes for a type, and the class that the hub's text_config names. llama.cpp 0.11739 computes
# the norms of qwen2_5_vl with eps = 0.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"rope_parameters": MROPE, "rms_norm_eps": 1e-12, "pad_token_id": None},
    "qwen3_vl": {"rope_parameters": {**MROPE, "mrope_interleaved": True}},
    "qwen3_5": {**FOUR, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    | {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    | {
        "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        | {"partial_rotary_factor": 0.25}
    },
    "gemma3": {"query_pre_attn_scalar": 32},
    "gemma4": {"global_head_dim": 64, "final_logit_softcapping": 30.0},
    "llama4": {**FOUR, "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8192},
    "llava": {"architectures": ["LlamaForCausalLM"]},
    "smolvlm": {"architectures": ["VLlama3ForCausalLM"]},
}
NO_ADAPTER = {"gemma4": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")}
GELU = ("gemma3", "gemma4")  # llama.cpp rounds it to 16 bits


def write_case(model_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Exportable:
    """An adapter of a composite model whose settings llama.cpp computes with."""
    for name, value in {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}.items():
        monkeypatch.setitem(composite_case.TEXT, name, value)
    text, vision, _ = SHAPES[model_type]
    for name, value in SETTINGS.get(model_type, {}).items():
        monkeypatch.setitem(text, name, value)
    if "out_hidden_size" in vision:
        monkeypatch.setitem(vision, "out_hidden_size", 128)
    base = write_composite(model_type, folder / "base")
    if model_type == "qwen3_5":
        _leave_out_mtp(base)
    save_adapter(load(base), folder / "adapter", **settings)
    return make_exportable(find_target(str(folder / "adapter"), None, []))


def _leave_out_mtp(base: Path) -> None:
    """The test's head for several tokens is incomplete, which llama.cpp refuses."""
    kept = {name: tensor for name, tensor in tensors_of(base).items() if not name.startswith("mtp.")}
    for file in base.glob("model*"):
        file.unlink()
    save_file(kept, base / "model.safetensors", {"format": "pt"})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", SHAPES)
def test_the_file_has_the_language_model_alone(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exportable = write_case(model_type, tmp_path, monkeypatch, target_modules=NO_ADAPTER.get(model_type, "all-linear"))
    assert format.problems(exportable, Options(type="F32")) == []
    written = format.write(exportable, tmp_path / "model.gguf", EVIDENCE, Options(type="F32"))
    assert "the base's own mmproj file stays valid for llama-server (--mmproj FILE)" in written.notes[0]
    tensors, facts = read(tmp_path / "model.gguf")
    layers = composite_case.TEXT | SETTINGS.get(model_type, {})
    assert facts[f"{facts['general.architecture']}.block_count"] == layers["num_hidden_layers"]
    assert not [name for name in tensors if name.startswith(("v.", "mm."))]
    merge(exportable.target, tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    for name in [name for name in merged if name.endswith("layers.1.mlp.down_proj.weight") and "visi" not in name][:1]:
        np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"][0], merged[name].numpy())
    assert format.problems(exportable, Options()) == []
    adapter = format.write(exportable, tmp_path / "adapter.gguf", EVIDENCE, Options())
    assert "without the parts that read images or audio" in adapter.notes[0]
    pairs, _ = read(tmp_path / "adapter.gguf")
    assert {name.rpartition(".")[0] for name in pairs} <= set(tensors)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(pairs) == len(saved)


def test_files_of_the_processor_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the language model alone. A merged folder needs them."""
    exportable = write_case("llava", tmp_path, monkeypatch)
    for name in composite_case.PROCESSOR_FILES:
        (tmp_path / "base" / name).unlink()
    format.write(exportable, tmp_path / "model.gguf", EVIDENCE, Options(type="F32"))
    assert "blk.0.ffn_down.weight" in read(tmp_path / "model.gguf")[0]
    with pytest.raises(ModelError, match=r"base contains no processor files \(preprocessor_config.json\).*; copy them"):
        vllm.write(exportable, tmp_path / "merged", EVIDENCE, Options(merged=True))
    assert not (tmp_path / "merged").exists()


def test_what_llama_cpp_does_not_apply_or_know_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exportable = write_case("gemma4", tmp_path / "gemma4", monkeypatch)
    (problem,) = format.problems(exportable, Options())
    assert "cannot hold the change of model.language_model.per_layer_model_projection" in problem.what
    assert format.problems(exportable, Options(type="F32")) == []
    monkeypatch.setitem(SETTINGS, "smolvlm", {})
    exportable = write_case("smolvlm", tmp_path / "smolvlm", monkeypatch)
    (problem,) = format.problems(exportable, Options())
    assert "does not know the architecture SmolVLMForConditionalGeneration" in problem.what


def test_types_whose_code_the_pinned_converter_can_import_are_known() -> None:
    """Its code for DeepSeek and Mistral 3 needs constants that its copy of gguf lacks."""
    with imported() as converter:
        names = ("Mistral3ForConditionalGeneration", "DeepseekV3ForCausalLM", "Qwen3_5ForConditionalGeneration")
        assert all(knows(converter, name) for name in names)
        unknown = ("PaliGemmaForConditionalGeneration", "MllamaForConditionalGeneration", "LagunaForCausalLM")
        assert not any(knows(converter, name) for name in unknown)
        config = {"architectures": ["SmolVLMForConditionalGeneration"]}
        assert text_architecture(converter, config) == "SmolVLMForConditionalGeneration"
        config |= {"text_config": {"architectures": ["VLlama3ForCausalLM"]}}
        assert text_architecture(converter, config) == "VLlama3ForCausalLM"
        assert text_architecture(converter, {}) == ""


@pytest.mark.slow
@pytest.mark.skipif(find_program("llama.cpp") is None, reason="llama.cpp is not installed: scripts/certify llama.cpp")
@pytest.mark.parametrize("model_type", SHAPES)
def test_llama_cpp_computes_what_torch_does(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exportable = write_case(model_type, tmp_path, monkeypatch, target_modules=NO_ADAPTER.get(model_type, "all-linear"))
    program, questions = find_program("llama.cpp"), make_questions(exportable, with_base=True)
    assert program is not None
    assert questions.base is not None
    assert max(float((a - b).abs().max()) for a, b in zip(questions.base, questions.expected, strict=True)) > 1
    for options in (Options(), Options(type="F32")):
        written = format.write(exportable, tmp_path / f"{options.type}.gguf", EVIDENCE, options)
        certificate = format.certify(written, exportable, program, lambda: questions, options)
        bound = 2e-2 if model_type in GELU else 5e-4
        assert {name: part.largest for name, part in certificate.parts.items() if part.largest > bound} == {}
        assert certificate.warning == ""
