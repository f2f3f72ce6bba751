"""Ranks training rows by what a finished run shows about them: four lists, and the order in which rows are left out.

Sources: dataset cartography, Swayamdipta et al. 2020; area under the margin, Pleiss et al. 2020; agreement of nearest
rows in a hidden space, Bahri et al. 2020 (Deep k-NN for noisy labels).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
RowNumbers = NDArray[np.int64]
NEIGHBOURS = 10
BLOCK_ROWS = 1024  # rows whose similarities to all rows are in memory at a time
ALIKE = 0.95  # minimum cosine of two rows that teach the same
SUSPICIOUS = 0.1  # the share of rows in the list of likely wrong rows, if rows have no classes
KNOWN = 0.1  # a row teaches nothing if its loss is below this share of the rows' median loss before training
SAME_LOSS = 1e-6  # relative difference of losses that are equal up to rounding
WRONG, AGAINST, NOTHING, DUPLICATES = "likely wrong", "works against the evaluation", "teaches nothing", "duplicates"


@dataclass(frozen=True)
class Neighbours:
    """The nearest other rows of each row, nearest first. Shapes: (rows, K) each; K may be 0."""

    rows: RowNumbers
    similarity: Numbers


@dataclass(frozen=True)
class RowFacts:
    """What a run shows about each row. `before` (rows,): losses before training; empty if unknown. `losses` (states,
    rows), `margins` (states, rows): of the states, in order of their steps; no margins if the loss has none. `after`:
    the index of the exported state. `disagreement` (rows,): see `contradicted`; empty without hidden states. `near`:
    the nearest rows by what they teach. `labels`: of each row; empty without classes. `influence` (rows,): on the
    evaluation rows; empty if it was not measured."""

    before: Numbers
    losses: Numbers
    margins: Numbers
    after: int
    disagreement: Numbers
    near: Neighbours
    labels: Sequence[str] = ()
    influence: Numbers = field(default_factory=lambda: np.zeros(0))

    @property
    def mean(self) -> Numbers:
        """The mean loss over the states, (rows,)."""
        return np.asarray(self.losses.mean(axis=0))

    @property
    def spread(self) -> Numbers:
        """The standard deviation of the loss over the states, (rows,)."""
        return np.asarray(self.losses.std(axis=0))

    @property
    def margin(self) -> Numbers:
        """The area under the margin, (rows,): its mean over the states; empty if the loss has no margins."""
        return np.asarray(self.margins.mean(axis=0)) if len(self.margins) else np.zeros(0)

    def wrongness(self) -> Numbers:
        """How likely each row is wrong, between 0 and 1, (rows,): the mean of its ranks by loss and by disagreement.

        With classes, the mean loss of the row's label is subtracted from the loss. The margin and the spread are left
        out: in the benchmark, they added nothing.
        """
        parts = [self.mean - class_means(self.mean, self.labels), self.disagreement]
        return np.asarray(np.mean([ranks(each) for each in parts if len(each)], axis=0))


def class_means(losses: Numbers, labels: Sequence[str]) -> Numbers:
    """The mean loss of the rows with the same label, (rows,); 0 without classes."""
    if not labels:
        return np.zeros_like(losses)
    _, classes, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return np.asarray((np.bincount(classes, weights=losses) / counts)[classes])


def contradicted(losses: Numbers, near: Neighbours, labels: Sequence[str]) -> Numbers:
    """How much the nearest rows contradict each row, (rows,). With classes: the share of the nearest rows that have
    different labels, weighted by similarity. Otherwise: the row's loss minus the mean loss of its nearest rows. Empty
    if there are no neighbours."""
    if not near.rows.shape[1]:
        return np.zeros(0)
    if not labels:
        return np.asarray(losses - losses[near.rows].mean(axis=1))
    classes = np.unique(np.asarray(labels), return_inverse=True)[1]  # (rows,)
    weights = np.clip(near.similarity, 1e-6, None)
    differ = classes[near.rows] != classes[:, None]  # (rows, K)
    return np.asarray((weights * differ).sum(axis=1) / weights.sum(axis=1))


def ranks(values: Numbers) -> Numbers:
    """The rank of each value among all values, divided by their number: 0 for the lowest. Equal values have their mean
    rank. Shapes: (rows,) -> (rows,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse.reshape(-1)] / max(len(values), 1))


