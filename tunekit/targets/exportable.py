"""What is exported: a base model, or a base with an adapter, with everything that a format needs to know about it."""

from dataclasses import dataclass
from pathlib import Path

from tunekit.contracts import Objective, Processor
from tunekit.model.families import make_family
from tunekit.model.storage.source import find_source, read_json
from tunekit.records import JsonObject
from tunekit.targets.target import TargetSpec, family_of, processor_of, with_objective


@dataclass(frozen=True)
class Exportable:
    """A target on this machine. `kind`: "adapter", "model", "pipeline adapter" or "pipeline". `folder`: the folder of
    the base. `config`: the base's config.json, empty for a pipeline. `objective`: the objective of the training, if it
    is known."""

    target: TargetSpec
    kind: str
    family: str
    folder: Path
    config: JsonObject
    processor: Processor
    objective: Objective | None

    @property
    def adapter(self) -> Path:
        """The adapter's folder. Raises: ValueError for a model."""
        if self.target.adapter is None:
            raise ValueError(f"a {self.kind} has no adapter")
        return self.target.adapter

    @property
    def architecture(self) -> str:
        """The class of the base in transformers, such as LlamaForCausalLM; empty if the configuration names none."""
        return next(iter(self.config.get("architectures") or ()), "")


def make_exportable(target: TargetSpec) -> Exportable:
    """The target with its base's facts; weights are not read. Raises: ModelError, AdapterError or DataError."""
    family, processor = family_of(target), processor_of(target)
    target, objective = with_objective(target, processor)
    folder = find_source(target.model, weights=True).folder
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    nouns = ("model", "adapter") if not make_family(family).is_pipeline else ("pipeline", "pipeline adapter")
    kind = nouns[target.adapter is not None]
    return Exportable(target, kind, family, folder, values, processor, objective)
