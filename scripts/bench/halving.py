"""Compares sweeps that choose settings: halving of 16 settings with the full grid, and `sweep --auto` with the recipe
of `init`.

    scripts/bench/run halving --model MODEL [--text-model MODEL] [--shows halving,auto] [--seeds 0-2] [--minutes N]
                              [--auto-minutes 15] [--data NAME,NAME] [--page] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2; --text-model: SmolLM2-135M-Instruct, for the orders of the quickstart. The other rows are drawn
from TUNEKIT_SHARED/data by seed. A unit (one sweep or run) is written to halving.json when it is finished, and is never
measured again. --minutes N: start no unit after N minutes; --page: only write halving.md.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beside.harness import REPOSITORY, hardware
from beside.units import SMOLLM, parse_options, run_units, shared_data, tunekit, write_parts

Row = dict[str, Any]
KEYS = {"training.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2], "adapter.r": [4, 16], "training.micro_batch_size": [16, 32]}
TRAIN, HELD, EPOCHS, COMPARISONS = 20, 13, 4, 16  # rows of each intent; evaluations of a run of halving
FEW = {"banking": (5, 20), "sentiment": (100, 290)}  # rows of each label to learn from and to test on
ORDERS = REPOSITORY / "recipes" / "data" / "orders"
COLUMNS = (
    *(
        "seed",
        "grid: best loss, accuracy",
        "choice: loss, accuracy",
        "worse by: nats, points of accuracy",
        "CPU s of the grid",
    ),
    *("CPU s of halving", "share", "ended by comparison"),
)
AUTO_COLUMNS = (
    *("rows", "seed", "rows to learn from, to test on", "`--minutes`", "minutes needed", "trials"),
    *("init: accuracy, loss", "auto: accuracy, loss", "difference of accuracy", "interval"),
)
HEAD = """# Sweeps that choose

## Halving against the full grid

Banking77, 77 intents: {train:,} training and {held:,} held-out rows, all-MiniLM-L6-v2, LoRA on all linear layers,
{epochs} epochs. The 16 settings are 4 learning rates, 2 ranks and 2 batch sizes. Each side is one `tunekit sweep`. The
grid evaluates each run at its end, halving about {comparisons} times. CPU seconds are user and system time of the
whole process, one thread. The choice is the setting that halving finds best at the end. Its loss and the grid's best
loss are those of the grid's runs; points of accuracy are against the grid's highest accuracy. Made by
`scripts/bench/run halving`.

"""
AUTO_HEAD = """
## `sweep --auto` against the recipe of `init`

`tunekit init` writes the recipe from the training rows alone. `train` runs it as it is, and `sweep --auto` starts from
it. Accuracy and loss are of test rows that neither has seen; of orders, the rows of the quickstart, accuracy is the
exact match of greedy answers. Interval: 95 % of the difference of two accuracies as if their rows were independent,
which is too wide rather than too narrow. Where two whole runs of the recipe do not fit into the time, all trials have a
third of its length; so it was with orders on AMD EPYC, which has no bfloat16 instructions.

