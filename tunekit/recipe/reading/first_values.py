"""The rules of `tunekit init`: values of training that were measured, in first_values.yaml next to this file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from tunekit.recipe.bases.section import AdapterSettings, ObjectiveSettings
from tunekit.recipe.reading.names import adapter_class, known_names
from tunekit.recipe.reading.yaml_reader import read_text, read_yaml
from tunekit.recipe.training import TrainingSection

RULES = Path(__file__).with_name("first_values.yaml")


@dataclass(frozen=True)
class FirstValues:
    """One rule: for which objectives, methods and kind of base (encoder or decoder), the values, and their
    measurement. `objectives`: names, with the type of the rows' labels if the recipe writes it."""

    objectives: Sequence[str]
    methods: Sequence[str]
    base: str
    learning_rate: float
    rows_per_step: int
    epochs: float
    least_steps: int
    steps_per_label: int
    most_steps: int
    measured: Mapping[str, str]
    head_learning_rate: float | None = None

    def steps(self, rows: int, labels: int) -> int:
        """The number of steps for these numbers of training rows and of labels."""
        usual = math.ceil(self.epochs * rows / self.rows_per_step)
        return min(max(usual, self.least_steps, self.steps_per_label * labels), self.most_steps)


@cache
def rules() -> Sequence[FirstValues]:
    """All rules, in the order in which they are tried."""
    return [FirstValues(**rule) for rule in cast(list[dict[str, Any]], read_yaml(read_text(RULES), str(RULES)).values)]


def first_values(objective: str, method: str, base: str) -> FirstValues | None:
    """The first rule that fits; None if nothing was measured for these names."""
    fits = (rule for rule in rules() if objective in rule.objectives and method in rule.methods and base == rule.base)
    return next(fits, None)


def usual_rate(objective: type[ObjectiveSettings], method: str) -> float:
    """The learning rate that was measured for an objective and a method; else the published one; else the default."""
    adapter = adapter_class(method) if method in known_names("adapters") else AdapterSettings
    rule = _any_base(objective, method)
    published = (None if adapter.trains_base else objective.default_learning_rate) or adapter.default_learning_rate
    if rule is not None:
        return rule.learning_rate
    default: float = TrainingSection.model_fields["learning_rate"].default
    return default if published is None else published.value


def usual_rows(objective: type[ObjectiveSettings], method: str, rows: int, labels: int) -> int | None:
    """The measured number of rows that all steps together read; None if it was not measured."""
    rule = _any_base(objective, method)
    return None if rule is None else rule.steps(rows, labels) * rule.rows_per_step


def _any_base(objective: type[ObjectiveSettings], method: str) -> FirstValues | None:
    """The first rule for an objective and a method, with any base."""
    name = objective.model_fields["method"].default
    return next((rule for rule in rules() if name in rule.objectives and method in rule.methods), None)


def rules_text() -> str:
    """The file of rules, and the names for which nothing was measured."""
    lines = [read_text(RULES), "# Nothing was measured for the names below: init writes their published values."]
    for section in ("objectives", "adapters"):
        rule_names = [rule.objectives if section == "objectives" else rule.methods for rule in rules()]
        measured = {name for names in rule_names for name in names}
        lines.append(f"# {section}: {', '.join(name for name in known_names(section) if name not in measured)}")
    lines.append(
        "# No rule for problem_type: regression (1e-3 x 300 explains .586 of the variance, words .675) or decoders."
    )
    return "\n".join(lines)
