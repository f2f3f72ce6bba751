"""A base model, or a base with an adapter, with everything that an export format needs to know about it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tunekit.contracts import Objective, Processor
from tunekit.model.base_spec import read_base_spec
from tunekit.model.families import make_family
from tunekit.model.storage.inspection import family_of_base, read_config
from tunekit.model.storage.source import find_source
from tunekit.records import JsonObject
from tunekit.targets.target import TargetSpec, family_of, processor_of, with_objective


@dataclass(frozen=True)
class Exportable:
    """A target to export, on this machine. `kind`: "adapter", "model", "pipeline adapter" or "pipeline". `folder`: the
    base's folder. `gguf_file`: the base's file in this folder, if it is a GGUF file; then other files in the folder do
    not belong to the base. `config`: the base's config.json, empty for a pipeline. `objective`: the objective of the
    training, if it is known."""

    target: TargetSpec
    kind: str
    family: str
    folder: Path
    gguf_file: str | None
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
    def whole(self) -> str:
        """The word for an export of all weights: "merged" with an adapter, otherwise "model"."""
        return "model" if self.target.adapter is None else "merged"

    @property
    def without_adapter(self) -> "Exportable":
        """The base alone."""
        return replace(self, kind="model", target=replace(self.target, adapter=None))

    @property
    def architecture(self) -> str:
        """The class of the base in transformers, such as LlamaForCausalLM; empty if the configuration names none."""
        return next(iter(self.config.get("architectures") or ()), "")


def make_exportable(target: TargetSpec) -> Exportable:
    """The target with its base's properties; weights are not read. Raises: ModelError, AdapterError or DataError."""
    family, processor = family_of(target), processor_of(target)
    target, objective = with_objective(target, processor)
    source, config = find_source(target.model, weights=True), JsonObject()
    nouns = ("pipeline", "pipeline adapter") if make_family(family).is_pipeline else ("model", "adapter")
    if source.gguf_file is not None:  # it contains the configuration, and has no config.json
        spec = read_base_spec(source, target.model, torch.device("cpu"), weights=False)
        architecture = spec.family.auto_class()._model_mapping[type(spec.config)].__name__
        config = {**spec.config.to_dict(), "architectures": [architecture]}
    elif nouns[0] == "model":
        config = read_config(source)
        own = make_family(family_of_base(target.model))
        family = own.name if own.objectives == family else family
    kind = nouns[target.adapter is not None]
    return Exportable(target, kind, family, source.folder, source.gguf_file, config, processor, objective)
