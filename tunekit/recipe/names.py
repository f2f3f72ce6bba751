"""Names in a recipe are file names: which adapters, objectives, formats and metrics exist, and their settings.

Comes in: a kind ("adapters") and a name ("lora").  Goes out: the list of names, a settings class, a module of facts.
A new file is a new name; there is no other list.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tunekit.recipe.evaluation import CHOICE_SUMS
from tunekit.recipe.section import MethodSettings

Kind = Literal["adapters", "objectives", "starts", "formats", "metrics"]
SettingsKind = Literal["adapters", "objectives", "starts"]


@cache
def known_names(kind: Kind) -> tuple[str, ...]:
    """Every name of a kind, sorted: the files of recipe/KIND/; of formats and metrics those that state DESCRIPTION."""
    settings = Path(__file__).parent / kind
    folder = settings if settings.is_dir() else settings.parent.parent / kind
    names = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    return tuple(
        names if settings.is_dir() else (name for name in names if hasattr(facts_of(kind, name), "DESCRIPTION"))
    )


def facts_of(kind: Kind, name: str) -> ModuleType:
    """The torch-free file of a known name."""
    return import_module(
        f"tunekit.{kind}.{name}" if kind in ("formats", "metrics") else f"tunekit.recipe.{kind}.{name}"
    )


def settings_class(kind: SettingsKind, name: str) -> type[MethodSettings]:
    """The settings class of a known name: lora.py defines LoraSettings, p_tuning.py PTuningSettings."""
    title = "".join(part.capitalize() for part in name.split("_"))
    found: Any = getattr(facts_of(kind, name), f"{title}Settings")
    return found  # type: ignore[no-any-return]


def formats_of(example: str) -> list[str]:
    """The formats that give this kind of example."""
    return [name for name in known_names("formats") if getattr(facts_of("formats", name), "EXAMPLE", None) == example]


def unmeasurable(metric: str, sums: Iterable[str], *, chosen: bool) -> str | None:
    """Why a known metric does not follow from an objective's sums, with choices or without; None where it does."""
    needed, given = getattr(facts_of("metrics", metric), "NEEDS", ()), {*sums, *(CHOICE_SUMS if chosen else ())}
    absent = next((name for name in needed if name not in given), None)
    if absent is None:
        return None
    return f"the metric {metric} needs {absent}, which an evaluation of this objective does not give"


def units_of(objective: str) -> str:
    """What an objective's loss sums over: supervised tokens, pairs, labels."""
    found: Any = settings_class("objectives", objective)
    return f"{found.unit}s"


def sizes_of(objective: str) -> str:
    """What the sizes of an objective's rows count: tokens, frames, pixels."""
    found: Any = settings_class("objectives", objective)
    return f"{found.size_unit}s"


def draws_images(objective: str) -> bool:
    """Whether models of an objective draw images."""
    found: Any = settings_class("objectives", objective)
    return bool(found.draws)


def measures_training(objective: str) -> bool:
    """Whether evaluation rows of an objective may be training rows."""
    found: Any = settings_class("objectives", objective)
    return bool(found.measures_training)


def needs_generation(metric: str) -> bool:
    """Whether a known metric compares answers with references (else it follows from an objective's sums)."""
    return hasattr(facts_of("metrics", metric), "score")
