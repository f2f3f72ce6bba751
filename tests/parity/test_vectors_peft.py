"""Methods of scales and vectors against peft: the five checks of every cell that peft supports too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from tests.parity.peft_case import BASES, CHECKS, Base, run_cell
from tunekit.recipe.adapters.ia3 import Ia3Settings

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


FAMILIES = tuple(BASES)
CASES: dict[str, tuple[Callable[[Base], Made], tuple[str, ...], dict[str, Any]]] = {
    "ia3": (ia3, FAMILIES, {}),
    "ia3-regex": (ia3_regex, ("llama", "gpt2"), {}),
}
CELLS = [(name, family) for name, (_, families, _) in CASES.items() for family in families]


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_cell(name: str, family: str, tmp_path: Path) -> None:
    make, _, options = CASES[name]
    cell = run_cell(*make(BASES[family]), family, tmp_path, **options)
    assert not cell.failures
    assert set(cell.passed) == set(CHECKS)
