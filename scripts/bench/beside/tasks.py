"""The rows and recipes of scripts/bench/objectives.py, each made from files of the shared data by rules.

The rows depend only on the data folder and a seed. A Split has training rows, held-out rows and baselines.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunekit.metrics.span_f1 import find_spans

PAIR_TOKENS, PAIR_FOLDS, PAIR_ROWS = 256, 5, 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """The rows of one unit (one training run). `baselines`: the metric of answers that need no training, on the same
    held-out rows."""

    name: str
    seed: int
    train: list[Row]
    held: list[Row]
    baselines: dict[str, float]


@dataclass(frozen=True)
class Task:
    """One line of the table."""

    name: str
    told: str
    metric: str
    format: str
    splits: Callable[[Path, int, int], Iterator[Split]]
    objective: Row
    data: Row
    training: Row
    evaluation: Row = field(default_factory=dict)
    adapter: Row = field(default_factory=lambda: {"method": "lora", "r": 16, "alpha": 32})
    base: str = "SmolLM2-135M-Instruct"

    def recipe(self, base: Path, place: Path, seed: int) -> Row:
        """The whole recipe, its paths absolute."""
        files = {"train": "train", "eval": "held"}
        sources = {
            name: [{"path": str(place / f"{file}.jsonl"), "format": self.format}] for name, file in files.items()
        }
        return {
            "model": {"name_or_path": str(base)},
            "data": {**sources, **self.data},
            "adapter": self.adapter,
            "objective": self.objective,
            "training": {"eval_steps": 10**6, "save_steps": 10**6, "seed": seed, **self.training},
            "evaluation": self.evaluation,
            "output": {"dir": str(place / "run")},
        }


def share_of_largest(answers: list[Any]) -> float:
    """The accuracy of always giving the most frequent answer."""
    return Counter(answers).most_common(1)[0][1] / len(answers)


def lines_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sentiment(data: Path, seed: int, folds: int) -> Iterator[Split]:
    """Fifty training rows, drawn without balancing the labels, and the first 300 test rows."""
    folder = data / "sentiment_2way"

    def asked(row: Row) -> Row:
        question = f"Review: {row['text']}\nIs this review positive or negative?"
        return {"prompt": question + "\nAnswer:", "completion": f" {row['label']}"}

    train = random.Random(seed).sample(lines_of(folder / "train.jsonl"), 50)
    held = lines_of(folder / "test.jsonl")[:300]
    majority = Counter(row["label"] for row in train).most_common(1)[0][0]
    correct = sum(row["label"] == majority for row in held) / len(held)
    yield Split(f"sentiment-{seed}", seed, [*map(asked, train)], [*map(asked, held)], {"majority": correct})


def banking(data: Path, seed: int, folds: int) -> Iterator[Split]:
    """Five training rows of each of the 77 intents, and one test row of each."""

    def read(name: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        with (data / "banking77" / name).open(encoding="utf-8", newline="") as file:
            for text, label in list(csv.reader(file))[1:]:
                found.setdefault(label.replace("_", " "), []).append(text)
        return found

    draw, train, held = random.Random(seed), read("train.csv"), read("test.csv")

    def rows(texts: dict[str, list[str]], count: int, choose: Callable[[list[str], int], list[str]]) -> list[Row]:
        return [
            {"prompt": f"{text.strip()}\nIntent:", "completion": f" {label}"}
            for label in sorted(texts)
            for text in choose(texts[label], count)
        ]

    few, test = rows(train, 5, draw.sample), rows(held, 1, lambda texts, count: texts[:count])
    baselines = {"majority": share_of_largest([row["completion"] for row in test])}
    yield Split(f"banking77-{seed}", seed, few, test, baselines)


def tags(data: Path, seed: int, folds: int) -> Iterator[Split]:
    """Word problems whose amounts of money, quantities and names are tagged by rules; 150 to train on, 200 held out.

    The baseline `copy` gives each word its most frequent tag in the training rows, or O if the word is not in them.
    """
    folder = data / "gsm8k"
    train = random.Random(seed).sample(lines_of(folder / "train_1000.jsonl"), 150)
    few, test = ([tagged(row["question"]) for row in rows] for rows in (train, lines_of(folder / "test.jsonl")[:200]))
    seen: dict[str, Counter[str]] = {}
    for row in few:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen.setdefault(word, Counter())[tag] += 1
    copied = [[seen[word].most_common(1)[0][0] if word in seen else "O" for word in row["words"]] for row in test]
    score = span_f1([row["tags"] for row in test], copied)
    yield Split(f"tags-{seed}", seed, few, test, {"copy": score, "majority": 0.0})


def tagged(text: str) -> Row:
    """The words of a text with their tags. MONEY: a number after a dollar sign. QUANTITY: any other number, with a
    following word in small letters. NAME: words with a capital letter, except the first word of a sentence."""
    words, found = text.split(), list[str]()
    for at, word in enumerate(words):
        before = words[at - 1] if at else "."
        if re.match(r"\$\d", word):
            found.append("B-MONEY")
        elif re.match(r"\d", word):
            found.append("B-QUANTITY")
        elif (
            at
            and found[-1] == "B-QUANTITY"
            and re.fullmatch(r"[a-z]+[.,?]?", word)
            and not re.search(r"[.,?]$", before)
        ):
            found.append("I-QUANTITY")
        elif re.match(r"[A-Z][a-z]", word) and not re.search(r"[.?!\"]$", before):
            found.append("I-NAME" if found[-1].endswith("NAME") else "B-NAME")
        else:
            found.append("O")
    return {"words": words, "tags": found}


def span_f1(tags: list[list[str]], guessed: list[list[str]]) -> float:
    """The micro-averaged F1 of whole spans."""
    true, said = (
        {(number, *span) for number, line in enumerate(lines) for span in find_spans(line)} for lines in (tags, guessed)
    )
    return 2 * len(true & said) / max(len(true) + len(said), 1)


def pairs(name: str, words: int = 120, rows: int = PAIR_ROWS) -> Callable[[Path, int, int], Iterator[Split]]:
    """Folds of the pairs whose prompt is short enough to leave room for an answer. `rows`: the number of training rows,
    taken from the other folds."""

    def splits(data: Path, seed: int, folds: int) -> Iterator[Split]:
        file = data / "preference_dpo" / "dpo_280.jsonl"
        found = [row for row in lines_of(file) if _words(row["prompt"]) < words]
        draw = random.Random(seed)
        draw.shuffle(found)
        for fold in range(folds):
            held = found[fold::PAIR_FOLDS]
            rest = [row for number, row in enumerate(found) if number % PAIR_FOLDS != fold]
            longer = sum(_words(row["chosen"]) > _words(row["rejected"]) for row in held) / len(held)
            train = draw.sample(rest, min(rows, len(rest)))
            yield Split(f"{name}-{seed}-{fold}", seed, train, held, {"longer answer": longer})

    return splits


def _words(turns: list[Row]) -> int:
    return sum(len(turn["content"].split()) for turn in turns)


def paired_accuracy(run: Path, held: Path, length: int) -> float:
    """The share of pairs in which the trained policy prefers the chosen answer more strongly than its base does."""
    import torch

    from tunekit.data.batching.steps import evaluation_batches
    from tunekit.data.rows import load_evaluation_rows
    from tunekit.evaluation.scores import summed_evaluation
    from tunekit.machine.devices import make_devices
    from tunekit.objectives.base import make_objective
    from tunekit.recipe.data import DataSection
    from tunekit.recipe.objectives.dpo import DpoSettings
    from tunekit.targets.target import find_target, load_target

    torch.set_num_threads(1)
    loaded = load_target(find_target(str(run), None, []), torch.device("cpu"))
    objective: Any = make_objective(DpoSettings(unusable_pairs="drop"), loaded.tokenizer).laid_out(True, True)
    source = [{"path": str(held), "format": "preference"}]
    section = DataSection(train=source, eval=source, max_length=length, excess_length="truncate")
    rows = load_evaluation_rows(section, objective, seed=0).evaluation
    assert rows is not None
    batches = evaluation_batches(rows, objective.rows, batch_size=8)
    found = summed_evaluation(loaded.model, objective, batches, make_devices())
    return found.metrics(["rewards_accuracies"])["rewards_accuracies"]


PAIR_TRAINING = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-4, "scheduler": "linear"}


def pair_task(told: str, objective: Row, **evaluation: Any) -> Task:
    """The task of a preference objective. Its metric is the share of held-out pairs whose chosen answer is
    preferred."""
    name = objective["method"]
    drop = {"unusable_rows" if name == "kto" else "unusable_pairs": "drop"}
    epochs = 1 if name == "kto" else 2  # its KL takes as many forwards again; a unit is of five CPU minutes at most
    return Task(
        name=name,
        told=told,
        metric="rewards_accuracies",
        format="unpaired" if name == "kto" else "preference",
        splits=pairs(name),
        objective={**drop, **objective},
        data={"max_length": PAIR_TOKENS, "excess_length": "truncate"},
        training={**PAIR_TRAINING, "epochs": epochs},
        evaluation={"batch_size": 4, **evaluation},
    )


REFERENCED = {"before_training": False}  # at step 0 it is its own reference
TASKS = {
    task.name: task
    for task in (
        Task(
            name="sentiment",
            told="choice of two texts, 50 rows (accuracy)",
            metric="accuracy",
            format="prompt_completion",
            splits=sentiment,
            objective={"method": "sft"},
            data={"max_length": 256},
            training={"learning_rate": 5e-4, "epochs": 5, "micro_batch_size": 10, "gradient_accumulation_steps": 1},
            evaluation={"choices": ["positive", "negative"], "batch_size": 16},
        ),
        Task(
            name="banking77",
            told="choice of 77 texts, 5 rows a class (accuracy)",
            metric="accuracy",
            format="prompt_completion",
            splits=banking,
            objective={"method": "sft"},
            data={"max_length": 256},
            training={"learning_rate": 1e-3, "epochs": 3, "micro_batch_size": 16, "gradient_accumulation_steps": 1},
            evaluation={"choices": "from_data", "batch_size": 16},
        ),
        Task(
            name="tags",
            told="token classification, 150 rows (span F1)",
            metric="span_f1",
            format="tags",
            splits=tags,
            objective={"method": "token_classify"},
            data={"max_length": 256, "excess_length": "truncate"},
            training={"learning_rate": 2e-3, "epochs": 8, "micro_batch_size": 8, "gradient_accumulation_steps": 1},
            evaluation={"metrics": ["loss", "token_accuracy", "span_f1"]},
            base="all-MiniLM-L6-v2",
        ),
        pair_task("DPO", {"method": "dpo", "beta": 0.1}, **REFERENCED),
        pair_task("reward model", {"method": "reward"}),
        pair_task("SimPO", {"method": "simpo", "beta": 2.0}),
        pair_task("ORPO", {"method": "orpo"}),
        pair_task("KTO", {"method": "kto", "beta": 0.1}, **REFERENCED),
    )
}
