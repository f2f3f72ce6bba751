"""Measures how well `tunekit data rank` finds planted wrong rows, against the loss alone and against cleanlab.

    scripts/bench/run rank [--model MODEL] [--text-model MODEL] [--data NAME,NAME] [--shares 20,10] [--seeds 0-2]
                           [--influence] [--minutes N] [--page] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2; --text-model: SmolLM2-135M-Instruct, for the orders of the quickstart. Rows come from
TUNEKIT_SHARED/data. A unit has one data set, one kind of fault, one share of wrong rows and one seed: rows are drawn,
some of them get a wrong label (uniform: any other label; confusable: the label with the most similar texts), a
classifier is trained, and its rows are ranked. Orders get a wrong field. Each step of a unit leaves a file in the work
folder, and each finished unit is written to rank.json, so a stopped command can be continued. --minutes N: start no
unit after N minutes; --page: only write rank.md. cleanlab (in TUNEKIT_PROGRAMS/cleanlab, or installed) gets the same
probabilities: those of the result, and the mean over the checkpoints.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from beside.harness import REPOSITORY
from beside.units import SMOLLM, parse_options, run_units, shared_data, tunekit, write_parts

sys.path.insert(0, str(REPOSITORY))

Row = dict[str, Any]
SENTIMENT_ROWS, INTENTS, INTENT_ROWS, HELD = 200, 20, 20, 100  # rows of a label; intents and their rows; held-out rows
ORDERS, HELD_ORDERS = 120, 30  # rows of the quickstart
KINDS = {"sentiment": ("uniform",), "banking": ("uniform", "confusable"), "orders": ("field",)}
RATES = {"sentiment": 1e-3, "banking": 2e-3, "orders": 5e-4}
EPOCHS = {"sentiment": 4, "banking": 4, "orders": 3}
SCORES = {  # name in the table -> key of `data rank --json`, sign
    "loss of the result": ("after", 1),
    "mean loss": ("mean", 1),
    "area under the margin": ("margin", -1),
    "spread of the loss": ("spread", 1),
    "similar rows disagree": ("disagreement", 1),
    "influence": ("influence", -1),
    "combined (likely wrong)": ("wrong", 1),
}
CLEANLAB = ("self_confidence", "normalized_margin")
HEAD = """# Wrong training rows

How well `tunekit data rank` finds rows that were made wrong on purpose. Sentiment: {sentiment} rows of two labels;
Banking77: {banking} rows of {intents} intents; all-MiniLM-L6-v2, LoRA on all linear layers, {epochs} epochs, one
checkpoint for each epoch. Orders: {orders} rows of the quickstart, of which some have a wrong value in one of the five
fields of the answer; SmolLM2-135M-Instruct, {order_epochs} epochs. AUC: the probability that a wrong row has a higher
score than a right row. Precision: the share of wrong rows among the k highest scores, where k is the number of wrong
rows. cleanlab 2.9 reads the probabilities of the same model, of its result or as the mean over the checkpoints;
adjusted: with its class thresholds. It has no score for texts without labels.
Made by `scripts/bench/run rank`.

