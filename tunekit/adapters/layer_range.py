"""`layers_to_transform`: which of the numbered layers of the base are adapted at all.

Comes in: module names and settings.  Goes out: the names inside the chosen layers.  Next: targets.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any


def layer_number(name: str, patterns: tuple[str, ...]) -> int | None:
    """The number of the layer that the module is in: the first in its name, or the one after one of `patterns`.

    model.layers.3.mlp.experts.0.w1 is in layer 3.
    """
    pieces = name.split(".")
    for before, piece in pairwise(pieces[:-1]):
        if piece.isascii() and piece.isdigit() and (not patterns or before in patterns):
            return int(piece)
    return None


def chosen_layers(settings: Any) -> tuple[int, ...] | None:
    """The numbers, or None for all layers."""
    wanted = getattr(settings, "layers_to_transform", None)
    return (wanted,) if isinstance(wanted, int) else wanted or None


def layer_patterns(settings: Any) -> tuple[str, ...]:
    """Names of the lists that hold the layers; none stands for the first number in a name."""
    patterns = getattr(settings, "layers_pattern", None)
    return (patterns,) if isinstance(patterns, str) else patterns or ()


def in_chosen_layers(names: Iterable[str], settings: Any) -> set[str]:
    """The names whose layer is chosen; one that is in no layer is not."""
    wanted, patterns = chosen_layers(settings), layer_patterns(settings)
    return {name for name in names if wanted is None or layer_number(name, patterns) in wanted}


def outside(names: Iterable[str], settings: Any) -> tuple[list[int], list[int]]:
    """The chosen numbers that the base has no layer of, and those that it has."""
    there = {
        number for name in names for number in [layer_number(name, layer_patterns(settings))] if number is not None
    }
    return sorted(set(chosen_layers(settings) or ()) - there), sorted(there)
