"""What plan foresees of Whisper large-v2 on an int8 base, from its configuration alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, WhisperFeatureExtractor

from tests.support.plans import make_plan
from tests.support.speech_case import write_recipe, write_sounds, write_tiny_whisper
from tunekit.model.load import make_meta_model
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.records import Plan

CONFIGURATION = Path(__file__).parent / "configurations" / "whisper-large-v2.json"
# Of PEFT's notebook, peft_bnb_whisper_large_v2_training: "trainable params: 15728640 || all params: 1559033600".
TRAINED, ALL_PARAMETERS = 15_728_640, 1_559_033_600
OF_V3 = 1_543_490_560  # of large-v3, as its page on the hub says: one token and 48 frequencies more
CARD_BYTES = 16 * 10**9
INT8 = {"quantization": "int8", "dtype": "float16"}
PUBLISHED = {"r": 32, "alpha": 64, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}  # PEFT's notebook


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration beside a tiny model's tokenizer; no weights."""
    folder = tmp_path_factory.mktemp("large")
    tiny = write_tiny_whisper(folder / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    config = json.loads(CONFIGURATION.read_text("utf-8"))
    written = json.loads((tiny / "generation_config.json").read_text("utf-8"))
    config["decoder_start_token_id"] = written["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    GenerationConfig(**written).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def planned(large: Path, folder: Path, device: str, **training: object) -> Plan:
    sounds = write_sounds(folder / "sounds", ["one two three"] * 16)
    recipe = write_recipe(folder, large, sounds, model=INT8, adapter=PUBLISHED, training=training)
    return make_plan(load_recipe(recipe), device=torch.device(device))[0]


def test_configurations_have_the_published_number_of_parameters(large: Path, tmp_path: Path) -> None:
    section = ModelSection(name_or_path=str(large))
    found = make_meta_model(section, device=torch.device("cpu")).facts.total_parameters
    assert found == ALL_PARAMETERS - TRAINED
    shutil.copytree(large, tmp_path / "v3")
    config = json.loads((large / "config.json").read_text("utf-8")) | {"vocab_size": 51_866, "num_mel_bins": 128}
    (tmp_path / "v3" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    section = ModelSection(name_or_path=str(tmp_path / "v3"))
    assert make_meta_model(section, device=torch.device("cpu")).facts.total_parameters == OF_V3


@pytest.mark.slow
def test_large_v2_on_int8_fits_one_card(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("available_bytes", "total_bytes"):
        monkeypatch.setattr(f"tunekit.planning.prepared.{name}", lambda device: CARD_BYTES)
    plan = planned(large, tmp_path, "cuda", micro_batch_size=8)
    assert not plan.refusals
    assert (plan.trainable_parameters, plan.total_parameters) == (TRAINED, ALL_PARAMETERS)
    assert 1.5e9 < plan.peak_bytes.weights < 2.0e9
    assert plan.peak_bytes.total < CARD_BYTES
    print({name: f"{size / 1e9:.2f} GB" for name, size in vars(plan.peak_bytes).items()})
    recomputed = planned(large, tmp_path / "all", "cuda", micro_batch_size=1)
    assert recomputed.peak_bytes.total < plan.peak_bytes.total