"""


def banking(draw: random.Random, data: Path) -> tuple[list[Row], list[Row]]:
    """Rows of drawn intents, to train on and to hold out."""
    texts: list[dict[str, list[str]]] = []
    for name in ("train", "test"):
        texts.append({})
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                texts[-1].setdefault(row["category"], []).append(" ".join(row["text"].split()))
    intents = sorted(draw.sample(sorted(texts[0]), INTENTS))
    rows = [{"text": text, "label": name} for name in intents for text in draw.sample(texts[0][name], INTENT_ROWS)]
    draw.shuffle(rows)
    held = [{"text": text, "label": name} for name in intents for text in texts[1][name][: HELD // INTENTS]]
    return rows, held


def sentiment(draw: random.Random, data: Path) -> tuple[list[Row], list[Row]]:
    """Rows of two labels, to train on and to hold out."""
    folder, parts = data / "sentiment_2way", []
    for name in ("train", "test"):
        lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
        parts.append([{key: json.loads(line)[key] for key in ("text", "label")} for line in lines])
    names = sorted({row["label"] for row in parts[0]})
    rows = [
        row for name in names for row in draw.sample([row for row in parts[0] if row["label"] == name], SENTIMENT_ROWS)
    ]
    draw.shuffle(rows)
    return rows, parts[1][:HELD]


def orders(draw: random.Random, data: Path) -> tuple[list[Row], list[Row]]:
    """Rows of the quickstart."""
    folder = REPOSITORY / "recipes" / "data" / "orders"
    parts = [(folder / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "test")]
    parts = [draw.sample(parts[0], ORDERS), parts[1][:HELD_ORDERS]]
    return [json.loads(line) for line in parts[0]], [json.loads(line) for line in parts[1]]


def similar_label(rows: Sequence[Row]) -> dict[str, str]:
    """For each label, the other label whose texts have the most similar words (cosine of tf-idf)."""
    words = {name: Counter[str]() for name in sorted({row["label"] for row in rows})}
    for row in rows:
        words[row["label"]].update(row["text"].lower().split())
    spread = Counter(word for counts in words.values() for word in counts)
    vectors = {
        name: {word: count * math.log(len(words) / spread[word]) for word, count in counts.items()}
        for name, counts in words.items()
    }

    def cosine(one: dict[str, float], other: dict[str, float]) -> float:
        product = sum(value * other.get(word, 0.0) for word, value in one.items())
        return product / math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in other.values()) or 1.0)

    return {
        name: max((other for other in words if other != name), key=lambda other: cosine(vectors[name], vectors[other]))
        for name in words
    }


def plant(rows: Sequence[Row], kind: str, share: float, draw: random.Random) -> tuple[list[Row], list[int]]:
    """Copies of the rows, of which a share is wrong, and the numbers of the wrong rows."""
    wrong = set(draw.sample(range(len(rows)), round(share * len(rows))))
    similar = similar_label(rows) if kind == "confusable" else {}
    names = sorted({row["label"] for row in rows}) if kind != "field" else []
    fields = [row["messages"][-1]["content"].split(" | ") for row in rows] if kind == "field" else []
    planted = []
    for number, row in enumerate(rows):
        changed = row
        if number in wrong and kind == "field":
            place, values = draw.randrange(5), list(fields[number])
            values[place] = draw.choice(sorted({each[place] for each in fields} - {values[place]}))
            changed = {"messages": [*row["messages"][:-1], {"role": "assistant", "content": " | ".join(values)}]}
        elif number in wrong:
            others = [name for name in names if name != row["label"]]
            changed = {**row, "label": similar[row["label"]] if similar else draw.choice(others)}
        planted.append(changed)
    return planted, sorted(wrong)


def write_rows(place: Path, name: str, kind: str, share: float, seed: int, data: Path) -> None:
    draw = random.Random(seed)
    rows, held = {"banking": banking, "sentiment": sentiment, "orders": orders}[name](draw, data)
    planted, wrong = plant(rows, kind, share, draw)
    write_parts(place, train=planted, eval=held)
    (place / "wrong.json").write_text(json.dumps(wrong), "utf-8")


def recipe_of(name: str, model: str, seed: int, steps: int) -> dict[str, Any]:
    """The recipe of a unit. `steps`: of an epoch."""
    labelled = {"objective": {"method": "classify"}} if name != "orders" else {}
    return {
        "model": {"name_or_path": model, "dtype": "float32"},
        "data": {"train": "train.jsonl", "eval": ["eval.jsonl"], "max_length": 64 if labelled else 256},
        **labelled,
        "adapter": {"method": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear"},
        "training": {
            "learning_rate": RATES[name],
            "epochs": EPOCHS[name],
            "seed": seed,
            "micro_batch_size": 16 if labelled else 8,
            "gradient_accumulation_steps": 1,
            "save_steps": steps,
            "eval_steps": 10**6,
            "keep_checkpoints": 20,
        },
        "evaluation": {"before_training": False},
        "output": {"dir": "run"},
    }


def write_probabilities(run: Path, file: Path) -> None:
    """Write the label of each row, and the probabilities of the labels at each checkpoint, (states, rows, labels)."""
    import torch

    from tunekit.data.batching.steps import evaluation_batches
    from tunekit.data.rows import load_rows
    from tunekit.evaluation.scores import undisturbed
    from tunekit.machine.devices import make_devices
    from tunekit.objectives.base import make_objective
    from tunekit.targets.states import load_states
    from tunekit.targets.target import find_target

    torch.set_num_threads(1)
    target = find_target(str(run), None, [])
    assert target.recipe is not None
    loaded, states = load_states(target, make_devices().device, {})
    rows = load_rows(target.recipe.data, make_objective(target.recipe.objective, loaded.processor), seed=target.seed)
    loss: Any = rows.objective.loss
    tables, labels = [], [0] * len(rows.train)
    for state in states:
        state.load()
        table: dict[int, list[float]] = {}
        with undisturbed(loaded.model):
            for batch in evaluation_batches(rows.train, rows.objective.rows, batch_size=16):
                scores, true = loss.scores(loaded.model.output(batch.inputs), batch)
                for row, line, label in zip(batch.rows, scores.softmax(-1).tolist(), true.tolist(), strict=True):
                    table[row.number], labels[row.number] = line, label
        tables.append([table[number] for number in range(len(table))])
    file.write_text(json.dumps({"labels": labels, "tables": np.round(tables, 7).tolist()}), "utf-8")


def area_and_precision(scores: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Area under the curve, and precision at the number of wrong rows. Shapes: (rows,) each."""
    from tunekit.evaluation.row_ranking import ranks

    count, places = int(wrong.sum()), ranks(scores) * len(scores)
    area = (places[wrong].sum() - count * (count - 1) / 2) / (count * (len(scores) - count))
    first = np.argsort(-scores, kind="stable")[:count]
    return [round(float(area), 4), round(float(wrong[first].mean()), 4)]


