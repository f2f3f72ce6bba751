"""Measures classifiers of texts, pairs, several labels and numbers on real data, before and after training, next to
baselines.

    scripts/bench/run labels --model MODEL [--tasks intents,sentiment,pairs,overlap,several] [--seeds 0-2] [--minutes N]
                             [--page] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2. Rows are drawn from TUNEKIT_SHARED/data by seed, and test rows from the test files. A unit is
one `tunekit train` in a fresh process with one thread. It is written to labels.json when it is finished, and is never
measured again. --minutes N: start no unit after N minutes; --page: only write labels.md.
"""

from __future__ import annotations

import csv
import json
import random
import resource
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beside.units import parse_options, run_units, shared_data, tunekit, write_parts

Row = dict[str, Any]
Scores = dict[str, float]
WORDS = 10  # of the longest text
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's, by the number of seeds


@dataclass(frozen=True)
class Rows:
    """The rows of a seed, and the scores of simple baselines on `test`."""

    train: list[Row]
    test: list[Row]
    baselines: Scores


@dataclass(frozen=True)
class Task:
    """A task. `rows`: a function of the data folder and a seed. `metrics`: the measured metrics, first the metric of
    the baselines."""

    told: str
    rows: Callable[[Path, random.Random], Rows]
    metrics: Sequence[str]
    training: dict[str, Any]
    problem_type: str = "single_label_classification"
    adapter: dict[str, Any] = field(default_factory=dict)


def short(text: str) -> bool:
    return len(text.split()) <= WORDS


def banking(data: Path, name: str) -> dict[str, list[str]]:
    """The short texts of each intent."""
    texts: dict[str, list[str]] = {}
    with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if short(row["text"]):
                texts.setdefault(row["category"], []).append(" ".join(row["text"].split()))
    return texts


def intents_of(data: Path, draw: random.Random, count: int) -> tuple[list[str], dict, dict]:
    """Intents drawn among those with at least 10 short texts to train and 5 to test, and the texts of all."""
    train, test = banking(data, "train"), banking(data, "test")
    usable = sorted(name for name in train if len(train[name]) >= 10 and len(test.get(name, [])) >= 5)
    return sorted(draw.sample(usable, count)), train, test


def majority(train: Sequence[Row], test: Sequence[Row]) -> float:
    """Accuracy of always answering the most frequent label."""
    usual = Counter(row["label"] for row in train).most_common(1)[0][0]
    return sum(row["label"] == usual for row in test) / len(test)


def copied(train: Sequence[Row], text: str) -> Row:
    """The training row that shares the largest share of words with the text."""
    return max(train, key=lambda row: overlap(row["text"], text))


def overlap(first: str, second: str) -> float:
    """The number of words in both texts, divided by the number of words in either text. Words are in lower case,
    without punctuation at their ends."""
    a, b = ({word.strip(".,?!'\"").lower() for word in text.split()} for text in (first, second))
    return len(a & b) / len(a | b)


def intents(data: Path, draw: random.Random) -> Rows:
    """Ten training and five test texts of each of 40 intents."""
    names, train, test = intents_of(data, draw, 40)
    rows = [
        [{"text": text, "label": name} for name in names for text in draw.sample(texts[name], count)]
        for texts, count in ((train, 10), (test, 5))
    ]
    copies = sum(copied(rows[0], row["text"])["label"] == row["label"] for row in rows[1]) / len(rows[1])
    return Rows(rows[0], rows[1], {"majority": majority(*rows), "copy": copies})


def sentiment(data: Path, draw: random.Random) -> Rows:
    """400 training and 200 test texts."""
    rows = []
    for name, count in (("train", 400), ("test", 200)):
        lines = (data / "sentiment_2way" / f"{name}.jsonl").read_text("utf-8").splitlines()
        found = [row for row in map(json.loads, lines) if short(row["text"])]
        rows.append([{"text": row["text"], "label": row["label"]} for row in draw.sample(found, count)])
    copies = sum(copied(rows[0], row["text"])["label"] == row["label"] for row in rows[1]) / len(rows[1])
    return Rows(rows[0], rows[1], {"majority": majority(*rows), "copy": copies})


def paired(data: Path, draw: random.Random) -> list[list[Row]]:
    """600 training and 200 test pairs of texts of 20 intents; half of them have one intent."""
    names, train, test = intents_of(data, draw, 20)
    rows = []
    for texts, count in ((train, 600), (test, 200)):
        pairs = []
        for number in range(count):
            first, second = draw.sample(names, 2)
            either = (
                draw.sample(texts[first], 2) if number % 2 else [draw.choice(texts[one]) for one in (first, second)]
            )
            pairs.append({"sentence1": either[0], "sentence2": either[1], "label": ("other", "same")[number % 2]})
        rows.append(pairs)
    return rows


def pairs(data: Path, draw: random.Random) -> Rows:
    """Pairs labelled by whether both texts have the same intent. Baseline: the overlap of words, with the threshold
    that is best on the training rows."""
    train, test = paired(data, draw)

    def right(rows: Sequence[Row], cut: float) -> float:
        same = [overlap(row["sentence1"], row["sentence2"]) >= cut for row in rows]
        return sum(said == (row["label"] == "same") for said, row in zip(same, rows, strict=True)) / len(rows)

    cut = max((step / 20 for step in range(21)), key=lambda cut: right(train, cut))
    return Rows(train, test, {"majority": majority(train, test), "overlap": right(test, cut)})


def overlaps(data: Path, draw: random.Random) -> Rows:
    """Pairs labelled by the overlap of their words, from 0 to 1."""
    train, test = paired(data, draw)
    for row in [*train, *test]:
        row["label"] = round(overlap(row["sentence1"], row["sentence2"]), 4)
    mean = statistics.mean(row["label"] for row in train)
    return Rows(train, test, {"mean": statistics.mean((row["label"] - mean) ** 2 for row in test)})


