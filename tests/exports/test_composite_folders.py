"""Exports of composite models for vLLM and mlx-lm: folders with the names that these programs read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.arithmetic.test_composite_models import IDS, load, save_adapter, served_logits, tensors_of
from tests.exports.test_gguf_composite import EVIDENCE, write_case
from tests.support.composite_case import SHAPES, write_composite
from tunekit.adapter import rename_verb
from tunekit.exports import mlx, vllm
from tunekit.exports.format import Options
from tunekit.exports.programs.program import find_program
from tunekit.exports.programs.vllm import answers
from tunekit.exports.questions import make_questions
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target

NO_VLLM = pytest.mark.skipif(find_program("vllm") is None, reason="vLLM is not installed: scripts/certify vllm")
NO_MLX = pytest.mark.skipif(find_program("mlx") is None, reason="MLX is not installed: scripts/certify mlx")
RUNS = ("qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "mistral3", "llava", "smolvlm")  # in vLLM on a CPU
MAPPED = """
import json, sys
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry
result = {}
for architecture, keys in json.loads(sys.argv[1]).items():
    served = ModelRegistry._try_load_model_cls(architecture)
    assert supports_lora(served)
    mapper = getattr(served, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    result[architecture] = [parse_fine_tuned_lora_name(key, mapper)[0] for key in keys]
print("RESULT" + json.dumps(result))
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", SHAPES)
def test_the_adapter_for_vllm_has_the_names_of_the_served_class(model_type: str, tmp_path: Path) -> None:
    base = load(write_composite(model_type, tmp_path / "base"))
    running_of = save_adapter(base, tmp_path / "adapter")
    running = base.family.scores(base.net, base.family.inputs_of(IDS))
    target = make_exportable(find_target(str(running_of), None, []))
    assert vllm.problems(target, Options()) == []
    written = vllm.write(target, tmp_path / "out", EVIDENCE, Options())
    assert written.what == "adapter"
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "adapter").keys()
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(net, str(tmp_path / "out")).eval()
    torch.testing.assert_close(served_logits(adapted.base_model.model, model_type), running, rtol=0, atol=1e-4)


def test_a_class_whose_adapters_vllm_does_not_take_is_merged(tmp_path: Path) -> None:
    save_adapter(load(write_composite("llava", tmp_path / "base")), tmp_path / "adapter")
    target = make_exportable(find_target(str(tmp_path / "adapter"), None, []))
    target.config["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
    written = vllm.write(target, tmp_path / "out", EVIDENCE, Options())
    assert written.what == "merged"
    assert "vLLM supports no adapters for LlavaOnevisionForConditionalGeneration" in written.notes[0]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma4"])
def test_the_folder_for_mlx_is_merged_with_the_settings_that_it_reads(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_case(model_type, tmp_path, monkeypatch)
    assert mlx.problems(target, Options()) == []
    written = mlx.write(target, tmp_path / "out", EVIDENCE, Options())
    assert written.what == "merged"
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "base").keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    text = config["text_config"]
    assert config["vocab_size"] == text["vocab_size"]
    has_head = any(name.endswith("lm_head.weight") for name in tensors_of(tmp_path / "out"))
    assert config["tie_word_embeddings"] == text["tie_word_embeddings"] == (not has_head)
    assert model_type != "gemma4" or text["global_head_dim"] == 64
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(expected, str(tmp_path / "adapter")).eval()
    expected_logits = served_logits(adapted.base_model.model, model_type)
    torch.testing.assert_close(served_logits(net, model_type), expected_logits, rtol=0, atol=1e-4)


def test_a_type_that_mlx_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(load(write_composite("smolvlm", tmp_path / "base")), tmp_path / "adapter")
    target = make_exportable(find_target(str(tmp_path / "adapter"), None, []))
    (problem,) = mlx.problems(target, Options())
    assert "does not know the model type smolvlm" in problem.what


def compared(format: Any, target: Any, folder: Path, options: Options) -> dict[str, float]:
    """The largest differences of the program's log-probabilities from torch's, on two short rows."""
    program = find_program(format.PROGRAM)
    assert program is not None
    questions = make_questions(target, with_base=True, past_window=False).cut(12)
    written = format.write(target, folder, EVIDENCE, options)
    certificate = format.certify(written, target, program, lambda: questions, options)
    return {name: part.largest for name, part in certificate.parts.items()}


@pytest.mark.slow
@NO_MLX
@pytest.mark.parametrize("model_type", sorted({*SHAPES} - {"smolvlm"}))
def test_mlx_computes_what_torch_computes(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_case(model_type, tmp_path, monkeypatch)
    bound = 5e-3 if model_type.startswith("gemma") else 5e-4  # its GELU is an approximation
    assert compared(mlx, target, tmp_path / "out", Options())["merged"] < bound


@pytest.mark.slow
@NO_VLLM
@pytest.mark.parametrize("model_type", RUNS)
def test_vllm_computes_what_torch_computes(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute each: vLLM compiles its kernels."""
    target = write_case(model_type, tmp_path, monkeypatch)
    differences = compared(vllm, target, tmp_path / "out", Options())
    assert differences.keys() == {"base", "base + adapter"}
    assert max(differences.values()) < 1e-4
    assert compared(vllm, target, tmp_path / "merged", Options(merged=True))["merged"] < 1e-4


@pytest.mark.slow
@NO_VLLM
def test_vllm_ignores_an_adapter_with_the_names_of_the_text_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an error: this is why tunekit never writes these names."""
    write_case("gemma3", tmp_path, monkeypatch, target_modules=("o_proj", "down_proj"))
    rename_verb(str(tmp_path / "adapter"), "text", None, str(tmp_path / "text"))
    program = find_program("vllm")
    assert program is not None
    rows = [[5, 9, 17, 33, 90, 40]]
    base, adapted, text = (
        answers(program, tmp_path / "base", rows, adapter, 4)[0].following
        for adapter in (None, tmp_path / "adapter", tmp_path / "text")
    )
    assert np.abs(adapted - base).max() > 1
    np.testing.assert_array_equal(text, base)


@pytest.mark.slow
@NO_VLLM
def test_vllm_maps_all_keys_to_its_modules(tmp_path: Path) -> None:
    """Also of types that it does not run on a CPU: Qwen3.5 and an adapter of Llama 4."""
    keys: dict[str, list[str]] = {}
    for model_type in SHAPES:
        folder = tmp_path / model_type
        save_adapter(load(write_composite(model_type, folder / "base")), folder / "adapter")
        target = make_exportable(find_target(str(folder / "adapter"), None, []))
        vllm.write(target, folder / "out", EVIDENCE, Options())
        keys[target.architecture] = sorted(tensors_of(folder / "out"))
    program = find_program("vllm")
    assert program is not None
    command = [str(program.python), "-c", MAPPED, json.dumps(keys)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    mapped = json.loads(printed[printed.index("RESULT") + 6 :])
    for architecture, names in mapped.items():
        place = "model.text_model." if architecture.startswith("SmolVLM") else "language_model.model."
        assert {name for name in names if not name.startswith(place)} == set(), architecture
