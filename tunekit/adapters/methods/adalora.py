"""AdaLoRA, for linear layers and Conv1D, quantized or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import LayerAdapter, PeftConfig, SharedPart, Slot, Slots
from tunekit.adapters.blocks.lora_fields import LORA_FIXED, LORA_REMEDIES
from tunekit.adapters.blocks.low_rank_layer import LowRankLayer
from tunekit.adapters.folder.fields import ANY, Fixed, PeftFields, PeftSide, same_names
from tunekit.adapters.method import Conflict, Method
from tunekit.contracts import Tensors
from tunekit.recipe.adapters.adalora import AdaloraSettings
from tunekit.records import Target

FACTORS = ("A", "E", "B")
SPREAD = 0.02  # initial standard deviation of A and B
SAME_RANK = 1e-5  # PEFT adds this to the rank in the divisor


class Adalora(LowRankLayer[AdaloraSettings]):
    """Low-rank update by singular values: y = W x + s B (E * (A x)), s = alpha / (r + 1e-5), with the initial rank r.

    Shapes: x (..., I) -> y (..., O); A (R, I); E (R, 1); B (O, R); kept (R,) bool. Starts as the identity: E = 0.
    A triplet (row of A, entry of E, column of B) that is not kept has E = 0 at the end, and is left out of files.
    Sensitivity and uncertainty of every entry are moving averages that are saved only in checkpoints.
    Source: Zhang et al. 2023, eq. 3, 8 to 11.
    """

    shared: RankBudget
    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter
    kept: Tensor

    @classmethod
    def slots(cls, settings: AdaloraSettings, target: Target) -> Slots:
        rank = sum(settings.kept.get(pattern_key(target.name), (True,) * settings.init_r))
        slots = {
            "A": Slot("lora_A", (rank, target.in_features)),
            "E": Slot("lora_E", (rank, 1)),
            "B": Slot("lora_B", (target.out_features, rank), rate="b"),
        }
        for average in ("sensitivity", "uncertainty"):
            slots |= {
                f"{factor}_{average}": Slot(f"lora_{factor}.{average}", slots[factor].shape, kind="resume")
                for factor in FACTORS
            }
        return {**slots, "kept": Slot("kept", (rank,), kind="resume", dtype=torch.bool, first=True)}

    def initialise(self, generator: Generator) -> None:
        super().initialise(generator)
        self.A.data.normal_(0, SPREAD, generator=generator)
        self.B.data.normal_(0, SPREAD, generator=generator)

    @property
    def scaling(self) -> float:
        return self.settings.alpha / (self.settings.init_r + SAME_RANK)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.E, self.B

    def penalty(self) -> Tensor | None:
        """This layer's share of the mean over all layers of |A A^T - 1| + |B^T B - 1|, halved as in PEFT."""
        if not self.settings.orth_reg_weight:
            return None
        one = torch.eye(len(self.A), device=self.A.device)  # (R, R)
        norms: Tensor = torch.linalg.matrix_norm(torch.stack([self.A @ self.A.T - one, self.B.T @ self.B - one]))
        return norms.sum() * (self.settings.orth_reg_weight / (2 * len(self.shared.layers)))

    @torch.no_grad()
    def measure(self) -> None:
        """Update two moving averages after a step: the sensitivity, an average of s = |value * gradient|, and the
        uncertainty, an average of the distance between s and the sensitivity."""
        for factor in FACTORS:
            parameter, gradient = getattr(self, factor), getattr(self, factor).grad
            sensitivity, uncertainty = getattr(self, f"{factor}_sensitivity"), getattr(self, f"{factor}_uncertainty")
            now, beta1, beta2 = (parameter * gradient).abs(), self.settings.beta1, self.settings.beta2
            sensitivity.copy_(beta1 * sensitivity + (1 - beta1) * now)
            uncertainty.copy_(beta2 * uncertainty + (1 - beta2) * (now - sensitivity).abs())

    def scores(self) -> Tensor:
        """The importance of each triplet, (R,): the score of its entry of E, plus the mean scores of its row of A and
        of its column of B."""
        a, e, b = (
            getattr(self, f"{factor}_sensitivity") * getattr(self, f"{factor}_uncertainty") for factor in FACTORS
        )
        return e[:, 0] + (a.mean(1) + b.mean(0))

    def continued_state(self, tensors: Tensors) -> Tensors:
        """Triplets that the folder lacks, because they were removed, are initialised again: with E = 0 they change
        nothing until they are trained."""
        continued: Tensors = {}
        for factor in FACTORS:
            name, initial = f"{self.module_name}.lora_{factor}", getattr(self, factor).detach().clone()
            stored = tensors[name]  # (R', I), (R', 1) or (O, R')
            initial[tuple(slice(size) for size in stored.shape)] = stored.to(initial)
            continued[name] = initial
        return continued

    def file_tensors(self) -> Tensors:
        state, present = super().file_tensors(), self.present()
        if bool(present.all()):
            return state
        a, e, b = (f"{self.module_name}.lora_{factor}" for factor in FACTORS)
        return {a: state[a][present], e: state[e][present], b: state[b][:, present]}

    def present(self) -> Tensor:
        """One bool for each triplet, (R,): whether files contain it. Between two allocations, a triplet that is not
        kept can be non-zero."""
        return self.kept | (self.E.detach()[:, 0] != 0)

    def rank_pattern(self) -> list[bool]:
        """PEFT's rank_pattern of this layer: one bool for each initial rank, which is true if the rank still exists."""
        present = iter(self.present().tolist())
        before = self.settings.kept.get(pattern_key(self.module_name), (True,) * self.settings.init_r)
        return [existed and next(present) for existed in before]


def pattern_key(name: str) -> str:
    """A layer's key in PEFT's rank_pattern."""
    return f"{name}.lora_E"


