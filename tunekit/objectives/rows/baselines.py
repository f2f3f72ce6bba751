"""The scores of plain baselines on evaluation rows with labels: answers that need no network. Words are token ids."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tunekit.basics import JsonObject
from tunekit.contracts import Array, Objective, Row, RowKind, Rows
from tunekit.metrics.classes import f1
from tunekit.objectives.rows.label_kinds import LabelSets, Quantities

MOST_ROWS, MOST_LABELS = 2000, 150  # for a (logistic) regression; with more labels it takes too long
STEPS, PENALTY = 100, 0.1  # of the accelerated gradients; the L2 penalty of all rows together


def plain_scores(objective: Objective, train: Rows, held: Rows | None) -> JsonObject | None:
    """The scores of plain baselines, under the name of the evaluation's `metric`. None without evaluation rows or
    labels.

    `majority`: always the most frequent label, or the mean of the numbers. `words`: (logistic) regression on TF-IDF
    of the tokens; for tags, the most frequent tag of each word. `label_rows`: the training rows of each label.
    """
    kind = objective.rows
    if held is None or not len(held) or not len(train) or not hasattr(kind, "labels"):
        return None
    taught, evaluated = _some(train), _some(held)
    if isinstance(kind.labels, Quantities):
        return _number_scores(kind, taught, evaluated)
    counts = Counter(kind.labels.head_name(label) for at in range(len(train)) for label in kind.labels_of(train[at]))
    facts: JsonObject = {"metric": objective.loss.metrics[1], "label_rows": dict(counts)}
    several = isinstance(kind.labels, LabelSets)
    truth = [[kind.labels.head_name(label) for label in kind.labels_of(row)] for row in evaluated]
    usual = counts.most_common(1)[0][0] if counts else ""
    right, true = sum(each.count(usual) for each in truth), sum(map(len, truth))
    facts["majority"] = f1(right, len(evaluated), true) if several else right / max(true, 1)
    if "firsts" in kind.layout.parts:
        return {**facts, "words": _tag_score(kind, taught, evaluated)}
    inputs = _features(kind, taught, evaluated) if len(counts) <= MOST_LABELS else None
    if inputs is None:
        return facts
    targets = kind.labels.targets(map(_text, taught))
    if not several:
        targets = torch.nn.functional.one_hot(targets, len(kind.labels.names)).float()  # (N, C)
    weights = _fitted(inputs[0], targets, torch.sigmoid if several else lambda scores: scores.softmax(dim=-1))
    scores, answers = inputs[1] @ weights, kind.labels.targets(map(_text, evaluated))  # (M, C); (M, C) or (M,)
    if not several:
        return {**facts, "words": float((scores.argmax(dim=-1) == answers).float().mean())}
    chosen = scores > 0
    return {**facts, "words": f1(float((chosen & (answers > 0)).sum()), float(chosen.sum()), float(answers.sum()))}


def _number_scores(kind: RowKind, taught: Sequence[Row], evaluated: Sequence[Row]) -> JsonObject:
    """The mean squared errors of the mean, and of a regression on TF-IDF."""
    targets, answers = (kind.labels.targets(map(_text, rows)) for rows in (taught, evaluated))  # (N, C), (M, C)
    mean, facts = targets.mean(dim=0), dict[str, object]()
    inputs = _features(kind, taught, evaluated)
    if inputs is not None:
        guessed = inputs[1] @ _fitted(inputs[0], targets - mean, lambda scores: scores) + mean
        facts["words"] = float((guessed - answers).square().mean())
    return {"metric": "loss", "majority": float((mean - answers).square().mean()), **facts}


def _tag_score(kind: RowKind, taught: Sequence[Row], evaluated: Sequence[Row]) -> float:
    """The share of words that have the tag that is the most frequent one of this word in the training rows."""
    tags_of: defaultdict[bytes, Counter[str]] = defaultdict(Counter)
    for row in taught:
        for word, tag in zip(_words(row), kind.labels_of(row), strict=True):
            tags_of[word][tag] += 1
    usual = sum(tags_of.values(), Counter[str]()).most_common(1)[0][0]
    right = [
        (tags_of[word].most_common(1)[0][0] if word in tags_of else usual) == tag
        for row in evaluated
        for word, tag in zip(_words(row), kind.labels_of(row), strict=True)
    ]
    return sum(right) / max(len(right), 1)


def _words(row: Row) -> list[bytes]:
    """The ids of each word. The last word also has the special tokens at the end."""
    return [ids.tobytes() for ids in np.split(row.parts["ids"], row.parts["firsts"][1:])]


def _some(rows: Rows) -> list[Row]:
    """At most MOST_ROWS rows, at equal distances."""
    return [rows[int(at)] for at in np.unique(np.linspace(0, len(rows) - 1, MOST_ROWS).round())]


def _text(row: Row) -> str:
    return row.parts["label"].tobytes().decode()


def _features(kind: RowKind, taught: Sequence[Row], evaluated: Sequence[Row]) -> tuple[Tensor, Tensor] | None:
    """Sparse TF-IDF of the tokens, (N, V + 1) and (M, V + 1), with the frequencies of the training rows. Rows have the
    length 1; then comes a column of ones. None for rows without text."""
    if not kind.layout.token_parts:
        return None
    ids = [[kind.text_ids(row) for row in rows] for rows in (taught, evaluated)]
    known = np.unique(np.concatenate(ids[0]))  # (V,)
    counted = [_counted(each, known) for each in ids]
    rarity = np.log((1 + len(taught)) / (1 + np.bincount(counted[0][1], minlength=len(known)))) + 1  # (V,)
    return _table(len(taught), *counted[0], rarity), _table(len(evaluated), *counted[1], rarity)


def _counted(ids: Sequence[Array], known: Array) -> tuple[Array, Array, Array]:
    """The row, the place in `known` (V,), and the count of each known token."""
    lines, tokens = np.repeat(np.arange(len(ids)), list(map(len, ids))), np.concatenate(ids)
    places = np.searchsorted(known, tokens).clip(max=len(known) - 1)
    there = known[places] == tokens
    cells, counts = np.unique(lines[there] * len(known) + places[there], return_counts=True)
    return cells // len(known), cells % len(known), counts


def _table(rows: int, lines: Array, columns: Array, counts: Array, rarity: Array) -> Tensor:
    values, all_rows = counts * rarity[columns], np.arange(rows)
    values /= np.sqrt(np.bincount(lines, values**2, rows))[lines]
    places = np.stack([np.append(lines, all_rows), np.append(columns, np.full(rows, len(rarity)))])
    filled = torch.from_numpy(np.append(values, np.ones(rows))).float()
    return torch.sparse_coo_tensor(
        torch.from_numpy(places), filled, (rows, len(rarity) + 1), check_invariants=False
    ).coalesce()


def _fitted(inputs: Tensor, targets: Tensor, probabilities: Callable[[Tensor], Tensor]) -> Tensor:
    """The weights (V + 1, C) of a (logistic) regression, by accelerated gradients. No row is longer than the root of 2,
    so that a step of 1/2 converges.

    Source: Nesterov 1983.
    """
    turned, rows = inputs.t().coalesce(), inputs.shape[0]
    weights = ahead = torch.zeros(inputs.shape[1], targets.shape[1])
    for step in range(STEPS):
        gradient = (turned @ (probabilities(inputs @ ahead) - targets) + PENALTY * ahead) / rows
        before, weights = weights, ahead - gradient / 2
        ahead = weights + step / (step + 3) * (weights - before)
    return weights
