"""The names that a recipe can use, with their settings classes. The kinds of names are adapters, objectives, starts
(initialisations of LoRA), families, formats and metrics. Each name is a file name: a new file adds a name."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tunekit.basics import Shows
from tunekit.recipe.bases.section import AdapterSettings, MethodSettings, ObjectiveSettings
from tunekit.recipe.evaluation import CHOICE_SUMS

Kind = Literal["adapters", "objectives", "starts", "families", "formats", "metrics"]
SettingsKind = Literal["adapters", "objectives", "starts"]

_MIXED = {"families": "model/families", "formats": "formats", "metrics": "metrics"}  # folders with other files too
_STATES_NAME = re.compile(r"^(FAMILY|DESCRIPTION)\b[^=\n]*=", re.MULTILINE)


@cache
def known_names(kind: Kind) -> tuple[str, ...]:
    """Every name of a kind, sorted.

    Adapters, objectives and starts are the files of recipe/KIND/. Formats and metrics are files that define
    DESCRIPTION, families are files that define FAMILY. These files are searched as text: importing them would take
    longer than the rest of `validate`, and families import torch.
    """
    folder = Path(__file__).parents[2] / _MIXED.get(kind, f"recipe/{kind}")
    files = sorted(file for file in folder.glob("*.py") if not file.stem.startswith("_"))
    return tuple(file.stem for file in files if kind not in _MIXED or _STATES_NAME.search(file.read_text("utf-8")))


def facts_of(kind: Kind, name: str) -> ModuleType:
    """The module that defines a known name. Importing this module does not import torch."""
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
    """The settings class of a known adapter."""
    return settings_class("adapters", name)  # type: ignore[return-value]


def formats_of(example: str) -> list[str]:
    """The names of the formats whose rows become this kind of example."""
    return [name for name in known_names("formats") if getattr(facts_of("formats", name), "EXAMPLE", None) == example]


def unmeasurable(
    metric: str, objective: type[ObjectiveSettings], facts: Mapping[str, Any], *, chosen: bool
) -> tuple[str, str] | None:
    """The reason why an objective cannot measure a known metric, and how to mend it; None if it can measure the metric.

    `facts`: the settings of the objective, or the facts of a trained model; `chosen`: whether the answers are chosen
    from a list (evaluation.choices).
    """
    sums = {*objective.sums_of(facts), *(CHOICE_SUMS if chosen else ())}
    if follows_from(metric, sums):
        return None
    method = objective.model_fields["method"].default
    known = known_names("metrics")
    measurable = [
        name for name in known if follows_from(name, sums) and (objective.answers or not needs_generation(name))
    ]
    with_choices = objective.example == "text" and follows_from(metric, {*sums, *CHOICE_SUMS})
    how = f"; with evaluation.choices (answers chosen from a list), also {metric}" if with_choices else ""
    return f"objective {method} has no metric {metric}", f"its metrics are {', '.join(measurable)}{how}"


def follows_from(metric: str, sums: Iterable[str]) -> bool:
    """Whether a known metric can be computed from these sums over rows, or from the answers alone."""
    return set(getattr(facts_of("metrics", metric), "NEEDS", ())) <= set(sums)


def shows_of(objective: str) -> Shows:
    """The facts about an objective that progress, report and preview show."""
    return objective_class(objective).shows


def needs_generation(metric: str) -> bool:
    """Whether a known metric compares generated answers with references. Other metrics use an objective's sums."""
    return hasattr(facts_of("metrics", metric), "score")