"""


def banking(data: Path, draw: random.Random, train: int, held: int) -> tuple[list[Row], list[Row]]:
    """`train` training rows and `held` held-out rows of each of the 77 intents."""
    parts = []
    for name, count in (("train", train), ("test", held)):
        texts: dict[str, list[str]] = {}
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                texts.setdefault(row["category"], []).append(" ".join(row["text"].split()))
        parts.append(
            [{"text": text, "label": label} for label in sorted(texts) for text in draw.sample(texts[label], count)]
        )
    return parts[0], parts[1]


def sentiment(data: Path, draw: random.Random, train: int, held: int) -> tuple[list[Row], list[Row]]:
    """`train` training rows and `held` held-out rows of each of the two labels."""
    parts = []
    for name, count in (("train", train), ("test", held)):
        rows = [
            json.loads(line) for line in (data / "sentiment_2way" / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        labels = sorted({row["label"] for row in rows})
        parts.append([
            {"text": row["text"], "label": label}
            for label in labels
            for row in draw.sample([row for row in rows if row["label"] == label], count)
        ])  # fmt: skip
    return parts[0], parts[1]


def orders(data: Path, draw: random.Random, train: int, held: int) -> tuple[list[Row], list[Row]]:
    """All rows of the quickstart."""
    parts = [(ORDERS / f"{name}.jsonl").read_text("utf-8").splitlines() for name in ("train", "test")]
    return [json.loads(line) for line in parts[0]], [json.loads(line) for line in parts[1]]


def write_rows(place: Path, train: Sequence[Row], test: Sequence[Row]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    write_parts(place, train=train, test=test)


def halving_unit(strategy: str, seed: int, data: Path, model: str, place: Path) -> dict[str, Any]:
    """Run one sweep. Returns its CPU seconds, and the loss and accuracy of each finished setting."""
    train, held = banking(data, random.Random(seed), TRAIN, HELD)
    write_rows(place, train, held)
    batches = min(KEYS["training.micro_batch_size"]), max(KEYS["training.micro_batch_size"])
    steps = -(-len(train) // batches[1]) * EPOCHS  # of the shorter runs
    often = 10**6 if strategy == "grid" else max(1, steps // COMPARISONS)
    recipe = {
        "model": model,
        "data": {"train": "train.jsonl", "eval": ["test.jsonl"], "max_length": 64, "excess_length": "truncate"},
        "objective": "classify",
        "adapter": {"method": "lora", "target_modules": "all-linear"},
        "training": {
            "epochs": EPOCHS,
            "gradient_accumulation_steps": 1,
            "seed": seed,
            "save_steps": 10**6,
            "eval_steps": often,
        },
        "evaluation": {"metrics": ["loss", "accuracy"], "batch_size": 64, "before_training": False},
        "sweep": {"keys": KEYS, "strategy": strategy},
        "output": {"dir": "sweep"},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    cpu_seconds, _ = tunekit(place, "sweep", str(place / "recipe.yaml"))
    result = json.loads((place / "sweep" / "sweep.json").read_text("utf-8"))
    finished = {}
    for setting in result["settings"]:
        lines = (place / "sweep" / setting["setting"] / "metrics.jsonl").read_text("utf-8").splitlines()
        last = [json.loads(line)["eval"] for line in lines if '"eval"' in line][-1]
        if setting["mean"] is not None:
            finished[setting["setting"]] = {"loss": last["loss"], "accuracy": last["accuracy"]}
    rungs = place / "sweep" / "rungs.json"
    ended = [len(names) for names in json.loads(rungs.read_text("utf-8"))["rungs"]] if rungs.exists() else []
    return {
        "rows": [len(train), len(held)],
        "cpu_seconds": cpu_seconds,
        "best": result["settings"][0]["setting"],
        "finished": finished,
        "ended": ended,
        "verdict": result["verdict"],
    }


def auto_unit(name: str, seed: int, data: Path, model: str, place: Path, minutes: float) -> dict[str, Any]:
    """Run the recipe of `init`, and `sweep --auto` from it, and evaluate both results on test rows that neither has
    seen."""
    rows = {"banking": banking, "sentiment": sentiment, "orders": orders}[name]
    train, test = rows(data, random.Random(seed), *FEW.get(name, (0, 0)))
    metric = "exact_match" if name == "orders" else "accuracy"
    write_rows(place, train, test)
    recipe = str(place / "recipe.yaml")
    tunekit(place, "init", str(place / "train.jsonl"), "--output", recipe, "--model", model)
    once, _ = tunekit(place, "train", recipe, f"training.seed={seed}", f"output.dir={place / 'once'}")
    auto = (
        "sweep",
        recipe,
        f"training.seed={seed}",
        f"output.dir={place / 'auto'}",
        "--auto",
        "--minutes",
        f"{minutes:g}",
    )
    cpu_seconds, seconds = tunekit(place, *auto)
    result = json.loads((place / "auto" / "sweep.json").read_text("utf-8"))
    best = result["settings"][0]["setting"]
    scores = {}
    for side, run in (("init", place / "once"), ("auto", place / "auto" / best)):
        file = place / f"{side}.json"
        metrics = ("--metric", metric, "--metric", "loss")
        tunekit(place, "eval", str(run), "--data", str(place / "test.jsonl"), *metrics, "--json", str(file))
        found = json.loads(file.read_text("utf-8"))
        scores[side] = {"accuracy": found[metric], "loss": found["loss"]}
    return {
        "rows": [len(train), len(test)],
        "minutes": minutes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "once_cpu_seconds": once,
        "trials": len(result["settings"]),
        "best": best,
        "verdict": result["verdict"],
        "processor": hardware()["processor"],
        **scores,
    }


def halving_lines(units: dict[str, dict]) -> list[str]:
    """A line for each seed with both sides."""
    lines = []
    for seed in sorted(key.split("|")[2] for key in units if key.startswith("halving|grid|")):
        grid, halved = units[f"halving|grid|{seed}"], units.get(f"halving|halving|{seed}")
        if halved is None:
            continue
        scores = grid["finished"]
        best, choice = (scores[name] for name in (min(scores, key=lambda name: scores[name]["loss"]), halved["best"]))
        most = max(score["accuracy"] for score in scores.values())
        share = halved["cpu_seconds"] / grid["cpu_seconds"]
        cells = [
            seed,
            *(f"{each['loss']:.4f}, {each['accuracy']:.1%}" for each in (best, choice)),
            f"{choice['loss'] - best['loss']:.4f}, {100 * (most - choice['accuracy']):.1f}",
            *(f"{each['cpu_seconds']:.0f}" for each in (grid, halved)),
            f"{share:.0%}",
            ", ".join(map(str, halved["ended"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def auto_lines(units: dict[str, dict]) -> list[str]:
    """A line for each data set and seed."""
    lines = []
    for key in sorted(key for key in units if key.startswith("auto|")):
        unit, (_, name, seed) = units[key], key.split("|")
        once, auto = unit["init"], unit["auto"]
        spread = sum(side["accuracy"] * (1 - side["accuracy"]) for side in (once, auto)) / unit["rows"][1]
        cells = [
            name,
            seed,
            ", ".join(f"{count:,}" for count in unit["rows"]),
            f"{unit['minutes']:g}",
            f"{unit['seconds'] / 60:.1f}",
            str(unit["trials"]),
            *(f"{side['accuracy']:.1%}, {side['loss']:.3f}" for side in (once, auto)),
            f"{100 * (auto['accuracy'] - once['accuracy']):+.1f} points",
            f"± {196 * spread**0.5:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(columns: Sequence[str]) -> str:
    """The head of a table."""
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"


def page(units: dict[str, dict]) -> str:
    """The page with the tables of the finished units."""
    train, held = 77 * TRAIN, 77 * HELD
    text = HEAD.format(train=train, held=held, epochs=EPOCHS, comparisons=COMPARISONS) + table(COLUMNS)
    lines = halving_lines(units)
    text += "".join(f"{line}\n" for line in lines)
    shares = [
        units[f"halving|halving|{line.split('|')[1].strip()}"]["cpu_seconds"]
        / units[f"halving|grid|{line.split('|')[1].strip()}"]["cpu_seconds"]
        for line in lines
    ]
    if shares:
        text += f"\nMean share of the grid's CPU time: {statistics.mean(shares):.0%}.\n"
    autos = auto_lines(units)
    return text + (AUTO_HEAD + table(AUTO_COLUMNS) + "".join(f"{line}\n" for line in autos) if autos else "")


def main() -> None:
    more = {"text_model": SMOLLM, "shows": "halving,auto", "data": ",".join((*FEW, "orders")), "auto_minutes": 15.0}
    settings = parse_options(__doc__, "halving", **more)
    shows, keys = settings.shows.split(","), []
    for seed in settings.seeds:
        keys += [f"halving|{strategy}|{seed}" for strategy in ("halving", "grid") if "halving" in shows]
        keys += [f"auto|{name}|{seed}" for name in settings.data.split(",") if "auto" in shows]

    def measure(key: str, place: Path) -> dict:
        show, name, seed = key.split("|")
        model = settings.text_model if name == "orders" else settings.model
        rest = (name, int(seed), shared_data(), model, place)
        return halving_unit(*rest) if show == "halving" else auto_unit(*rest, settings.auto_minutes)

    run_units(settings, keys, measure, page)


if __name__ == "__main__":
    main()
