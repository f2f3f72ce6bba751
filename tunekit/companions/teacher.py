"""The teacher of a knowledge distillation: a frozen model. The loss reads its hidden states and its output
projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from tunekit.companions.base import about_model
from tunekit.contracts import Batch, CompanionSpec, Counts, Head, PlanContext, Read, RunView
from tunekit.errors import Problem, RecipeError
from tunekit.memory.slots import waiting_tensor
from tunekit.memory.streaming import (
    WHERE,
    base_obstacle,
    host_embedding,
    host_obstacle,
    layer_bytes,
    layer_weights,
    rates_text,
    stream_base,
)
from tunekit.model.load import LoadedModel, base_fingerprint, load_model, make_meta_model
from tunekit.model.storage.gguf import parsed_once
from tunekit.model.storage.inspection import remote_code
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.objectives.losses.divergence import Teacher
from tunekit.recipe.objectives.distill import DistillSettings
from tunekit.records import ExecutionSettings, bytes_text
from tunekit.tuned.model import ModelRun, TunedModel


class TeacherModel(Teacher):
    """The teacher model as a companion. `tier`: host or disk if its layers are stored there and streamed to the device;
    off if all layers stay on the device."""

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.settings, DistillSettings)
        self.section, self.tier = spec.settings.teacher, spec.settings.teacher_streaming
        self._model: TunedModel | None = None  # on the meta device in a plan
        self._meta: LoadedModel | None = None

    @property
    def model(self) -> TunedModel:
        """The loaded teacher; in a plan, a copy on the meta device."""
        assert self._model is not None
        return self._model

    @property
    def head(self) -> Head:  # type: ignore[override]
        """The teacher's output projection."""
        return self.model.base.family.head(self.model.base.net)

    def score(self, run: RunView, batches: Sequence[Batch], read: Read, counts: Counts | None = None) -> list[Tensor]:
        """The values that `read` computes from the teacher's forward of each batch, as in RunView.score."""
        return ModelRun(self.model, run.rows, on_split=run.on_split).score(batches, read, counts)

    def examine(self, planned: PlanContext) -> Sequence[Problem]:
        """Make the teacher on the meta device. Raises: RecipeError if this teacher cannot teach this student;
        ModelError, which names the teacher's keys in the recipe."""
        with about_model(self.key), parsed_once(self.section.name_or_path):
            self._meta = make_meta_model(self.section, device=planned.device)
            tokenizer = load_tokenizer(self.section)
        problems = list(self._problems(self._meta, tokenizer, planned))
        if problems:
            raise RecipeError.of(problems)
        return ()

    def _problems(self, teacher: LoadedModel, tokenizer: LoadedTokenizer, planned: PlanContext) -> Iterator[Problem]:
        if planned.memory.streamed_head:
            what = "the divergence needs the student's whole head on the device"
            yield Problem(what, "write false", key="memory.streamed_head")
        if type(teacher.family) is not type(planned.base.family):
            yield Problem("the teacher is not a causal language model", "name a causal language model", key=self.key)
            return
        obstacle = None if self.tier == "off" else base_obstacle(teacher, self.section)
        obstacle = obstacle or (host_obstacle(planned.device) if self.tier == "host" else None)
        if obstacle is not None:
            what = f"the teacher's layers cannot be streamed from {self.tier}: {obstacle}"
            yield Problem(what, "write off", key=f"{self.key}_streaming")
        student = planned.processor.tokenizer
        assert isinstance(student, LoadedTokenizer)  # the student is a causal language model
        student_ids, teacher_ids = student.native.get_vocab(), tokenizer.native.get_vocab()
        different = sorted(
            (text for text in student_ids if teacher_ids.get(text) != student_ids[text]),
            key=lambda text: student_ids[text],
        )
        if different:
            first, share = different[0], f"{len(different):,} of the student's {len(student_ids):,} tokens"
            what = f"{share} have a different id, or no id, in the teacher's vocabulary"
            how = f"for example {first!r}, id {student_ids[first]}; name a teacher with the student's tokenizer"
            yield Problem(what, how, key=self.key)

    def notes(self, planned: PlanContext, execution: ExecutionSettings, tokens: int) -> list[str]:
        """Notes on a streamed teacher: where its layers are stored, how often they are copied, and the maximum
        speed."""
        if self.tier == "off" or self._meta is None:
            return []
        size, step_tokens = layer_bytes(self._meta), execution.gradient_accumulation_steps * tokens
        notes = [
            f"the teacher is streamed: {bytes_text(size)} of layers are stored {WHERE[self.tier]}. They are copied to "
            f"the device once per step, and once per evaluation batch. With {step_tokens:,} tokens per step, the "
            f"maximum of tokens per second is {rates_text(self.tier, step_tokens, size, copies=1)} "
            "(from published bandwidths)"
        ]
        if self.tier == "host" and planned.device.type == "cpu":
            notes.append(f"{self.key}_streaming: host saves no memory on a CPU, where host and device share one memory")
        return notes

    def fingerprint(self) -> Mapping[str, str]:
        """The fingerprint of the teacher's files. Raises: ModelError, which names the teacher's keys in the recipe."""
        with about_model(self.key):
            files = {f"{self.key}.name_or_path": base_fingerprint(self.section)}
            return files | remote_code(self.section, self.key)

    def load(self, device: torch.device) -> None:
        """Load and freeze the teacher. Raises: ModelError, which names the teacher's keys in the recipe."""
        with about_model(self.key):
            self._model = self._freeze(load_model(self.section, device=device, streamed=self.tier != "off"))

    def simulated(self) -> Self:
        """A copy on the meta device. A simulated step may change its net, to place streamed layers in slots on the
        device."""
        assert self._meta is not None  # set by `examine`
        simulated = copy(self)
        simulated._model = self._freeze(replace(self._meta, net=deepcopy(self._meta.net)))
        return simulated

    def resident(self, device: torch.device) -> list[Tensor]:
        """All weights on the device. If layers are streamed to a GPU, this excludes the embedding, which stays on the
        host."""
        net, slots = self.model.base.net, self.model.slots
        embedding = host_embedding(self.model.base) if slots is not None and device.type != "cpu" else None
        elsewhere = set() if embedding is None else {id(tensor) for tensor in embedding.parameters()}
        weights = [tensor for tensor in [*net.parameters(), *net.buffers()] if id(tensor) not in elsewhere]
        if slots is None:
            return weights
        slots.waiting = waiting_tensor(slots, self.tier, device)
        return [*weights, *(slot.memory for slot in slots.slots)]

    def _freeze(self, base: LoadedModel) -> TunedModel:
        base.net.requires_grad_(False)
        return TunedModel(base, None, slots=stream_base(base, layer_weights(base), self.tier))


make = TeacherModel  # companions.base calls it with a CompanionSpec