def cleanlab_scores(file: Path) -> dict[str, np.ndarray]:
    """cleanlab's scores by name; higher is more likely wrong."""
    sys.path.append(str(Path(os.environ.get("TUNEKIT_PROGRAMS", "/nonexistent")) / "cleanlab"))
    from cleanlab.rank import get_label_quality_scores

    values = json.loads(file.read_text("utf-8"))
    labels, tables = np.array(values["labels"]), np.array(values["tables"])
    scores = {}
    for source, table in (("result", tables[-1]), ("mean", tables.mean(axis=0))):
        table = table / table.sum(axis=1, keepdims=True)
        for method in CLEANLAB:
            for adjusted in (False, True):
                quality = get_label_quality_scores(labels, table, method=method, adjust_pred_probs=adjusted)
                name = f"cleanlab, {method.replace('_', ' ')}{', adjusted' if adjusted else ''}, {source}"
                scores[name] = -np.asarray(quality)
    return scores


def unit(name: str, kind: str, share: float, seed: int, models: dict[str, str], place: Path, influence: bool) -> dict:
    """Make the files of a unit that are missing, and return its scores: [AUC, precision] by name."""
    if not (place / "wrong.json").exists():
        write_rows(place, name, kind, share, seed, shared_data())
    if not (place / "run" / "report.json").exists():
        count = len((place / "train.jsonl").read_text("utf-8").splitlines())
        recipe = recipe_of(name, models.get(name, models["others"]), seed, -(-count // (8 if name == "orders" else 16)))
        (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
        tunekit(place, "train", str(place / "recipe.yaml"), "--overwrite")
    if not (place / "rank.json").exists():
        options = ["--influence"] if influence else []
        tunekit(place, "data", "rank", str(place / "run"), "--json", str(place / "rank.json"), *options)
    ranked = json.loads((place / "rank.json").read_text("utf-8"))["rows"]
    lines = [int(row["row"].rpartition(":")[2]) for row in ranked]
    wrong = np.isin(lines, np.array(json.loads((place / "wrong.json").read_text("utf-8"))) + 1)
    scores = {
        title: sign * np.array([row[key] for row in ranked])
        for title, (key, sign) in SCORES.items()
        if key in ranked[0]
    }
    if name != "orders":
        if not (place / "probabilities.json").exists():
            write_probabilities(place / "run", place / "probabilities.json")
        scores |= cleanlab_scores(place / "probabilities.json")
    return {"rows": len(lines), "scores": {title: area_and_precision(each, wrong) for title, each in scores.items()}}


def page(units: dict[str, dict]) -> str:
    """The page with one table for each data set and kind of fault."""
    rows = 2 * SENTIMENT_ROWS, INTENTS * INTENT_ROWS
    sizes = {"sentiment": rows[0], "banking": rows[1], "intents": INTENTS, "orders": ORDERS}
    text = HEAD.format(**sizes, epochs=EPOCHS["sentiment"], order_epochs=EPOCHS["orders"])
    cells: dict[str, list[str]] = {}
    for key in sorted(units):
        cells.setdefault(key.rpartition("|")[0], []).append(key)
    for cell, keys in cells.items():
        name, kind, share = cell.split("|")
        seeds = f"{len(keys)} seed{'s' if len(keys) > 1 else ''}"
        text += f"## {name.capitalize()}, {kind}, {share} % of the rows are wrong, {seeds}\n\n"
        text += "| score | AUC | precision |\n|---|--:|--:|\n"
        titles = list(dict.fromkeys(title for key in keys for title in units[key]["scores"]))
        for title in titles:
            pairs = [units[key]["scores"][title] for key in keys if title in units[key]["scores"]]
            text += "| {} | {:.3f} | {:.3f} |\n".format(title, *np.mean(pairs, axis=0))
        text += "\n"
    return text


def main() -> None:
    more = {"text_model": SMOLLM, "data": ",".join(KINDS), "shares": "20,10", "influence": False}
    settings = parse_options(__doc__, "rank", **more)
    models = {"others": settings.model, "orders": settings.text_model}
    keys = [
        f"{name}|{kind}|{share}|{seed}"
        for seed in settings.seeds
        for share in settings.shares.split(",")
        for name in settings.data.split(",")
        for kind in KINDS[name]
    ]

    def measure(key: str, place: Path) -> dict:
        name, kind, share, seed = key.split("|")
        return unit(name, kind, int(share) / 100, int(seed), models, place, settings.influence)

    run_units(settings, keys, measure, page)


if __name__ == "__main__":
    main()
