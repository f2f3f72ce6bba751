"""Adapters of classifiers as peft makes them: with SEQ_CLS it trains the head whole, beside every method."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.parity.test_products_peft import PAIRS
from tests.parity.test_products_peft import butterflies_without_cuda as butterflies_without_cuda
from tests.parity.test_vectors_peft import CASES
from tests.support.peft_case import BASES, HARMLESS_WARNINGS, close, compare_gradients, logits_of, move_from_start
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.recipe.adapters.lora import LoraSettings

BASE = BASES["bert"]
NAMES = BASE.attention + BASE.feedforward
METHODS = ["lora", *PAIRS, *CASES]
# What peft says of its own files of these methods too.
KNOWN = (*HARMLESS_WARNINGS, "missing adapter keys", "Specified to not", "Unsupported layer type")


def pair(name: str) -> tuple[Any, Any]:
    if name == "lora":
        return LoraSettings(r=4, target_modules=NAMES), peft.LoraConfig(r=4, lora_alpha=32, target_modules=list(NAMES))
    return PAIRS[name].make(NAMES) if name in PAIRS else CASES[name][0](BASE)


@pytest.mark.parametrize("name", [name for name in METHODS if "-" not in name and not name.startswith("road_4")])
def test_heads_travel_with_the_adapter_both_ways(name: str, tmp_path: Path) -> None:
    settings, config = pair(name)
    config.task_type = "SEQ_CLS"
    theirs = peft.get_peft_model(BASE.make(), config).eval()
    move_from_start([parameter for parameter in theirs.parameters() if parameter.requires_grad], 0.2)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert any("classifier" in key for key in tensors)
    read = attach_adapter_folder(BASE.make(), tmp_path / "theirs", head_name=BASE.head_name)
    close(logits_of(read.net, BASE), logits_of(theirs, BASE))
    if name != "c3a":  # peft's own gradient of its input is wrong there
        compare_gradients(read, theirs, tensors, BASE)

    ours = attach_adapter(
        BASE.make(), settings.model_copy(update={"modules_to_save": ("classifier",)}), seed=3, head_name=BASE.head_name
    )
    move_from_start(ours.trained().values(), 0.2)
    facts = {"base_name": "org/base", "base_fingerprint": None, "revision": None, "task_type": "SEQ_CLS"}
    save_adapter_folder(ours, tmp_path / "ours", **facts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(BASE.make(), str(tmp_path / "ours")).eval()
    said = [str(w.message) for w in caught if not any(text in str(w.message) for text in KNOWN)]
    assert not said
    close(logits_of(again, BASE), logits_of(ours.net, BASE))
    with torch.no_grad():
        assert (logits_of(ours.net, BASE) - logits_of(BASE.make(), BASE)).abs().max() > 1e-3
