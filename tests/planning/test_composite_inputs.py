"""Wrong input with a composite base: each is refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, Gemma3Config, Gemma3ForCausalLM

from tests.support.composite_case import PROCESSOR_FILES, write_composite
from tests.support.train_case import train, write_recipe, write_sections
from tunekit.adapter import rename_verb
from tunekit.errors import TunekitError

CONVERT = "rename them with: tunekit adapter convert"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composite base, its text class, and an adapter with the names of each."""
    place = tmp_path_factory.mktemp("inputs")
    write_composite("gemma3", place / "composite")
    names = shutil.ignore_patterns("*.safetensors*", "config.json", *PROCESSOR_FILES)
    shutil.copytree(place / "composite", place / "text", ignore=names)
    Gemma3ForCausalLM(Gemma3Config.from_pretrained(place / "composite").text_config).save_pretrained(place / "text")
    run = train(write_recipe(place, place / "composite", training={"epochs": None, "max_steps": 1}))
    shutil.move(run / "adapter", place / "adapter")
    rename_verb(str(place / "adapter"), "text", None, str(place / "text-adapter"))
    return place


def no_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def no_processor(folder: Path) -> None:
    for name in PROCESSOR_FILES:
        (folder / name).unlink()


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))


def needs_timm(folder: Path) -> None:
    no_shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    config = CONFIG_MAPPING["gemma3n"]()
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(folder)


def unchanged(folder: Path) -> None:
    """The recipe is wrong."""


CASES: list[tuple[Callable[[Path], None], str, dict[str, object], str]] = [  # damage, base, keys of adapter, message
    (no_shard, "composite", {}, r"model-00002-of-00002.safetensors: is missing; fetch it"),
    (no_processor, "composite", {"method": "full"}, r"no processor files \(preprocessor_config.json\).*; copy them"),
    (unknown_type, "composite", {}, r"transformers .* does not know kimi_vl; update transformers"),
    (needs_timm, "composite", {}, r"TimmWrapperModel requires the timm library; run: pip install timm"),
    (unchanged, "composite", {"target_modules": ["fc1"]}, r"'fc1' matches only modules outside .*; name layers of the"),
    (unchanged, "composite", {"target_modules": "model.vision.*"}, r"matches only modules outside .*; name layers of"),
    (unchanged, "composite", {"parts": ["tower"]}, r"tower cannot be trained: the rows are text alone.*; write parts:"),
    (unchanged, "composite", {"init_from": "text-adapter"}, CONVERT),
    (unchanged, "text", {"init_from": "adapter"}, CONVERT),
]


@pytest.mark.parametrize(
    ("damage", "base", "adapter", "message"), CASES, ids=[f"{c[0].__name__}-{c[2]}" for c in CASES]
)
def test_wrong_input_is_refused_in_one_line(
    damage: Callable[[Path], None],
    base: str,
    adapter: dict[str, object],
    message: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(place / base, tmp_path / "model")
    damage(folder)
    if damage is needs_timm and find_spec("timm"):
        pytest.skip("timm is installed")
    if "init_from" in adapter:
        adapter = {"init_from": str(place / str(adapter["init_from"]))}
    values = json.loads(write_recipe(tmp_path, folder, adapter={"dropout": 0.0}).read_text())
    values["adapter"] = adapter
    recipe = write_sections(tmp_path, values, {})
    if damage is not unchanged:  # before any row is encoded
        monkeypatch.setattr("tunekit.planning.prepare.load_rows", lambda *_, **__: pytest.fail("rows are encoded"))
    with pytest.raises(TunekitError, match=message) as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
