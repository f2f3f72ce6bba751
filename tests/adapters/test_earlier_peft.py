"""Folders of earlier releases of peft: read as those releases meant them, or refused with the reason.

peft 0.21 makes each folder; the fields that earlier releases did not write are removed from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from tests.support.peft_case import BASES, close, logits_of, move_from_start
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.arithmetic.lora_folder import read_lora_folder
from tunekit.errors import AdapterError

ATTENTION = ["q_proj", "v_proj"]
CROSSED: dict[str, Any] = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 40}}
pytestmark = pytest.mark.filterwarnings("ignore")


def saved(config: Any, folder: Path, family: str = "llama", *, without: tuple[str, ...] = (), **fields: Any) -> Any:
    """peft's model after it wrote the folder, in which fields are then removed and changed."""
    theirs = peft.get_peft_model(BASES[family].make(), config).eval()
    move_from_start([parameter for parameter in theirs.parameters() if parameter.requires_grad], 0.2)
    theirs.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name not in without}
    path.write_text(json.dumps({**values, **fields}))
    return theirs


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, **fields)


def check_equal(theirs: Any, folder: Path, family: str = "llama") -> None:
    net = BASES[family].make()
    attach_adapter_folder(net, folder, head_name=BASES[family].head_name)
    close(logits_of(net, BASES[family]), logits_of(theirs, BASES[family]))


@pytest.mark.parametrize("patterns", [CROSSED, {"alpha_pattern": {"q_proj|v_proj": 40}}])
def test_patterns_that_had_another_meaning_are_refused(patterns: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(lora(**patterns), tmp_path / "stated")
    check_equal(theirs, tmp_path / "stated")
    saved(lora(**patterns), tmp_path / "old", without=("peft_version", "corda_config"))
    message = "alpha 40.0, but rank 4 and alpha 6.0 in peft before 0.15"
    with pytest.raises(AdapterError, match=message):
        attach_adapter_folder(BASES["llama"].make(), tmp_path / "old", head_name="lm_head")
    with pytest.raises(AdapterError, match=message):
        read_lora_folder(tmp_path / "old")


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9}},
        {"alpha_pattern": {"model.layers.1.self_attn.q_proj": 40}},
        {"alpha_pattern": {"layers.(0|1).self_attn.q_proj": 40}},
    ],
)
def test_patterns_with_the_same_meaning_are_read(patterns: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(lora(**patterns), tmp_path, without=("peft_version", "corda_config"))
    check_equal(theirs, tmp_path)


def test_an_early_lokr_is_not_scaled(tmp_path: Path) -> None:
    config = peft.LoKrConfig(r=2, alpha=2, target_modules=ATTENTION, rank_pattern={"v_proj": 3})
    config.alpha_pattern = {"v_proj": 3}
    theirs = saved(config, tmp_path, without=("peft_version", "rank_dropout_scale"), alpha=6, alpha_pattern={})
    check_equal(theirs, tmp_path)


def test_an_early_oft_is_refused(tmp_path: Path) -> None:
    saved(peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION), tmp_path, without=("use_cayley_neumann",))
    with pytest.raises(AdapterError, match=r"peft before 0\.16, whose OFT has other tensors"):
        attach_adapter_folder(BASES["llama"].make(), tmp_path, head_name="lm_head")


def test_a_head_that_the_configuration_does_not_name_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    theirs = saved(config, tmp_path, "bert", without=("peft_version",), modules_to_save=None)
    check_equal(theirs, tmp_path, "bert")
