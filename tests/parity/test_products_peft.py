"""Products and rotations against peft, both ways, on five families; where peft refuses a family, so does its cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests.support.peft_case import BASES, CHECKS, COLUMNS, NO_CONV1D, peft_refuses, run_cell
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.method import load_method
from tunekit.adapters.methods.oft import block_size
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.boft import BoftSettings
from tunekit.recipe.adapters.delora import DeloraSettings
from tunekit.recipe.adapters.gralora import GraloraSettings
from tunekit.recipe.adapters.hira import HiraSettings
from tunekit.recipe.adapters.hra import HraSettings
from tunekit.recipe.adapters.loha import LohaSettings
from tunekit.recipe.adapters.lokr import LokrSettings
from tunekit.recipe.adapters.miss import MissSettings
from tunekit.recipe.adapters.oft import OftSettings
from tunekit.recipe.adapters.shira import ShiraSettings

LINEAR = tuple(family for family in COLUMNS if family != "gpt2")  # of methods for which peft adapts nn.Linear only


@dataclass(frozen=True)
class Pair:
    """One method's settings, peft's configuration of the same, and the families that peft adapts with it.

    `ours` and `theirs` name the fields in which the two differ; `patterns` those that hold one layer's own value.
    """

    settings: Any
    config: Any
    fields: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    patterns: dict[str, float] = field(default_factory=dict)
    families: tuple[str, ...] = LINEAR
    spread: float = 0.2

    def make(self, names: Sequence[str]) -> tuple[Any, Any]:
        shared = self.fields | {name: {names[0]: value} for name, value in self.patterns.items()}
        ours = self.settings(**shared, **self.ours, target_modules=tuple(names))
        return ours, self.config(**shared, **self.theirs, target_modules=list(names))


BOTH = {"r": 1, "alpha": 1, "decompose_both": True, "decompose_factor": 4}
PAIRS = {
    "loha": Pair(LohaSettings, peft.LoHaConfig, {"r": 4, "alpha": 6}, patterns={"rank_pattern": 2, "alpha_pattern": 3}),
    "lokr": Pair(LokrSettings, peft.LoKrConfig, {"r": 2, "alpha": 3}, patterns={"rank_pattern": 3, "alpha_pattern": 4}),
    "lokr-both": Pair(LokrSettings, peft.LoKrConfig, BOTH, spread=0.5),
    "lokr-whole": Pair(LokrSettings, peft.LoKrConfig, {"r": 8, "alpha": 8}),
    "oft": Pair(OftSettings, peft.OFTConfig, {}, {"block_size": 16}, {"oft_block_size": 16}),
    "oft-shared": Pair(
        OftSettings, peft.OFTConfig, {"block_share": True}, {"blocks": 4}, {"r": 4, "oft_block_size": 0}
    ),
    "oft-exact": Pair(
        OftSettings, peft.OFTConfig, {"use_cayley_neumann": False}, {"block_size": 8}, {"oft_block_size": 8}
    ),
    "oft-three-terms": Pair(
        OftSettings, peft.OFTConfig, {"num_cayley_neumann_terms": 3}, {"block_size": 4}, {"oft_block_size": 4}
    ),
    "hra": Pair(HraSettings, peft.HRAConfig, {"r": 4}),
    "hra-orthogonal": Pair(HraSettings, peft.HRAConfig, {"r": 4}, {"orthogonal": True}, {"apply_GS": True}),
    "miss": Pair(MissSettings, peft.MissConfig, {"r": 5}),
    "miss-bat": Pair(MissSettings, peft.MissConfig, {"r": 8}, {"variant": "bat"}, {"init_weights": "bat"}),
    "miss-mini": Pair(
        MissSettings, peft.MissConfig, {"r": 8, "mini_r": 4}, {"variant": "mini"}, {"init_weights": "mini"}
    ),
    "hira": Pair(HiraSettings, peft.HiraConfig, {"r": 4}, families=COLUMNS),
    "boft": Pair(BoftSettings, peft.BOFTConfig, {}, {"block_size": 8}, {"boft_block_size": 8}),
    "boft-butterfly": Pair(
        BoftSettings,
        peft.BOFTConfig,
        {},
        {"block_size": 4, "butterfly_factors": 3},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
    ),
    "boft-blocks": Pair(BoftSettings, peft.BOFTConfig, {}, {"blocks": 4}, {"boft_block_size": 0, "boft_block_num": 4}),
    "gralora": Pair(
        GraloraSettings, peft.GraloraConfig, {"r": 4, "alpha": 6}, {"k": 2}, {"gralora_k": 2}, families=COLUMNS
    ),
    "gralora-hybrid": Pair(
        GraloraSettings,
        peft.GraloraConfig,
        {"r": 4, "alpha": 6, "hybrid_r": 3},
        {"k": 4},
        {"gralora_k": 4},
        families=COLUMNS,
    ),
    "delora": Pair(DeloraSettings, peft.DeloraConfig, {"r": 4, "delora_lambda": 2}, patterns={"rank_pattern": 2}),
    "shira": Pair(ShiraSettings, peft.ShiraConfig, {"r": 3}),
}


class PlainBlockDiagonal:
    """What peft's CUDA extension computes, without which it takes one butterfly factor whatever is asked for."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.fixture(autouse=True)
def butterflies_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", PlainBlockDiagonal)


@pytest.mark.parametrize("family", COLUMNS)
@pytest.mark.parametrize("name", PAIRS)
def test_cell(name: str, family: str, tmp_path: Path) -> None:
    base = BASES[family]
    settings, config = PAIRS[name].make(base.attention + base.feedforward)
    if family not in PAIRS[name].families:
        peft_refuses(settings.method, family, NO_CONV1D, lambda: peft.get_peft_model(base.make(), config))
        return
    cell = run_cell(settings, config, family, tmp_path, spread=PAIRS[name].spread)
    assert not cell.failures
    assert tuple(cell.passed) == CHECKS


@pytest.mark.parametrize("name", PAIRS)
def test_every_field_of_pefts_configuration_is_written(name: str) -> None:
    settings, config = PAIRS[name].make(("q_proj",))
    assert load_method(settings.method).peft.write(settings).keys() == config.to_dict().keys()


@pytest.mark.parametrize("inputs", [1, 31, 48, 96, 100])
def test_a_block_that_divides_no_layer_becomes_pefts_divisor(inputs: int) -> None:
    layer = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for size in range(1, 120):
        fitting = size if inputs % size == 0 else layer(None, inputs, size)
        assert block_size(OftSettings(block_size=size), inputs) == fitting
        assert inputs // block_size(OftSettings(blocks=size), inputs) == fitting


@pytest.mark.parametrize("place", [-1, 32])
def test_places_outside_of_the_matrix_are_refused(place: int) -> None:
    settings = ShiraSettings(r=2, target_modules=("q_proj",))
    attached = attach_adapter(BASES["llama"].make(), settings, seed=0, head_name="lm_head")
    state = {name: tensor.clone() for name, tensor in attached.state().items()}
    next(tensor for name, tensor in state.items() if name.endswith("shira_indices"))[1, 5] = place
    with pytest.raises(AdapterError, match="positions outside of the matrix"):
        attached.load_state(state)
