"""Objectives over pairs given log-probabilities instead of a model, and the same in the shapes that trl has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Barrier
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tests.support.data_case import objective_of
from tunekit.contracts import Batch, Gather, Row, RowKind, StepBatches
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.objectives.dpo import DpoSettings
from tunekit.tuned.model import ModelRun

DPO = objective_of(DpoSettings())
PAIRS = [(5, 9, 3), (7, 3, 2), (12, 4, 4), (6, 6, 1), (3, 11, 5)]  # answers' tokens, and the prompt's


class Output(NamedTuple):
    """Of a batch by the policy or the reference, instead of hidden states."""

    name: str
    batch: Batch


@contextmanager
def log_probabilities_of(of_batch: Callable[[str, Batch], Tensor]) -> Iterator[None]:
    """A block in which the losses of answers read these log-probabilities of an Output."""

    def given(output: Output, index: Tensor, targets: Tensor, entropies: Tensor | None) -> Tensor:
        return of_batch(*output)

    with patch("tunekit.objectives.losses.answers.log_probabilities", given):
        yield


def run_of(rows: RowKind, gather: Gather = list, positions: int | None = None) -> ModelRun:
    """A run whose model gives Outputs. `positions`: those that the model has learned."""

    scored = ["policy"]  # or reference

    @contextmanager
    def scoring(*, reference: bool) -> Iterator[None]:
        scored[:] = ["reference" if reference else "policy"]
        yield

    def scores(batches: Sequence[Batch], read: Any) -> list[Tensor]:
        return [read(Output(scored[0], batch), batch).detach() for batch in batches]

    base = SimpleNamespace(net=None, family=SimpleNamespace(learned_positions=lambda net: positions))
    more = {"base": base, "virtual_tokens": 0, "reference_scores": {}, "repeats_rows": False, "companions": {}}
    model: Any = SimpleNamespace(scoring=scoring, scores=scores, slots=None, device=torch.device("cpu"), **more)
    return ModelRun(model, rows, gather)


def parts_of(*sides: tuple[str, Any, Any], **further: Any) -> dict[str, Any]:
    """Parts of a row: each side's name, ids and marks, and further values."""
    marked = {f"{name}_trained": marks for name, _, marks in sides}
    return {name: ids for name, ids, _ in sides} | marked | further


def make_rows() -> list[Row]:
    rows = []
    for number, (chosen, rejected, prompt) in enumerate(PAIRS):
        sides = [
            (name, np.arange(prompt + size, dtype=np.int32) + 10 * number, np.arange(prompt + size) >= prompt)
            for name, size in (("chosen", chosen), ("rejected", rejected))
        ]
        rows.append(DPO.rows.make_row(parts_of(*sides), f"d:{number}", number))
    return rows


def tokens_of(rows: Sequence[Row]) -> list[int]:
    return [len(row.parts[side]) for side in ("chosen", "rejected") for row in rows]


@dataclass
class Told:
    """Log-probabilities of every token of the chosen sequences, then of the rejected ones: (2 P, T - 1) each; column t
    is that of token t + 1."""

    rows: list[Row]
    policy: Tensor
    reference: Tensor

    @classmethod
    def drawn(cls, seed: int = 0) -> Told:
        """Also 0 wherever trl masks: in the prompt and the padding."""
        rows, generator = make_rows(), torch.Generator().manual_seed(seed)
        shape = (2 * len(rows), max(tokens_of(rows)) - 1)
        drawn = [-torch.rand(shape, generator=generator) * 3 - 0.01 for _ in range(2)]
        return cls(rows, drawn[0].requires_grad_(), drawn[1])

    def trained(self) -> Tensor:
        """(2 P, T) of every token whether it belongs to an answer."""
        mask = torch.zeros(len(self.policy), self.policy.shape[1] + 1, dtype=torch.int64)
        sides = [row.parts[f"{side}_trained"] for side in ("chosen", "rejected") for row in self.rows]
        for line, marks in enumerate(sides):
            mask[line, : len(marks)] = torch.from_numpy(marks)
        return mask

    def real(self) -> Tensor:
        """(2 P, T) of every token whether it is no padding."""
        lengths = torch.tensor(tokens_of(self.rows))
        return (torch.arange(self.policy.shape[1] + 1)[None] < lengths[:, None]).long()

    def ours(self, settings: ObjectiveSettings, sizes: Sequence[int]) -> tuple[Tensor, dict[str, float], Any]:
        """The step's loss and what it logs, its step cut into micro-batches of so many pairs."""
        objective = objective_of(settings)
        starts = np.cumsum([0, *sizes]).tolist()
        batches = [objective.rows.collate([[row] for row in self.rows[start:stop]]) for start, stop in pairwise(starts)]
        with log_probabilities_of(self._of_batch):
            step = StepBatches(0, 0.0, tuple(range(len(batches))), tuple(batches))
            step = objective.prepare_step(run_of(objective.rows), step)
            outputs: Any = [(Output("policy", batch), batch) for batch in step.batches]
            losses = [objective.loss.loss(*pair) for pair in outputs]
            sums = [objective.loss.sums(*pair) for pair in outputs]
        units = sum(float(objective.loss.units(batch)) for batch in step.batches)
        logged = {name: sum(float(loss.metrics[name]) for loss in losses) / units for name in objective.loss.logged}
        total = torch.stack([loss.total for loss in losses]).sum()
        torch.testing.assert_close(sum(each["loss"] for each in sums).float(), total.detach())
        return total / units, logged, objective

    def prepared(self, settings: ObjectiveSettings, rows: Sequence[Row], gather: Gather = list) -> list[float]:
        """What each of these rows is compared with, prepared as a rank's share of a step."""
        objective = objective_of(settings)
        batches = tuple(objective.rows.collate([[row]]) for row in rows)
        step = StepBatches(0, 0.0, tuple(range(len(rows))), batches)
        with log_probabilities_of(self._of_batch):
            step = objective.prepare_step(run_of(objective.rows, gather), step)
        return [float(row.parts["matched"]) for batch in step.batches for row in batch.rows]

    def _of_batch(self, name: str, batch: Batch) -> Tensor:
        """(N,) of the batch's tokens, found by the rows' numbers."""
        width = batch.inputs["input_ids"].shape[1]
        lines, columns = batch.targets["index"] // width, batch.targets["index"] % width
        numbers = [row.number for row in batch.rows]
        place = torch.tensor([*numbers, *(number + len(self.rows) for number in numbers)])
        table = self.policy if name == "policy" else self.reference
        return table[place[lines], columns]


class Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def trainer_of(**attributes: Any) -> Any:
    """Stands for a trainer of trl in a call of one of its functions."""
    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(accelerator=Alone(), aux_loss_enabled=False, _metrics=metrics, **attributes)


def on_two_ranks(work: Callable[[int, Gather], Any]) -> list[Any]:
    """What each of two ranks makes of its share, `work(rank, gather)`, in a thread each; what they gather meets."""
    barrier, said = Barrier(2, timeout=60), dict[int, list[Any]]()

    def rank(number: int) -> Any:
        def gather(mine: list[Any]) -> list[Any]:
            said[number] = mine
            barrier.wait()
            both = said[0] + said[1]
            barrier.wait()
            return both

        return work(number, gather)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))
