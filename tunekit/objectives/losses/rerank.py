"""The loss of rerankers, and their evaluation: the documents of each query in the order of their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from tunekit.contracts import ROW_LOSSES, Batch, Loss, LossKind, ModelOutput, Row, Rows, RunView, StepBatches, Sums
from tunekit.machine.placing import to_device
from tunekit.metrics.outputs import ROW_VALUES
from tunekit.model.call import seed_for
from tunekit.objectives.losses.logprobs import logits_at
from tunekit.objectives.losses.query_metrics import order_of, ranking_metrics
from tunekit.objectives.losses.ranking import query_losses, units_of
from tunekit.objectives.rows.candidates import CandidateRows, texts_of
from tunekit.objectives.rows.texts import text_key
from tunekit.recipe.objectives.rerank import CORRELATED, RANKED, RerankSettings

RELEVANT = 0.5  # from this label on, a document is relevant to the query
RANKED_TOGETHER = 10  # documents among which evaluation ranks a query whose row has only relevant documents


class ScoredRow(NamedTuple):
    """A row with the labels and scores of its documents. `keys`: the hash of the query, then of each document."""

    number: int
    keys: list[int]
    labels: list[float]
    scores: list[float]
    loss: float
    units: int


@dataclass(frozen=True)
class RerankLoss(LossKind):
    """The loss of the scores of each query's documents. `measured`: for each evaluation row, the sums of its loss and
    of its metrics; None in training. `measured_ranks`: see LossKind."""

    settings: RerankSettings
    measured: Mapping[int, Sums] | None = field(default=None, compare=False)
    measured_ranks: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict, compare=False)

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        return ("loss", *(CORRELATED if self.is_taught else RANKED[1:]))

    @property
    def is_taught(self) -> bool:
        """Whether labels are only a teacher's scores, so that no document is known to be relevant."""
        return self.settings.loss == "mse"

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return self.measured is None

    def scores(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The score of each document, (N,), at least in float32."""
        if output.logits is None:
            return logits_at(output, batch.targets["last"])[:, 0]
        logits = output.logits[:, 0]
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """The loss of each row, summed over its units, (R,)."""
        labels = to_device(batch.targets["labels"], scores.device)
        return query_losses(self.settings, scores, labels, batch.targets["counts"].tolist())

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add documents of other rows of the step, on all ranks, to each row. A simulated or dry-run step adds copies
        of a row's longest line."""
        if self.measured is not None or not self.settings.draws:
            return step
        rows, count = run.rows, self.settings.num_negatives or 4
        assert isinstance(rows, CandidateRows)
        if run.is_simulated or step.is_dry_run:
            return _changed(rows, step, lambda row: rows.repeated(row, count))
        local = [texts_of(row) for batch in step.batches for row in batch.rows]
        pool = Pool([texts for some in run.gather([local]) for texts in some])
        limit = longest_line(run, rows)

        def extended(row: Row) -> Row:
            seed = seed_for("negatives", step.seed, step.step, row.number, row.occurrence)
            return rows.with_documents(row, pool.draw(texts_of(row), count, seed), limit)

        return _changed(rows, step, extended)

    def units(self, batch: Batch) -> Tensor:
        """The number of documents, pairs of documents or rows whose losses are added, (1,)."""
        return torch.tensor([float(sum(map(self._units, batch.rows)))], dtype=torch.float64)

    def _units(self, row: Row) -> int:
        return units_of(self.settings.loss, row.parts["labels"].tolist())

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum of all rows' losses; `total` has the shape (1,)."""
        return Loss(self.losses(self.scores(output, batch), batch).sum()[None])

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> RerankLoss:
        """A copy of the loss with the sums of each evaluation row. All documents are scored once. Rows with the same
        query are ranked together. If documents of other rows are negatives, they are drawn for each row without
        negatives, independently of the step."""
        kind = run.rows
        assert isinstance(kind, CandidateRows)
        pool = Pool([texts_of(rows[number]) for number in range(len(rows))] if self.settings.draws else [])
        limit = longest_line(run, kind)

        def extended(row: Row) -> Row:
            missing = RANKED_TOGETHER - len(row.parts["counts"]) if self._has_only_relevant(row) else 0
            seed = seed_for("evaluated", row.number)
            return kind.with_documents(row, pool.draw(texts_of(row), missing, seed), limit) if missing > 0 else row

        mine = []
        for batch in batches:
            if self.settings.draws:
                batch = kind.with_rows(batch, map(extended, batch.rows))
            [scores] = run.score([batch], self.scores, lambda batch: batch.targets["counts"].tolist())
            losses, some = self.losses(scores, batch).tolist(), torch.split(scores, batch.targets["counts"].tolist())
            for row, loss, values in zip(batch.rows, losses, some, strict=True):
                keys, labels = row.parts["keys"].tolist(), row.parts["labels"].tolist()
                mine.append(ScoredRow(row.number, keys, labels, values.tolist(), loss, self._units(row)))
        scored = sorted(run.gather(mine), key=lambda row: row.number)
        if self.is_taught:
            return replace(self, measured={row.number: _sums_of(row, []) for row in scored})
        queries = self._by_query(scored)
        metrics = {number: [1.0, *ranking_metrics(*query)] for number, query in queries.items()}
        no_query = [0.0] * len(RANKED)  # the row's query is that of an earlier row
        sums = {row.number: _sums_of(row, metrics.get(row.number, no_query)) for row in scored}
        ranks = [_ranks(*query) for query in queries.values() if any(query[0])]
        return replace(self, measured=sums, measured_ranks={"model": ranks} if ranks else {})

    def _has_only_relevant(self, row: Row) -> bool:
        return all(self.relevant(row.parts["labels"].tolist()))

    def relevant(self, labels: Sequence[float]) -> list[float]:
        """1 for each relevant document, 0 for the others."""
        if self.settings.loss == "margin_mse":
            return [float(place == 0) for place in range(len(labels))]
        return [float(label >= RELEVANT) for label in labels]

    def _by_query(self, rows: Sequence[ScoredRow]) -> dict[int, tuple[list[float], list[float]]]:
        """For each query, by the number of its first row: whether each distinct document is relevant, and its score."""
        first, documents = dict[int, int](), dict[int, dict[int, tuple[float, float]]]()
        for row in rows:
            number = first.setdefault(row.keys[0], row.number)
            known = documents.setdefault(number, {})
            for key, label, score in zip(row.keys[1:], self.relevant(row.labels), row.scores, strict=True):
                known[key] = (max(label, known[key][0]) if key in known else label, score)
        return {
            number: ([label for label, _ in known.values()], [score for _, score in known.values()])
            for number, known in documents.items()
        }

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Sums of the values that `measuring` stored for each row. Without them (in a simulation), no query is ranked:
        the sums of the metrics are 0."""
        if self.measured is None:
            losses = self.losses(self.scores(output, batch), batch)
            empty = (
                {ROW_VALUES: losses.new_zeros(0, 2)} if self.is_taught else dict.fromkeys(RANKED, losses.new_zeros(()))
            )
            return {"loss": losses.sum(), "units": self.units(batch)[0], **empty, ROW_LOSSES: losses}
        each = [self.measured[row.number] for row in batch.rows]
        join = {name: torch.cat if name == ROW_VALUES else _added for name in each[0]}
        summed = {name: join[name]([sums[name] for sums in each]) for name in each[0]}
        return {**summed, ROW_LOSSES: torch.stack([sums["loss"] for sums in each])}


def _added(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


class Pool:
    """The texts of rows from which negatives are drawn. `rows`: the query and the documents of each row."""

    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        self._of_query, self._texts = dict[int, set[int]](), dict[int, str]()
        for query, *documents in rows:
            keys = [text_key(text) for text in documents]
            self._of_query.setdefault(text_key(query), set()).update(keys)
            self._texts |= dict(zip(keys, documents, strict=True))
        self._order = sorted(self._texts)

    def draw(self, texts: Sequence[str], count: int, seed: int) -> list[str]:
        """At most `count` documents that no row with this query has. The same for every order of the rows. `texts`: the
        query and its documents."""
        known = self._of_query.get(text_key(texts[0]), set())
        others = [key for key in self._order if key not in known]
        return [self._texts[key] for key in Random(seed).sample(others, min(count, len(others)))]


def longest_line(run: RunView, rows: CandidateRows) -> int:
    """The maximum number of ids of a line: data.max_length, and at most the positions that the base has learned."""
    base, limits = run.model.base, [rows.options.max_length or 2**31]
    if (learned := base.family.learned_positions(base.net)) is not None:
        limits.append(learned - run.model.virtual_tokens)
    return min(limits)


def _changed(rows: CandidateRows, step: StepBatches, change: Callable[[Row], Row]) -> StepBatches:
    batches = tuple(rows.with_rows(batch, map(change, batch.rows)) for batch in step.batches)
    return replace(step, batches=batches)


def _sums_of(row: ScoredRow, metrics: Sequence[float]) -> Sums:
    """The sums of one row. `metrics`: its values of RANKED; empty if labels are only a teacher's scores."""
    numbers = {"loss": row.loss, "units": float(row.units), **dict(zip(RANKED, metrics, strict=False))}
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    pairs = list(zip(row.scores, row.labels, strict=True))
    return sums if metrics else {**sums, ROW_VALUES: torch.tensor(pairs, dtype=torch.float64)}


def _ranks(relevant: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The ranks of the relevant documents, from 0."""
    return [rank for rank, place in enumerate(order_of(scores).tolist()) if relevant[place]]
