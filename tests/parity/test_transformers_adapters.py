"""transformers' add_adapter and load_adapter: its folders are read here, and it reads ours, several at once.

transformers 5.24 asks for peft 0.22, which is not released: its check is lowered to the installed release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.parity.test_products_peft import PAIRS
from tests.parity.test_products_peft import butterflies_without_cuda as butterflies_without_cuda
from tests.parity.test_vectors_peft import CASES
from tests.support.peft_case import BASES, close, logits_of, move_from_start
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.recipe.adapters.lora import LoraSettings

LLAMA = BASES["llama"]
NAMES = ("q_proj", "o_proj")
ADDED: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
}
# peft refuses to inject prompts, VeRA and VB-LoRA, and RandLoRA unless its adapter is called default; transformers 5.24
# draws SHiRA's indices anew, and does not read DoRA's magnitudes, of peft's folders either
SKIPPED = ("vera", "vblora", "randlora", "shira")
METHODS = ["lora", *(name for name in (*PAIRS, *CASES) if name.partition("-")[0] not in SKIPPED)]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def released_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)


@pytest.mark.parametrize("case", ADDED)
def test_a_folder_of_add_adapter_is_read(case: str, tmp_path: Path) -> None:
    net: Any = LLAMA.make()
    net.add_adapter(peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **ADDED[case]}))
    move_from_start([parameter for parameter in net.parameters() if parameter.requires_grad], 0.2)
    net.eval().save_pretrained(str(tmp_path))
    read = attach_adapter_folder(LLAMA.make(), tmp_path, head_name="lm_head")
    close(logits_of(read.net, LLAMA), logits_of(net, LLAMA))


def settings_of(name: str) -> Any:
    if name == "lora":
        return LoraSettings(r=4, target_modules=NAMES)
    return PAIRS[name].make(NAMES)[0] if name in PAIRS else CASES[name][0](LLAMA)[0]


@pytest.mark.drawn
@pytest.mark.parametrize("name", METHODS)
def test_transformers_loads_two_of_ours_and_takes_either(name: str, tmp_path: Path) -> None:
    expected: list[torch.Tensor] = []
    for seed, place in enumerate(("first", "second")):
        ours = attach_adapter(LLAMA.make(), settings_of(name), seed=3, head_name="lm_head")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in ours.trained().values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        expected.append(logits_of(ours.net, LLAMA))
        facts = {"base_name": "org/base", "base_fingerprint": None, "revision": None}
        save_adapter_folder(ours, tmp_path / place, **facts)
    net: Any = LLAMA.make()
    for place in ("first", "second"):
        net.load_adapter(str(tmp_path / place), adapter_name=place)
    net.eval()
    for place, logits in (("first", expected[0]), ("second", expected[1]), ("first", expected[0])):
        net.set_adapter(place)
        close(logits_of(net, LLAMA), logits)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
