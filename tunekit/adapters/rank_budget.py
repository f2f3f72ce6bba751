"""AdaLoRA's budget: how many ranks all layers may have together at each step, and which of them.

Comes in: the layers of one adapter, after each optimizer step.  Goes out: entries of E set to zero.  Next: adalora.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from tunekit.adapters.base import LayerAdapter, Misfit, SharedPart, Slot
from tunekit.recipe.adapters.adalora import AdaloraSettings
from tunekit.records import Target

if TYPE_CHECKING:
    from tunekit.adapters.methods.adalora import Adalora


class RankBudget(SharedPart):
    """Takes ranks away from all layers together, the least important first, whichever layer they belong to.

    The budget is every rank up to step `tinit`, the target from step total - tfinal on, and between them
    target + (start - target) (1 - (step - tinit) / (total - tfinal - tinit))^3. In between, a triplet taken away may
    grow again until the next change; from the last change on it stays at zero. With tfinal 0 the last step is the one
    that comes down to the target.
    Source: Zhang et al. 2023, eq. 12; ties fall together, as in PEFT's RankAllocator.
    """

    settings: AdaloraSettings
    total_steps: Tensor  # (1,), 0 before the first step: a file of PEFT states it

    @classmethod
    def slots(cls, settings: AdaloraSettings, targets: Sequence[Target]) -> dict[str, Slot]:
        return {"total_steps": Slot("total_steps", (1,), kind="resume", dtype=torch.int64)}

    def initialise(self, generator: Generator) -> None:
        self.total_steps.zero_()

    def see(self, layers: Mapping[str, LayerAdapter]) -> None:
        self.__dict__["layers"] = list(layers.values())  # not submodules

    @property
    def _layers(self) -> Sequence[Adalora]:
        layers: Sequence[Adalora] = self.__dict__["layers"]
        return layers

    @property
    def layer_count(self) -> int:
        """Layers that share the budget."""
        return len(self._layers)

    def after_step(self, step: int, total_steps: int) -> None:
        self.total_steps.fill_(total_steps)
        settings, end = self.settings, total_steps - self.settings.tfinal
        target = settings.target_r * len(self._layers)
        if step < end:
            for layer in self._layers:
                layer.measure()
        if step == min(end, total_steps - 1):
            self._allocate(target)
        elif step > end:
            if sum(int(layer.kept.sum()) for layer in self._layers) > target:  # that step was skipped
                self._allocate(target)
            self._clear()
        elif step > settings.tinit and step % settings.deltaT == 0:
            left = 1 - (step - settings.tinit) / (end - settings.tinit)
            start = sum(len(layer.E) for layer in self._layers)
            self._allocate(int((start - target) * left**3 + target))

    def _allocate(self, budget: int) -> None:
        """Keep the triplets whose score is above that of the first one beyond the budget."""
        scores = [layer.scores() for layer in self._layers]
        together = torch.cat([each.to(self.total_steps.device) for each in scores])
        beyond = len(together) - budget
        if beyond > 0:
            threshold = torch.kthvalue(together, beyond).values
            for layer, score in zip(self._layers, scores, strict=True):
                layer.kept.copy_(score > threshold.to(score.device))
        self._clear()

    @torch.no_grad()
    def _clear(self) -> None:
        for layer in self._layers:
            layer.E.masked_fill_(~layer.kept[:, None], 0.0)

    def file_fields(self) -> dict[str, Any]:
        """rank_pattern, where a rank is gone, and a total_step with which PEFT takes the schedule for possible."""
        patterns = {f"{layer.place}.lora_E": layer.rank_pattern() for layer in self._layers}
        least = self.settings.tinit + self.settings.tfinal + 1
        return {
            "rank_pattern": patterns if not all(map(all, patterns.values())) else None,
            "total_step": max(int(self.total_steps), least),
        }


def run_misfits(settings: AdaloraSettings, steps: int) -> list[Misfit]:
    """A schedule that leaves no step between its two ends."""
    if settings.tinit < steps - max(settings.tfinal, 1):
        return []
    what = f"tinit {settings.tinit} and tfinal {settings.tfinal} leave no step of this run's {steps} to move ranks in"
    return [Misfit("tinit" if settings.tinit else "tfinal", what, "lower them, or train longer")]