def several(data: Path, draw: random.Random) -> Rows:
    """Rows of two joined texts with two of 12 intents as labels. The baseline `copy` predicts the labels of the
    training row that shares most words."""
    names, *texts = intents_of(data, draw, 12)
    rows = []
    for one, count in zip(texts, (500, 200), strict=True):
        drawn = [sorted(draw.sample(names, 2)) for _ in range(count)]
        rows.append([{"text": " ".join(draw.choice(one[name]) for name in two), "label": two} for two in drawn])

    def micro_f1(answers: Sequence[Sequence[str]]) -> float:
        both = sum(len(set(said) & set(row["label"])) for said, row in zip(answers, rows[1], strict=True))
        return 2 * both / sum(len(said) + len(row["label"]) for said, row in zip(answers, rows[1], strict=True))

    copies = [copied(rows[0], row["text"])["label"] for row in rows[1]]
    return Rows(rows[0], rows[1], {"all labels": micro_f1([names] * len(copies)), "copy": micro_f1(copies)})


MULTI, NUMBER = "multi_label_classification", "regression"
TASKS = {
    "intents": Task("Banking77, 40 intents", intents, ["accuracy", "macro_f1"], {"learning_rate": 2e-3, "epochs": 6}),
    "sentiment": Task("sentiment_2way", sentiment, ["accuracy", "macro_f1"], {"learning_rate": 1e-3, "epochs": 4}),
    "pairs": Task("pairs: one intent or two", pairs, ["accuracy", "macro_f1"], {"learning_rate": 1e-3, "epochs": 4}),
    "overlap": Task(
        "pairs: overlap of words",
        overlaps,
        ["mse", "pearson", "spearman"],
        {"learning_rate": 1e-3, "epochs": 4},
        NUMBER,
    ),
    "several": Task(
        "two texts: both of 12 intents", several, ["micro_f1", "macro_f1"], {"learning_rate": 1e-3, "epochs": 8}, MULTI
    ),
}


def run_unit(task: Task, seed: int, data: Path, model: str, place: Path) -> dict[str, Any]:
    """Run one training; returns the results of its evaluations."""
    rows = task.rows(data, random.Random(seed))
    write_parts(place, train=rows.train, test=rows.test)
    often = {"save_steps": 10**6, "eval_steps": 10**6, "micro_batch_size": 16, "gradient_accumulation_steps": 1}
    recipe = {
        "model": model,
        "data": {
            "train": str(place / "train.jsonl"),
            "eval": [str(place / "test.jsonl")],
            "max_length": 48,
            "excess_length": "truncate",
        },
        "objective": {"method": "classify", "problem_type": task.problem_type},
        "adapter": {"method": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear", **task.adapter},
        "training": {**often, **task.training, "seed": seed},
        "evaluation": {"metrics": ["loss", *task.metrics]},
        "output": {"dir": str(place / "run")},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    tunekit(place, "train", str(place / "recipe.yaml"), "--overwrite")
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    evaluations = [line["eval"] for line in lines if "eval" in line]
    return {
        "rows": [len(rows.train), len(rows.test)],
        "before": evaluations[0],
        "after": evaluations[-1],
        "baselines": rows.baselines,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "training": task.training,
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used, 1),
    }


def interval(values: Sequence[float]) -> str:
    """The mean, and the 95 % interval of the mean by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def page(units: dict[str, dict]) -> str:
    """The table of what is finished."""
    lines = [
        "# Classifiers on real data, before and after",
        "",
        "all-MiniLM-L6-v2, LoRA r 8 on all linear layers and a new head, batches of 16, texts of at most",
        f"{WORDS} words, one CPU core. Before: the head as it was initialised. Means over the seeds (other rows, other",
        "head) with their 95 % interval by Student's t. Baselines are of the same test rows: the most frequent",
        "label, all labels, the mean number; copy: the label of the training row that shares most words; overlap: the",
        "same intent where the words overlap by more than a cut that is best in training. Made by",
        "`scripts/bench/run labels`.",
        "",
        "| rows | train, test | rate, epochs | seeds | measured | baselines | before | after | CPU s a run |",
        "|---|---|---|--:|---|---|---|---|--:|",
    ]
    for name, task in TASKS.items():
        found = [unit for key, unit in units.items() if key.split("|")[0] == name]
        for number, metric in enumerate(task.metrics if found else ()):
            kinds = found[0]["baselines"] if number == 0 else ()
            beside = [f"{kind} {interval([unit['baselines'][kind] for unit in found])}" for kind in kinds]
            sides = [
                interval([unit[side][metric] for unit in found if metric in unit[side]] or [float("nan")])
                for side in ("before", "after")
            ]
            seconds = round(statistics.mean(unit["cpu_seconds"] for unit in found))
            settings = f"{found[0]['training']['learning_rate']:g}, {found[0]['training']['epochs']}"
            sizes = ", ".join(map(str, found[0]["rows"]))
            cells = [task.told, sizes, settings, str(len(found)), metric, ", ".join(beside), *sides, str(seconds)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    settings = parse_options(__doc__, "labels", tasks=",".join(TASKS))
    keys = [f"{name}|{seed}" for seed in settings.seeds for name in settings.tasks.split(",")]

    def measure(key: str, place: Path) -> dict:
        name, seed = key.split("|")
        return run_unit(TASKS[name], int(seed), shared_data(), settings.model, place)

    run_units(settings, keys, measure, page)


if __name__ == "__main__":
    main()