def _conflicts(settings: AdaloraSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    problems = []
    if settings.target_r >= settings.init_r and not file:
        what = f"target_r {settings.target_r} is not below init_r {settings.init_r}, so no rank could be removed"
        problems.append(
            Conflict("target_r", what, "raise init_r (1.5 times target_r is usual), or use the method lora")
        )
    for target in targets:
        side = min(target.in_features, target.out_features)
        if settings.init_r > side and not file:
            what = f"rank {settings.init_r} is too large for '{target.name}'"
            problems.append(Conflict("init_r", what, f"use at most {side}"))
            break
    keys = {pattern_key(target.name) for target in targets}
    key = "rank_pattern" if file else "kept"
    for name, mask in settings.kept.items():
        if name not in keys:
            problems.append(Conflict(key, f"'{name}' is not an adapted layer", "its keys are MODULE.lora_E"))
        elif len(mask) != settings.init_r:
            problems.append(Conflict(key, f"'{name}' has {len(mask)} entries, but init_r is {settings.init_r}", ""))
    return problems


FIELDS: PeftFields = {
    **same_names(init_r=12, target_r=8, tinit=0, tfinal=0, deltaT=1, beta1=0.85, beta2=0.85, orth_reg_weight=0.5),
    "lora_alpha": ("alpha", 8),
    "lora_dropout": ("dropout", 0.0),
    "rank_pattern": ("kept", {}),
}
FIXED: Fixed = {
    **LORA_FIXED,
    "alpha_pattern": ({}, ANY),  # PEFT reads this and the next two only for LoRA
    "r": (8, ANY),
    "use_rslora": (False, ANY),
    "bias": ("none",),
    "total_step": (None, ANY),  # written by RankBudget
}


class RankBudget(SharedPart[AdaloraSettings]):
    """Removes the least important ranks, compared across all layers.

    Until step `tinit`, the budget is the number of all ranks. From step total - tfinal on, it is the target. Between
    these steps, it is target + (start - target) (1 - (step - tinit) / (total - tfinal - tinit))^3. A removed triplet
    can grow again until the next allocation; after the last allocation it stays zero. With tfinal 0, the last step
    reaches the target.
    Source: Zhang et al. 2023, eq. 12; ties are removed together, as in PEFT's RankAllocator.
    """

    layers: list[Adalora]  # the layers that share the budget
    total_steps: Tensor  # (1,), 0 before the first step; written to PEFT's file

    @classmethod
    def slots(cls, settings: AdaloraSettings, targets: Sequence[Target]) -> Slots:
        return {"total_steps": Slot("total_steps", (1,), kind="resume", dtype=torch.int64)}

    def take_layers(self, layers: Mapping[str, LayerAdapter[Any]]) -> None:
        self.__dict__["layers"] = list(layers.values())  # not submodules

    def after_step(self, step: int, total_steps: int) -> None:
        self.total_steps.fill_(total_steps)
        settings, end = self.settings, total_steps - self.settings.tfinal
        target = settings.target_r * len(self.layers)
        if step < end:
            for layer in self.layers:
                layer.measure()
        if step == min(end, total_steps - 1):
            self._allocate(target)
        elif step > end:
            if sum(int(layer.kept.sum()) for layer in self.layers) > target:  # the last allocation was skipped
                self._allocate(target)
            self._clear()
        elif step > settings.tinit and step % settings.deltaT == 0:
            remaining = 1 - (step - settings.tinit) / (end - settings.tinit)
            start = sum(len(layer.E) for layer in self.layers)
            self._allocate(int((start - target) * remaining**3 + target))

    def _allocate(self, budget: int) -> None:
        """Keep the `budget` triplets with the highest scores. Triplets whose score equals the first score beyond the
        budget are removed too."""
        scores = [layer.scores() for layer in self.layers]
        all_scores = torch.cat([score.to(self.total_steps.device) for score in scores])
        beyond = len(all_scores) - budget
        if beyond > 0:
            threshold = all_scores.sort().values[beyond - 1]  # a GPU has no deterministic kthvalue
            for layer, score in zip(self.layers, scores, strict=True):
                layer.kept.copy_(score > threshold.to(score.device))
        self._clear()

    @torch.no_grad()
    def _clear(self) -> None:
        for layer in self.layers:
            layer.E.masked_fill_(~layer.kept[:, None], 0.0)

    def file_fields(self) -> PeftConfig:
        """PEFT's rank_pattern if a rank was removed, and a total_step with which PEFT accepts the schedule."""
        patterns = {pattern_key(layer.module_name): layer.rank_pattern() for layer in self.layers}
        minimum = self.settings.tinit + self.settings.tfinal + 1
        return {
            "rank_pattern": patterns if not all(map(all, patterns.values())) else None,
            "total_step": max(int(self.total_steps), minimum),
        }


def run_conflicts(settings: AdaloraSettings, steps: int) -> list[Conflict]:
    """A conflict if no step is left between `tinit` and `tfinal` in which ranks could be removed."""
    if settings.tinit < steps - max(settings.tfinal, 1):
        return []
    what = (
        f"tinit {settings.tinit} and tfinal {settings.tfinal} leave no step of this run's {steps} steps to remove ranks"
    )
    return [Conflict("tinit" if settings.tinit else "tfinal", what, "lower them, or train longer")]


METHOD = Method(
    peft=PeftSide("ADALORA", AdaloraSettings, FIELDS, FIXED, remedies=LORA_REMEDIES, refuses_kernel_layers=True),
    layer=Adalora,
    shared=RankBudget,
    unbinding=frozenset({"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "kept"}),
    regrows=True,
    conflicts=_conflicts,
    run_conflicts=run_conflicts,
)
