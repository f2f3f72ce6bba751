"""The whole recipe: one frozen value made of its sections.

Comes in: the mapping load.py read.  Goes out: `Recipe`.  Next: plan.py.
"""

from __future__ import annotations

from pydantic import Field

from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.data import DataSection
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.recipe.output import OutputSection
from tunekit.recipe.section import Section
from tunekit.recipe.training import TrainingSection


class Recipe(Section):
    """Everything a run is made from."""

    model: ModelSection
    data: DataSection
    adapter: LoraSettings = Field(default_factory=LoraSettings)
    objective: SftSettings = Field(default_factory=SftSettings)
    training: TrainingSection = Field(default_factory=TrainingSection)
    memory: MemorySection = Field(default_factory=MemorySection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    output: OutputSection
