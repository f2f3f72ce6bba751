"""Families are files: which there are, and which base each of them recognises."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import tunekit.model
from tunekit.errors import ModelError
from tunekit.model.families import known_families, make_family
from tunekit.model.storage.inspection import find_family
from tunekit.recipe.model import HeadedModel, ModelSection

MODEL = Path(tunekit.model.__path__[0])
NAMES = [
    file.stem for file in sorted((MODEL / "families").glob("*.py")) if re.search(r"(?m)^FAMILY = ", file.read_text())
]


def test_every_file_with_a_family_is_one() -> None:
    assert sorted(family.name for family in known_families()) == NAMES
    assert len(NAMES) >= 8
    assert all(make_family(family.name) is family for family in known_families())


def test_a_family_inherits_from_one_class_at_most() -> None:
    kinds = [type(family).__mro__ for family in known_families()]
    assert max(sum(kind.__module__.startswith("tunekit") for kind in each) for each in kinds) == 2


def test_no_other_file_names_a_family() -> None:
    """What differs from family to family is asked of the family."""
    named = [
        f"{file.relative_to(MODEL)}:{node.lineno}: {node.value}"
        for file in MODEL.rglob("*.py")
        if file.parent.name != "families"
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert not named


@pytest.mark.parametrize(
    ("architecture", "more", "family"),
    [
        ("LlamaForCausalLM", {}, "causal"),
        ("GPT2LMHeadModel", {}, "causal"),
        ("BartForCausalLM", {"is_encoder_decoder": True}, "causal"),
        ("", {}, "causal"),
        ("Gemma3ForConditionalGeneration", {"vision_config": {}}, "composite"),
        ("Gemma3ForCausalLM", {"vision_config": {}}, "causal"),
        ("VoxtralForConditionalGeneration", {"audio_config": {}}, "composite"),
        ("Phi4MultimodalForCausalLM", {}, "composite"),
        ("", {"is_encoder_decoder": True}, "seq2seq"),
        ("T5ForConditionalGeneration", {}, "seq2seq"),
        ("MarianMTModel", {}, "seq2seq"),
        ("WhisperForConditionalGeneration", {"model_type": "whisper"}, "speech"),
        ("MoonshineForConditionalGeneration", {"model_type": "moonshine"}, "speech"),
        ("", {"model_type": "whisper"}, "speech"),
        ("WhisperForAudioClassification", {"model_type": "whisper"}, "audio_classifier"),
        ("BertForSequenceClassification", {}, "classifier"),
        ("BertForTokenClassification", {}, "token_classifier"),
        ("ViTForImageClassification", {}, "image_classifier"),
    ],
)
def test_the_configuration_tells_the_family(architecture: str, more: dict[str, Any], family: str) -> None:
    config = {"model_type": "unknown", "architectures": [architecture] if architecture else [], **more}
    assert find_family(config, ModelSection(name_or_path="org/base")).name == family


@pytest.mark.parametrize(
    ("config", "family", "reason"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "auto", "fills gaps"),
        ({"architectures": ["BertModel"]}, "auto", "its architecture BertModel"),
        (
            {"architectures": ["Florence2ForConditionalGeneration"], "is_encoder_decoder": True},
            "auto",
            "encoder-decoder",
        ),
        ({"architectures": ["Wav2Vec2ForAudioClassification"]}, "auto", "it is not a Whisper model"),
        ({"architectures": ["LlamaForCausalLM"]}, "diffusion", "contains no model_index.json"),
        ({"architectures": ["LlamaForCausalLM"]}, "seq2seq", "belongs to the family causal"),
    ],
)
def test_what_is_of_no_family_is_refused_with_its_reason(config: dict[str, Any], family: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        find_family(config, ModelSection(name_or_path="org/base", family=family))


def test_a_base_that_gets_a_head_may_be_of_any_architecture() -> None:
    section = HeadedModel.of(ModelSection(name_or_path="org/base"), family="classifier", labels=("a", "b"))
    for architecture in ("BertModel", "BertForMaskedLM", "LlamaForCausalLM"):
        assert find_family({"architectures": [architecture]}, section).name == "classifier"
