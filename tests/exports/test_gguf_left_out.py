"""What transformers leaves out of a GGUF file is either computed with, or the file is refused, by plan too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.arithmetic.test_merge import write_base
from tunekit.errors import ModelError
from tunekit.export import export_verb
from tunekit.exports.format import Options
from tunekit.model.load import load_model, make_meta_model
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.targets.target import find_target

CPU = torch.device("cpu")
IDS = torch.arange(3, 103)[None]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OTHER = {**LLAMA3, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def write_file(folder: Path, **shape: Any) -> tuple[Path, Path]:
    """A llama with heads of 128 numbers, and its GGUF file in float32."""
    base = write_base(folder / "base", "llama", hidden_size=256, num_attention_heads=2, **shape)
    (folder / "file").mkdir()
    file = folder / "file" / "base.gguf"
    export_verb(str(base), "gguf", str(file), options=Options(type="F32"), certify=False)
    return base, file


def section(file: Path) -> ModelSection:
    return ModelSection(name_or_path=str(file), dtype="float32")


@pytest.mark.parametrize(
    ("theta", "factor", "context"), [(500000.0, 8.0, 8192), (500000.0, 32.0, 8192), (1e4, 4.0, 64)]
)
def test_positions_of_llama_3(theta: float, factor: float, context: int, tmp_path: Path, installed: None) -> None:
    rope = {**LLAMA3, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": context}
    base, file = write_file(tmp_path, rope_parameters=rope)
    theirs, ours = AutoModelForCausalLM.from_pretrained(base).eval(), load_model(section(file), device=CPU)
    stated = ours.config.rope_parameters
    assert {name: pytest.approx(value) if name == "factor" else value for name, value in rope.items()} == stated
    with torch.no_grad():
        difference = (ours.net(input_ids=IDS).logits - theirs(input_ids=IDS).logits).abs().max()
    assert difference < 1e-4
    assert make_meta_model(section(file), device=CPU).config.rope_parameters == stated


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ({"attention_bias": True}, r"transformers ignores \(blk\.0\.attn_k\.bias"),
        ({"mlp_bias": True}, r"transformers ignores \(blk\.0\.ffn_down\.bias"),
        ({"rope_parameters": {**OTHER, "high_freq_factor": 8.0}}, r"scales positions \(rope_freqs\.weight\)"),
    ],
)
def test_other_numbers_are_refused(shape: dict[str, Any], what: str, tmp_path: Path, installed: None) -> None:
    _, file = write_file(tmp_path, **shape)
    for load in (load_model, make_meta_model):
        with pytest.raises(ModelError, match=what):
            load(section(file), device=CPU)


def test_weights_next_to_the_file_are_not_its_own(tmp_path: Path, installed: None) -> None:
    base, file = write_file(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(file.parent)
    headed = HeadedModel(
        name_or_path=str(file), dtype="float32", family="classifier", labels=("a", "b"), head_seed=0, head_pad_id=0
    )
    assert load_model(headed, device=CPU).new_modules == ("score",)
    assert make_meta_model(headed, device=CPU).new_modules == ("score",)


def test_an_ending_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "base.GGUF").touch()
    assert find_target(str(tmp_path / "base.GGUF"), None, []).model.name_or_path.endswith("base.GGUF")
