"""The data sets of `scripts/bench/run defaults`, made from TUNEKIT_SHARED/data, and their plain baselines in numpy.

Rows have their real lengths. The order of the hashes of the rows decides which rows are for training, for the choice of
a setting (validation), and for the result (test). Texts of validation and test rows are in no training row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
Pools = tuple[list[Row], list[Row]]  # rows to train on, and rows to choose and to measure on
Matrix = NDArray[np.float64]
VALIDATION, TEST = 200, 400  # the maximum numbers of rows
ORDERS = Path(__file__).resolve().parents[3] / "recipes" / "data" / "orders"
DRINKS = "latte lattes mocha mochas cortado cappuccino macchiato macchiatos americano espresso tea chai coffee"
OPTIONS = (
    "milk oat almond soy coconut whole skim non-fat 2% decaf vanilla caramel hazelnut chocolate iced double single"
)
ITEMS = {*DRINKS.split(), *OPTIONS.split()}  # words of which a tagged item consists
LORA = {"method": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"}
ENCODER_RATES, DECODER_RATES = (1e-4, 3e-4, 1e-3, 3e-3), (5e-5, 1.5e-4, 4e-4, 1e-3)


def by_hash(rows: Sequence[Row], draw: int = 0) -> list[Row]:
    """The distinct rows, in the order of their hashes. Each draw has its own order."""
    texts = {json.dumps(row, sort_keys=True): row for row in rows}
    return [texts[text] for text in sorted(texts, key=lambda text: hashlib.sha256(f"{draw} {text}".encode()).digest())]


def banking(data: Path, first: int, count: int) -> Pools:
    """Texts of `count` intents of Banking77, from the first-most frequent one on."""
    files = []
    for name in ("train", "test"):
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            files.append([(" ".join(row["text"].split()), row["category"]) for row in csv.DictReader(file)])
    frequent = [name for name, _ in Counter(label for _, label in files[0]).most_common()][first : first + count]
    train, held = ([{"text": text, "label": label} for text, label in rows if label in frequent] for rows in files)
    return train, held


def sentiment(data: Path, label: str) -> Pools:
    """Sentences of reviews. `label`: label (two sentiments) or source (three sites)."""
    lines = ((data / "sentiment_2way" / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "test"))
    train, held = ([{"text": row["text"], "label": row[label]} for row in map(json.loads, each)] for each in lines)
    return train, held


def overlap(first: str, second: str) -> float:
    """The number of words in both texts, divided by the number of words in either text."""
    a, b = ({word.strip(".,?!'\"").lower() for word in text.split()} for text in (first, second))
    return len(a & b) / len(a | b)


def pairs(data: Path, measured: str) -> Pools:
    """Pairs of Banking77's texts, half of them of one intent. `measured`: same (one intent?) or overlap (a number)."""
    pools = []
    for rows in banking(data, 0, 20):
        texts: dict[str, list[str]] = {}
        for row in by_hash(rows):
            texts.setdefault(row["label"], []).append(row["text"])
        names, made = sorted(texts), []
        for number, name in enumerate(names):
            other = texts[names[(number + 7) % len(names)]]
            for at in range(0, len(texts[name]) - 1, 2):
                first, *partners = texts[name][at], texts[name][at + 1], other[at % len(other)]
                for second, label in zip(partners, ("same", "other"), strict=True):
                    value: str | float = label if measured == "same" else round(overlap(first, second), 4)
                    made.append({"sentence1": first, "sentence2": second, "label": value})
        pools.append(made)
    return pools[0], pools[1]


def several(data: Path) -> Pools:
    """Two texts of different intents, joined. The labels are both intents."""
    pools = []
    for rows in banking(data, 0, 12):
        mixed = by_hash(rows)
        half = len(mixed) // 2
        joined = [
            pair for pair in zip(mixed[:half], mixed[half:], strict=False) if pair[0]["label"] != pair[1]["label"]
        ]
        pools.append([
            {"text": f"{a['text']} {b['text']}", "label": sorted((a["label"], b["label"]))} for a, b in joined
        ])  # fmt: skip
    return pools[0], pools[1]


