"""A damaged adapter is refused by each verb before the base is loaded: here the base has no weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.train_case import write_recipe
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.chat import chat_verb
from tunekit.errors import AdapterError, InputError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.load import load_recipe
from tunekit.serve import serve_verb
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb
from tunekit.training import begin

NAME = "adapter_model.safetensors"
TARGETS = ("q_proj", "v_proj")
SAMPLING = (0.0, 1.0, 0, 0)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_header(path: Path) -> None:
    os.truncate(path, 50)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[Callable[[Path], None], str] = {
    cut: rf"{NAME}: is truncated or has extra bytes: \d+ bytes of tensors, \d+ in the file; fetch it again$",
    cut_header: rf"{NAME}: is truncated or not a safetensors file \(50 bytes\); fetch it again$",
    flip: rf"{NAME}: is different from the file that tunekit wrote; restore the file, or delete tunekit.json",
}
VERBS: dict[str, Callable[[str, str, Path], Any]] = {  # the adapter, its base, a new path
    "merge": lambda adapter, base, new: merge_verb(adapter, str(new), base, None, []),
    "export": lambda adapter, base, new: export_verb(adapter, "vllm", str(new), base),
    "eval": lambda adapter, base, new: evaluate_verb(
        adapter, base, str(new.parent / "train.jsonl"), None, [], None, []
    ),
    "generate": lambda adapter, base, new: generate_verb(adapter, base, ["a"], None, []),
    "chat": lambda adapter, base, new: chat_verb(adapter, base, [], [], None, None, SAMPLING, None),
    "serve": lambda adapter, base, new: serve_verb(adapter, base, [], [], "127.0.0.1", 0, None, 16, 8),
    "chat of a base": lambda adapter, base, new: chat_verb(base, None, [], [adapter], None, None, SAMPLING, None),
    "serve of a base": lambda adapter, base, new: serve_verb(base, None, [], [adapter], "127.0.0.1", 0, None, 16, 8),
}


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by tunekit."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    net = load_target(find_target(str(tiny_llama), None, []), torch.device("cpu")).model.base.net
    attached = attach_adapter(net, LoraSettings(r=4, target_modules=TARGETS), seed=0, head_name="lm_head")
    facts: dict[str, Any] = {"base_fingerprint": None, "revision": None, "objective": {"method": "sft"}}
    save_adapter_folder(attached, folder, base_name=str(tiny_llama), **facts)
    return folder


@pytest.fixture
def place(tiny_llama: Path, adapter: Path, tmp_path: Path) -> Path:
    """A folder with the adapter, and with a base without weights."""
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(tiny_llama, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


@pytest.mark.parametrize(("verb", "damage"), [*((verb, cut) for verb in VERBS), ("merge", cut_header), ("merge", flip)])
def test_a_damaged_file_is_named_before_the_base_is_loaded(
    place: Path, verb: str, damage: Callable[[Path], None]
) -> None:
    write_recipe(place, place / "base")
    words = str(place / "adapter"), str(place / "base"), place / "new"
    with pytest.raises(InputError, match="safetensors"):
        VERBS[verb](*words)
    damage(place / "adapter" / NAME)
    with pytest.raises(AdapterError, match=DAMAGES[damage]):
        VERBS[verb](*words)
    assert not (place / "new").exists()


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_run_that_continues_a_damaged_adapter_ends_before_its_base_is_loaded(
    tiny_llama: Path, place: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begin, "load_model", lambda *_, **__: pytest.fail("loaded"))
    damage(place / "adapter" / NAME)
    settings = {"target_modules": TARGETS, "init_from": str(place / "adapter")}
    recipe = load_recipe(write_recipe(place, tiny_llama, adapter=settings, output={"dir": str(place / "run")}))
    with pytest.raises(TunekitError, match=DAMAGES[damage]):
        train_verb(recipe, resume=False, dry_run=False)