def rank_correlation(one: Numbers, other: Numbers) -> float:
    """Spearman's rank correlation; 0 if all values of one side are equal."""
    first, second = ranks(one), ranks(other)
    if not first.std() or not second.std():
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def nearest(vectors: NDArray[np.float32], count: int = NEIGHBOURS, *, centred: bool = True) -> Neighbours:
    """The nearest rows by the cosine of their vectors. `centred`: after the mean vector is subtracted. Shapes:
    vectors (rows, D)."""
    total = len(vectors)
    count = min(count, total - 1)
    if count < 1 or not vectors.size:
        return Neighbours(np.zeros((total, 0), np.int64), np.zeros((total, 0)))
    moved = vectors - vectors.mean(axis=0) if centred else vectors
    unit = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    rows, similarity = np.empty((total, count), np.int64), np.empty((total, count))
    for start in range(0, total, BLOCK_ROWS):
        part = unit[start : start + BLOCK_ROWS] @ unit.T  # (b, rows)
        part[np.arange(len(part)), start + np.arange(len(part))] = -np.inf
        best = np.argpartition(-part, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(part, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        rows[start : start + len(part)] = np.take_along_axis(best, order, axis=1)
        similarity[start : start + len(part)] = np.take_along_axis(values, order, axis=1)
    return Neighbours(rows, similarity)


def has_classes(facts: RowFacts) -> bool:
    """Whether a negative margin shows that the model prefers a different label. The worst token of nearly every text
    has a negative margin."""
    return bool(facts.labels) and len(facts.margin) > 0


def row_lists(facts: RowFacts) -> dict[str, RowNumbers]:
    """The row numbers of each list, worst first. A list that cannot be made is absent."""
    wrong = facts.wrongness()
    suspicious = facts.margin < 0 if has_classes(facts) else wrong > np.quantile(wrong, 1 - SUSPICIOUS)  # (rows,)
    lists = {WRONG: _sorted(-wrong, suspicious)}
    if len(facts.influence):
        lists[AGAINST] = _sorted(facts.influence, facts.influence < 0)
    # the losses of pairs are equal before training if they compare with the model at step 0
    if len(facts.before) and float(np.ptp(facts.before)) > SAME_LOSS * float(np.abs(facts.before).max()):
        limit = KNOWN * float(np.median(facts.before))
        highest = np.maximum(facts.losses.max(axis=0), facts.before)
        lists[NOTHING] = _sorted(highest, highest < limit)
    if facts.near.rows.shape[1]:
        lists[DUPLICATES] = _duplicates(facts)
    return lists


def leave_out(facts: RowFacts, lists: dict[str, RowNumbers]) -> RowNumbers:
    """All rows in the order in which they are left out: the rows of the lists, then the most likely wrong rows."""
    others = np.argsort(-facts.wrongness(), kind="stable")
    ordered = np.concatenate(
        [*(lists[name] for name in (WRONG, AGAINST, DUPLICATES, NOTHING) if name in lists), others]
    )
    return ordered[np.sort(np.unique(ordered, return_index=True)[1])].astype(np.int64)


def _sorted(keys: Numbers, chosen: NDArray[np.bool_]) -> RowNumbers:
    """The chosen rows, lowest key first."""
    order = np.argsort(keys, kind="stable")
    return order[chosen[order]].astype(np.int64)


def earlier(facts: RowFacts) -> tuple[RowNumbers, Numbers]:
    """The nearest of the earlier rows with the same label, and its similarity, (rows,) each; -inf if there is none."""
    rows, similarity = facts.near.rows, facts.near.similarity
    same = rows < np.arange(len(rows))[:, None]
    if facts.labels:
        labels = np.asarray(facts.labels)
        same &= labels[rows] == labels[:, None]
    values = np.where(same, similarity, -np.inf)
    best = values.argmax(axis=1)[:, None]
    return np.take_along_axis(rows, best, axis=1)[:, 0], np.take_along_axis(values, best, axis=1)[:, 0]


def _duplicates(facts: RowFacts) -> RowNumbers:
    """The rows that teach the same as an earlier row: very similar, with the same label. The most similar first."""
    closest = earlier(facts)[1]
    return _sorted(-closest, closest >= ALIKE)
