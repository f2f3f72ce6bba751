"""Names in a recipe are file names: which adapters, objectives, families, formats and metrics exist, and their
settings. A new file is a new name; there is no other list."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tunekit.recipe.bases.section import AdapterSettings, MethodSettings, ObjectiveSettings
from tunekit.recipe.evaluation import CHOICE_SUMS
from tunekit.records import Shows

Kind = Literal["adapters", "objectives", "starts", "families", "formats", "metrics"]
SettingsKind = Literal["adapters", "objectives", "starts"]

_STATES_FAMILY = re.compile(r"^FAMILY\b[^=\n]*=", re.MULTILINE)


@cache
def known_names(kind: Kind) -> tuple[str, ...]:
    """Every name of a kind, sorted: the files of recipe/KIND/; of formats and metrics those that state DESCRIPTION, of
    families those that state FAMILY, which are read as text because they import torch."""
    if kind == "families":
        files = sorted((Path(__file__).parents[2] / "model" / kind).glob("*.py"))
        return tuple(file.stem for file in files if _STATES_FAMILY.search(file.read_text("utf-8")))
    listed = kind in ("formats", "metrics")
    folder = Path(__file__).parents[2 if listed else 1] / kind
    names = sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))
    return tuple(name for name in names if not listed or hasattr(facts_of(kind, name), "DESCRIPTION"))


def facts_of(kind: Kind, name: str) -> ModuleType:
    """The torch-free file of a known name."""
    folder = kind if kind in ("formats", "metrics") else f"recipe.{kind}"
    return import_module(f"tunekit.{folder}.{name}")


def settings_class(kind: SettingsKind, name: str) -> type[MethodSettings]:
    """The settings class of a known name: lora.py defines LoraSettings, p_tuning.py PTuningSettings."""
    title = "".join(part.capitalize() for part in name.split("_"))
    return getattr(facts_of(kind, name), f"{title}Settings")


def objective_class(name: str) -> type[ObjectiveSettings]:
    """The settings class of a known objective."""
    return settings_class("objectives", name)  # type: ignore[return-value]


def adapter_class(name: str) -> type[AdapterSettings]:
    """The settings class of a known method."""
    return settings_class("adapters", name)  # type: ignore[return-value]


def formats_of(example: str) -> list[str]:
    """The formats that give this kind of example."""
    return [name for name in known_names("formats") if getattr(facts_of("formats", name), "EXAMPLE", None) == example]


def unmeasurable(
    metric: str, objective: type[ObjectiveSettings], facts: Mapping[str, Any], *, chosen: bool
) -> tuple[str, str] | None:
    """What is wrong with a known metric of an objective, with choices or without, and how to mend it; None where it is
    measured. `facts`: the settings of the objective, or the facts of a trained one."""
    sums = {*objective.sums_of(facts), *(CHOICE_SUMS if chosen else ())}
    if _follows(metric, sums):
        return None
    method = objective.model_fields["method"].default
    known = known_names("metrics")
    measurable = [name for name in known if _follows(name, sums) and (objective.answers or not needs_generation(name))]
    with_choices = objective.example == "text" and _follows(metric, {*sums, *CHOICE_SUMS})
    how = f"; where answers are chosen from a list (evaluation.choices), also {metric}" if with_choices else ""
    return f"objective {method} has no metric {metric}", f"its metrics are {', '.join(measurable)}{how}"


def _follows(metric: str, sums: Iterable[str]) -> bool:
    """Whether a known metric follows from these sums, or from answers alone."""
    return set(getattr(facts_of("metrics", metric), "NEEDS", ())) <= set(sums)


def shows_of(objective: str) -> Shows:
    """What progress, report and preview show about an objective."""
    return objective_class(objective).shows


def needs_generation(metric: str) -> bool:
    """Whether a known metric compares answers with references (else it follows from an objective's sums)."""
    return hasattr(facts_of("metrics", metric), "score")
