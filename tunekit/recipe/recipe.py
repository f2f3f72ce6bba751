"""The whole recipe: one frozen value made of its sections."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from tunekit.recipe.bases.section import AdapterSettings, ObjectiveSettings, Section
from tunekit.recipe.data import DataSection
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.output import OutputSection
from tunekit.recipe.reading.names import SettingsKind, known_names, objective_class, settings_class
from tunekit.recipe.sweep import SweepSection
from tunekit.recipe.training import TrainingSection

DEFAULT_METHOD = {"adapter": "lora", "objective": "sft"}


def make_adapter_settings(values: object) -> Any:
    """Converts {method: lora, r: 8} to LoraSettings. A settings object is returned unchanged."""
    return _named_settings("adapter", "adapters", values)


def make_objective_settings(values: object) -> Any:
    """Converts {method: sft} to SftSettings. A settings object is returned unchanged."""
    return _named_settings("objective", "objectives", values)


def _named_settings(section: str, kind: SettingsKind, values: object) -> object:
    if not isinstance(values, dict):
        return values
    name = values.get("method", DEFAULT_METHOD[section])
    if name not in known_names(kind):
        raise ValueError(f"unknown {section} {name!r}; known: {', '.join(known_names(kind))}")
    return settings_class(kind, name).model_validate(values)


def supervised_objective(family: str, labels: int = 0) -> ObjectiveSettings | None:
    """The objective that evaluates a model of this family if no recipe names an objective; None if no objective can.
    `labels`: the number of outputs of the model's head. A model whose head has one output is a reward model."""
    for kind in map(objective_class, known_names("objectives")):
        if kind.supervised and (kind.single_score if labels == 1 else kind.family == family):
            return kind()  # type: ignore[call-arg]
    return None


class Recipe(Section):
    """All settings of a run. `model_validate` reads the values that `model_dump(mode="json")` returns.

    `sweep`: not part of a run, and None after loading.
    """

    model: ModelSection
    data: DataSection
    adapter: Annotated[SerializeAsAny[AdapterSettings], BeforeValidator(make_adapter_settings)] = Field(
        default_factory=lambda: make_adapter_settings({})
    )
    objective: Annotated[SerializeAsAny[ObjectiveSettings], BeforeValidator(make_objective_settings)] = Field(
        default_factory=lambda: make_objective_settings({})
    )
    training: TrainingSection = Field(default_factory=TrainingSection)
    memory: MemorySection = Field(default_factory=MemorySection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    output: OutputSection
    sweep: SweepSection | None = Field(None, exclude=True)
