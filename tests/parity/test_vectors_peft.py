"""Methods of scales and vectors against peft: the five checks of every cell that peft supports too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.c3a.utils import get_circulant_fast
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.peft_case import BASES, CHECKS, COLUMNS, NO_CONV1D, Base, peft_refuses, run_cell
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.c3a import C3aSettings
from tunekit.recipe.adapters.fourierft import FourierftSettings
from tunekit.recipe.adapters.ia3 import Ia3Settings
from tunekit.recipe.adapters.ln_tuning import LnTuningSettings
from tunekit.recipe.adapters.randlora import RandloraSettings
from tunekit.recipe.adapters.road import RoadSettings
from tunekit.recipe.adapters.vblora import VbloraSettings
from tunekit.recipe.adapters.vera import VeraSettings

Made = tuple[Any, Any]  # our settings, peft's configuration


def ia3(base: Base) -> Made:
    names = (*base.attention, *base.feedforward)
    ours = Ia3Settings(target_modules=names, feedforward_modules=base.feedforward)
    return ours, peft.IA3Config(target_modules=list(names), feedforward_modules=list(base.feedforward))


def ia3_regex(base: Base) -> Made:
    """Inputs of half the layers scaled, by an expression over whole names."""
    return (
        Ia3Settings(target_modules=base.attention, feedforward_modules=r".*\.1\..*"),
        peft.IA3Config(target_modules=list(base.attention), feedforward_modules=r".*\.1\..*"),
    )


def vera(base: Base) -> Made:
    names = (*base.attention, *base.feedforward)
    return VeraSettings(r=6, target_modules=names), peft.VeraConfig(r=6, target_modules=list(names))


def vera_unsaved(base: Base) -> Made:
    """The shared matrices are in no file: both draw them from the key."""
    ours = VeraSettings(r=6, projection_prng_key=5, save_projection=False, target_modules=base.attention)
    fields = {"projection_prng_key": 5, "save_projection": False, "target_modules": list(base.attention)}
    return ours, peft.VeraConfig(r=6, **fields)


def fourierft(base: Base) -> Made:
    names, values = (*base.attention, *base.feedforward), {"n_frequency": 50, "scaling": 40.0}
    return (
        FourierftSettings(target_modules=names, **values),
        peft.FourierFTConfig(target_modules=list(names), **values),
    )


def randlora(base: Base) -> Made:
    """Rank 5 divides no side: the last random matrix is cut."""
    names = (*base.attention, *base.feedforward)
    return (
        RandloraSettings(r=5, alpha=3, target_modules=names),
        peft.RandLoraConfig(r=5, randlora_alpha=3, target_modules=list(names)),
    )


def randlora_sparse(base: Base) -> Made:
    fields = {"r": 4, "sparse": True, "save_projection": False, "projection_prng_key": 9}
    return (
        RandloraSettings(alpha=2, target_modules=base.attention, **fields),
        peft.RandLoraConfig(randlora_alpha=2, target_modules=list(base.attention), **fields),
    )


def vblora(base: Base) -> Made:
    names, values = (*base.attention, *base.feedforward), {"r": 3, "num_vectors": 12, "vector_length": 8, "topk": 3}
    return VbloraSettings(target_modules=names, **values), peft.VBLoRAConfig(target_modules=list(names), **values)


def road(variant: str) -> Callable[[Base], Made]:
    def make(base: Base) -> Made:
        names, values = (*base.attention, *base.feedforward), {"group_size": 8, "variant": variant}
        return RoadSettings(target_modules=names, **values), peft.RoadConfig(target_modules=list(names), **values)

    return make


def c3a(base: Base) -> Made:
    names = (*base.attention, *base.feedforward)
    return (
        C3aSettings(block_size=8, target_modules=names),
        peft.C3AConfig(block_size=8, target_modules=list(names)),
    )


class DenseConvolution:
    """Multiplies with the matrix that peft merges."""

    @staticmethod
    def apply(x: Tensor, kernels: Tensor) -> Tensor:
        return x @ get_circulant_fast(kernels).T


@contextmanager
def dense_c3a() -> Iterator[None]:
    """peft's own gradient of the input is of another function than its forward, so the oracle is its dense matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.tuners.c3a.layer, "BlockCircularConvolution", DenseConvolution)
        yield


def ln_tuning(base: Base) -> Made:
    return LnTuningSettings(target_modules=base.norms), peft.LNTuningConfig(target_modules=list(base.norms))


LINEAR = tuple(family for family in BASES if family != "gpt2")  # peft refuses Conv1D there
CASES: dict[str, tuple[Callable[[Base], Made], tuple[str, ...], dict[str, Any]]] = {
    "ia3": (ia3, COLUMNS, {}),
    "ia3-regex": (ia3_regex, COLUMNS, {}),
    "vera": (vera, COLUMNS, {}),
    "vera-unsaved": (vera_unsaved, COLUMNS, {"known_warnings": ("Specified to not",)}),
    "fourierft": (fourierft, COLUMNS, {}),
    "vblora": (vblora, COLUMNS, {}),
    "road_1": (road("road_1"), LINEAR, {}),
    "road_2": (road("road_2"), LINEAR, {}),
    "road_4": (road("road_4"), LINEAR, {}),
    "ln_tuning": (ln_tuning, COLUMNS, {"known_warnings": ("Unsupported layer type",)}),
    "randlora": (randlora, COLUMNS, {"known_warnings": ("missing adapter keys",)}),  # repeats under each layer
    "randlora-sparse": (randlora_sparse, COLUMNS, {"known_warnings": ("Specified to not",)}),
    "c3a": (c3a, LINEAR, {"spread": 2.0, "backward": dense_c3a}),
}


@pytest.mark.parametrize("family", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_cell(name: str, family: str, tmp_path: Path) -> None:
    make, families, options = CASES[name]
    settings, config = make(BASES[family])
    if family not in families:
        peft_refuses(settings.method, family, NO_CONV1D, lambda: peft.get_peft_model(BASES[family].make(), config))
        return
    cell = run_cell(settings, config, family, tmp_path, **options)
    assert not cell.failures
    assert tuple(cell.passed) == CHECKS


def test_a_repeat_that_differs_from_what_it_repeats_is_refused(tmp_path: Path) -> None:
    base = BASES["llama"]
    _, config = randlora(base)
    peft.get_peft_model(base.make(), config).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("q_proj.randlora_A"))
    tensors[key] = tensors[key] + 1
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="which it repeats"):
        attach_adapter_folder(base.make(), tmp_path, head_name="lm_head")


def test_random_matrices_that_are_in_no_file_are_those_of_peft(tmp_path: Path) -> None:
    base, ids = BASES["llama"], torch.arange(3, 11)[None]
    names = [*base.attention, *base.feedforward]
    config = peft.RandLoraConfig(r=5, target_modules=names, save_projection=False, init_weights=False)
    model = peft.get_peft_model(base.make(), config).eval()
    model.save_pretrained(str(tmp_path))
    net = base.make().eval()
    attach_adapter_folder(net, tmp_path, head_name="lm_head")
    torch.testing.assert_close(net(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)
