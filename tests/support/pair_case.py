"""Objectives over pairs given log-probabilities instead of a model, and the same in the shapes that trl has them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.data_case import objective_of
from tunekit.contracts import Batch, Gather, Row, Window
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.objectives.dpo import DpoSettings

DPO: Any = objective_of(DpoSettings())
PAIRS = [(5, 9, 3), (7, 3, 2), (12, 4, 4), (6, 6, 1), (3, 11, 5)]  # answers' tokens, and the prompt's


def make_rows() -> list[Row]:
    rows = []
    for number, (chosen, rejected, prompt) in enumerate(PAIRS):
        sides = [
            (np.arange(prompt + size, dtype=np.int32) + 10 * number, np.arange(prompt + size) >= prompt)
            for size in (chosen, rejected)
        ]
        rows.append(DPO.make_row(sides, {}, f"d:{number}", number))
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
        """The step's loss and what it logs, its window cut into micro-batches of so many pairs."""
        objective: Any = objective_of(settings)
        objective.log_probabilities = self._of_batch
        starts = np.cumsum([0, *sizes]).tolist()
        batches = [objective.collate([[row] for row in self.rows[start:stop]]) for start, stop in pairwise(starts)]
        model = SimpleNamespace(scored=self._scored)
        window = objective.prepare(model, Window(0, 0.0, tuple(range(len(batches))), tuple(batches)))
        losses = [objective.loss("policy", batch) for batch in window.batches]
        units = sum(float(objective.units(batch)) for batch in window.batches)
        logged = {name: sum(float(loss.metrics[name]) for loss in losses) / units for name in objective.logged}
        sums = [objective.sums("policy", batch) for batch in window.batches]
        total = torch.stack([loss.total for loss in losses]).sum()
        torch.testing.assert_close(sum(each["loss"] for each in sums).float(), total.detach())
        return total / units, logged, objective

    def prepared(self, settings: ObjectiveSettings, rows: Sequence[Row], gather: Gather = list) -> list[float]:
        """What each of these rows is compared with, prepared as a rank's share of a step."""
        objective: Any = objective_of(settings)
        objective.log_probabilities = self._of_batch
        batches = tuple(objective.collate([[row]]) for row in rows)
        window = Window(0, 0.0, tuple(range(len(rows))), batches)
        window = objective.prepare(SimpleNamespace(scored=self._scored), window, gather)
        return [float(row.parts["matched"]) for batch in window.batches for row in batch.rows]

    def _scored(
        self, batches: Sequence[Batch], score: Callable[..., Tensor], *, bypassed: bool = False
    ) -> list[Tensor]:
        return [score("reference" if bypassed else "policy", batch).detach() for batch in batches]

    def _of_batch(self, output: str, batch: Batch) -> Tensor:
        """(N,) of the batch's tokens, found by the rows' numbers."""
        width = batch.inputs["input_ids"].shape[1]
        lines, columns = batch.targets["index"] // width, batch.targets["index"] % width
        numbers = [row.number for row in batch.rows]
        place = torch.tensor([*numbers, *(number + len(self.rows) for number in numbers)])
        table = self.policy if output == "policy" else self.reference
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
