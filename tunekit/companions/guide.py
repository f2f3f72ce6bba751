"""The guide of the loss gist: a frozen embedding model, whose similarities say which negatives are left out."""

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from tunekit.companions.base import about_model
from tunekit.contracts import Batch, CompanionSpec, EncodeOptions, PlanContext, RunView
from tunekit.errors import Problem
from tunekit.files.cache_folder import hash_of
from tunekit.formats.embedding import EmbeddingExample
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, base_fingerprint, load_model, make_meta_model
from tunekit.model.storage.inspection import remote_code
from tunekit.model.storage.sentence_transformers import DEFAULT_LENGTH
from tunekit.objectives.base import make_objective
from tunekit.objectives.losses.embeddings import EmbedLoss, Guide
from tunekit.objectives.rows.texts import TextGroups, plain_texts
from tunekit.recipe.model import HeadlessModel
from tunekit.recipe.objectives.embed import EmbedSettings
from tunekit.tuned.model import ModelRun, TunedModel


class GuideModel(Guide):
    """The guide as a companion. It reads texts with its own tokenizer, pooling, prompts and maximum length."""

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.settings, EmbedSettings)
        assert spec.settings.guide is not None
        self.section = HeadlessModel.of(spec.settings.guide, family=EmbedSettings.family)
        self._model: TunedModel | None = None  # on the meta device in a plan
        self._rows: TextGroups | None = None
        self._loss: EmbedLoss | None = None

    def embed(self, run: RunView, batches: Sequence[Batch]) -> list[Tensor]:
        """The embeddings of each batch's texts, (N, E) on the host, at least in float32."""
        assert self._model is not None
        assert self._rows is not None
        assert self._loss is not None
        guide = ModelRun(self._model, self._rows, on_split=run.on_split)
        vectors = []
        for batch in batches:
            rows = [self._rows.encode(EmbeddingExample(tuple(plain_texts(row))), row.origin) for row in batch.rows]
            read = self._rows.collate([[row] for row in rows])
            vectors += guide.score([read], self._loss.embed, lambda part: part.targets["counts"].tolist())
        return vectors

    def examine(self, planned: PlanContext) -> Sequence[Problem]:
        """Make the guide on the meta device. Raises: ModelError, which names the guide's keys in the recipe."""
        with about_model(self.key):
            self._use(make_meta_model(self.section, device=planned.device))
        return ()

    def fingerprint(self) -> Mapping[str, str]:
        """The fingerprint of the guide's files. Raises: ModelError, which names the guide's keys in the recipe."""
        with about_model(self.key):
            family = make_family(EmbedSettings.family)
            facts = repr(sorted(family.base_facts(self.section).items()))
            parts = [base_fingerprint(self.section), family.processor(self.section).fingerprint, facts]
            return {f"{self.key}.name_or_path": hash_of(parts)} | remote_code(self.section, self.key)

    def load(self, device: torch.device) -> None:
        """Load and freeze the guide. Raises: ModelError, which names the guide's keys in the recipe."""
        with about_model(self.key):
            self._use(load_model(self.section, device=device))

    def simulated(self) -> Self:
        """A copy on the meta device."""
        assert self._model is not None  # set by `examine`
        simulated, base = copy(self), self._model.base
        simulated._model = TunedModel(replace(base, net=deepcopy(base.net)), None)
        return simulated

    def resident(self, device: torch.device) -> list[Tensor]:
        """All weights."""
        assert self._model is not None
        return [*self._model.base.net.parameters(), *self._model.base.net.buffers()]

    def _use(self, base: LoadedModel) -> None:
        base.net.requires_grad_(False)
        family = make_family(EmbedSettings.family)
        facts, plain = family.base_facts(self.section), EmbedSettings.model_validate({"method": "embed"})
        objective = make_objective(plain, family.processor(self.section), facts, EncodeOptions())
        assert isinstance(objective.rows, TextGroups)
        assert isinstance(objective.loss, EmbedLoss)
        self._rows, self._loss = objective.rows.within(base.positions or DEFAULT_LENGTH), objective.loss
        self._model = TunedModel(base, None)


make = GuideModel  # companions.base calls it with a CompanionSpec