def coffee(data: Path) -> list[tuple[str, str]]:
    """Turns of orders in a coffee shop: what the customer says, and the answer. Each customer's words occur once."""
    lines = (data / "chat_multiturn" / "taskmaster4_coffee.jsonl").read_text("utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    both = [(one, two) for each in turns for one, two in pairwise(each) if one["role"] == "user"]
    return list({one["content"]: (one["content"], two["content"]) for one, two in both}.values())


def parted(rows: Sequence[Row], share: float = 0.6) -> Pools:
    """The first rows by hash for training, the others to choose and to measure."""
    mixed = by_hash(rows)
    return mixed[: round(share * len(mixed))], mixed[round(share * len(mixed)) :]


def tags(data: Path) -> Pools:
    """The items that a customer names, each with the tags B-ITEM, I-ITEM ..."""
    rows = []
    for text, _ in coffee(data):
        inside = [word.strip(".,?!").lower() in ITEMS for word in text.split()]
        before = [False, *inside[:-1]]
        named = ["O" if not item else f"{'I' if more else 'B'}-ITEM" for item, more in zip(inside, before, strict=True)]
        rows.append({"words": text.split(), "tags": named})
    return parted(rows)


def preferences(data: Path) -> Pools:
    """What a customer says, with its answer and the answer to another customer."""
    turns = coffee(data)
    wrong = [turns[(number + len(turns) // 2) % len(turns)][1] for number in range(len(turns))]
    rows = [{"prompt": one, "chosen": two, "rejected": no} for (one, two), no in zip(turns, wrong, strict=True)]
    return parted([row for row in rows if row["chosen"] != row["rejected"]])


def completions(data: Path) -> Pools:
    """Sentiments as answers from a list."""
    train, held = (
        [{"prompt": f"{row['text']}\nSentiment:", "completion": f" {row['label']}"} for row in rows]
        for rows in sentiment(data, "label")
    )
    return train, held


def sounds(data: Path) -> Pools:
    """Words and their pronunciation."""
    lines = ((data / "seq2seq_g2p" / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "test"))
    train, held = (
        [{"prompt": f"{row['input']} sounds", "completion": f" {row['target']}"} for row in map(json.loads, each)]
        for each in lines
    )
    return train, held


def orders(data: Path) -> Pools:
    """The rows of the quickstart."""
    lines = ((ORDERS / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "test"))
    train, held = ([json.loads(line) for line in each] for each in lines)
    return train, held


@dataclass(frozen=True)
class DataSet:
    """A data set of the benchmark. `rows`: a function of the data folder; `train`: the number of training rows.

    `kind`: how a row is scored: label, labels, number, tags, text (the whole answer), choice, preference.
    `kept_apart`: whether no rule may be chosen with it; `draws`: whether each seed has other training rows; `has_init`:
    whether init writes this objective; `widened`: whether random settings are tried too; `has_head`: whether rates of
    the head are tried.
    """

    rows: Callable[[Path], Pools]
    train: int
    kind: str = "label"
    objective: Mapping[str, Any] = field(default_factory=lambda: {"method": "classify"})
    base: str = "encoder"
    adapter: Mapping[str, Any] = field(default_factory=lambda: LORA)
    rates: Sequence[float] = ENCODER_RATES
    test: int = TEST
    kept_apart: bool = False
    draws: bool = False
    has_init: bool = True
    widened: bool = False
    has_head: bool = False

    def parts(self, data: Path, draw: int = 0) -> dict[str, list[Row]]:
        """The rows for training, validation and test."""
        pool, held = self.rows(data)
        held = by_hash(held)
        count = min(VALIDATION, self.test, len(held) // 3)
        validation, test = held[:count], held[count : count + self.test]
        known = {question(row) for row in held}
        train = [row for row in by_hash(pool, draw if self.draws else 0) if question(row) not in known][: self.train]
        return {"train": train, "validation": validation, "test": test}


def decoder(rows: Callable[[Path], Pools], train: int, kind: str = "text", objective: str = "sft") -> DataSet:
    """A set for the decoder, with few test rows, because answers are generated."""
    test = 60 if kind == "text" else 150
    return DataSet(rows, train, kind, {"method": objective}, "decoder", rates=DECODER_RATES, test=test)


IA3, PROMPT = {"method": "ia3", "target_modules": "all-linear"}, {"method": "prompt", "num_virtual_tokens": 20}
REGRESSION, SEVERAL = (
    {"method": "classify", "problem_type": f"{name}"} for name in ("regression", "multi_label_classification")
)
SETS: dict[str, DataSet] = {
    "binary-50": DataSet(lambda data: sentiment(data, "label"), 50, draws=True, widened=True),
    "binary-200": DataSet(lambda data: sentiment(data, "label"), 200),
    "binary-2000": DataSet(lambda data: sentiment(data, "label"), 2000),
    "intents12-200": DataSet(lambda data: banking(data, 0, 12), 200, has_head=True),
    "intents12-600": DataSet(lambda data: banking(data, 0, 12), 600, widened=True, has_head=True),
    "intents77-600": DataSet(lambda data: banking(data, 0, 77), 600),
    "intents77-3000": DataSet(lambda data: banking(data, 0, 77), 3000, has_head=True),
    "source-300": DataSet(lambda data: sentiment(data, "source"), 300, kept_apart=True),
    "intents20-400": DataSet(lambda data: banking(data, 12, 20), 400, kept_apart=True),
    "pairs-600": DataSet(lambda data: pairs(data, "same"), 600),
    "overlap-600": DataSet(lambda data: pairs(data, "overlap"), 600, "number", REGRESSION),
    "several-600": DataSet(several, 600, "labels", SEVERAL),
    "tags-220": DataSet(tags, 220, "tags", {"method": "token_classify"}, has_head=True),
    "binary-200-ia3": DataSet(lambda data: sentiment(data, "label"), 200, adapter=IA3, rates=(1e-3, 5e-3, 1e-2, 3e-2)),
    "intents12-600-ia3": DataSet(lambda data: banking(data, 0, 12), 600, adapter=IA3, rates=(1e-3, 5e-3, 1e-2, 3e-2)),
    "binary-200-prompt": DataSet(
        lambda data: sentiment(data, "label"), 200, adapter=PROMPT, rates=(1e-3, 1e-2, 3e-2, 1e-1)
    ),
    "intents12-600-prompt": DataSet(
        lambda data: banking(data, 0, 12), 600, adapter=PROMPT, rates=(1e-3, 1e-2, 3e-2, 1e-1)
    ),
    "choices-50": decoder(completions, 50, "choice"),
    "sounds-600": decoder(sounds, 600),
    "orders-240": decoder(orders, 240),
    "dpo-220": decoder(preferences, 220, "preference", "dpo"),
    "reward-220": replace(decoder(preferences, 220, "preference", "reward"), has_init=False),  # init proposes dpo
}


def question(row: Row) -> str:
    """The text of a row from which its answer is predicted."""
    if "messages" in row:
        return str(next(each["content"] for each in row["messages"] if each["role"] == "user"))
    if "words" in row:
        return " ".join(row["words"])
    return str(row.get("text") or row.get("prompt") or f"{row['sentence1']} || {row['sentence2']}")


def right_answer(row: Row) -> Any:
    """The answer that is right."""
    if "messages" in row:
        return row["messages"][-1]["content"].strip()
    if "tags" in row:
        return " ".join(row["tags"])
    return row["label"] if "label" in row else row["completion"].strip()


def score(kind: str, answers: Sequence[Any], rows: Sequence[Row]) -> list[float]:
    """The score of each row's answer, at most 1. Their mean is the accuracy; of several labels, the mean F1 of a row;
    of numbers, the share of the variance that is explained. Tags of a row are right or wrong together."""
    truth = [right_answer(row) for row in rows]
    if kind == "number":
        mean = sum(truth) / len(truth)
        variance = sum((value - mean) ** 2 for value in truth) / len(truth)
        return [1 - (float(said) - value) ** 2 / variance for said, value in zip(answers, truth, strict=True)]
    if kind == "labels":
        return [
            2 * len(set(said) & set(value)) / max(len(said) + len(value), 1)
            for said, value in zip(answers, truth, strict=True)
        ]
    return [float(said == value) for said, value in zip(answers, truth, strict=True)]


def features(train: Sequence[str], other: Sequence[str], characters: bool = False) -> tuple[Matrix, Matrix]:
    """TF-IDF of words, or of up to three characters, with the inverse frequencies of the training texts: (N, V), and
    rows of length 1. The two texts of a pair have different words, and the words of both are counted apart."""

    def words(text: str) -> list[str]:
        if characters:
            padded = f"^{text}$"
            return [padded[at : at + size] for size in (1, 2, 3) for at in range(len(padded) - size + 1)]
        sides = [[word.strip(".,?!'\"()").lower() for word in side.split()] for side in text.split(" || ")]
        named = [f"{number} {word}" for number, side in enumerate(sides) for word in side]
        return named + [f"both {word}" for word in set(sides[0]) & set(sides[-1]) if len(sides) > 1]

    counts = [Counter(words(text)) for text in (*train, *other)]
    known = {word: at for at, word in enumerate(sorted({word for each in counts[: len(train)] for word in each}))}
    table = np.zeros((len(counts), len(known)))
    for at, each in enumerate(counts):
        for word, count in each.items():
            if word in known:
                table[at, known[word]] = count
    table *= np.log((1 + len(train)) / (1 + (table[: len(train)] > 0).sum(0))) + 1
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return table[: len(train)], table[len(train) :]


def fitted(inputs: Matrix, targets: Matrix, probabilities: Callable[[Matrix], Matrix], steps: int = 200) -> Matrix:
    """The weights (V + 1, C) of a (logistic) regression with an L2 penalty of 0.1 / N, by accelerated gradients."""
    inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    weights = ahead = np.zeros((inputs.shape[1], targets.shape[1]))
    for step in range(steps):
        gradient = inputs.T @ (probabilities(inputs @ ahead) - targets) / len(inputs) + 0.1 / len(inputs) * ahead
        before, weights = weights, ahead - gradient / 2  # no row is longer than the root of 2
        ahead = weights + step / (step + 3) * (weights - before)
    return weights


def softmax(scores: Matrix) -> Matrix:
    """The probabilities of each row."""
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def regression(kind: str, train: Sequence[Row], inputs: tuple[Matrix, Matrix]) -> list[Any]:
    """The answers of a (logistic) regression on `inputs`."""
    test = np.hstack([inputs[1], np.ones((len(inputs[1]), 1))])
    truth = [right_answer(row) for row in train]
    if kind == "number":
        values = np.array(truth)[:, None]
        return list((test @ fitted(inputs[0], values, lambda scores: scores))[:, 0])
    names = sorted({name for value in truth for name in (value if kind == "labels" else [value])})
    targets = np.array(
        [[float(name in value if kind == "labels" else name == value) for name in names] for value in truth]
    )
    if kind == "labels":
        scores = test @ fitted(inputs[0], targets, lambda scores: 1 / (1 + np.exp(-scores)))
        return [[names[at] for at in np.flatnonzero(row > 0)] or [names[row.argmax()]] for row in scores]
    return [names[at] for at in (test @ fitted(inputs[0], targets, softmax)).argmax(1)]


def usual_tags(train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """The most frequent tag of each word."""
    seen: dict[str, Counter[str]] = {}
    for row in train:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen.setdefault(word.strip(".,?!").lower(), Counter())[tag] += 1
    usual = {word: count.most_common(1)[0][0] for word, count in seen.items()}
    return [" ".join(usual.get(word.strip(".,?!").lower(), "O") for word in row["words"]) for row in test]


def baselines(kind: str, train: Sequence[Row], test: Sequence[Row]) -> dict[str, list[float]]:
    """The scores of the test rows by each plain baseline: the most frequent answer (or the mean), the answer of the
    nearest training row, and (logistic) regression on TF-IDF; for tags, the most frequent tag of each word."""
    if kind == "preference":
        rows = [
            {"text": f"{row['prompt']} || {row[key]}", "label": key} for row in train for key in ("chosen", "rejected")
        ]
        asked = [f"{row['prompt']} || {row[key]}" for row in test for key in ("chosen", "rejected")]
        inputs = features([question(row) for row in rows], asked)
        targets = np.array([[float(row["label"] == "chosen")] for row in rows])
        weights = fitted(inputs[0], targets, lambda scores: 1 / (1 + np.exp(-scores)))
        better = (inputs[1] @ weights[:-1])[:, 0].reshape(-1, 2)
        return {"chance": [0.5] * len(test), "tfidf": [float(one > two) for one, two in better]}
    if kind == "tags":
        usual = usual_tags(train, test)
        return {
            "majority": score(kind, [" ".join("O" for _ in row["words"]) for row in test], test),
            "word": score(kind, usual, test),
        }
    texts = [[question(row) for row in rows] for rows in (train, test)]
    inputs = features(*texts, characters=kind == "text")
    truth = [right_answer(row) for row in train]
    most: Any = math.fsum(truth) / len(truth) if kind == "number" else max(truth, key=truth.count)
    nearest = (inputs[1] @ inputs[0].T).argmax(1)
    found = {
        "majority": score(kind, [most] * len(test), test),
        "copy": score(kind, [truth[at] for at in nearest], test),
    }
    return found if kind == "text" else {**found, "tfidf": score(kind, regression(kind, train, inputs), test)}
