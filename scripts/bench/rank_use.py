"""Measures what `tunekit data rank` is good for: training without its lowest rows, and its influence against the truth.

    scripts/bench/run rank_use [--model MODEL] [--shows kept,groups] [--data NAME,NAME] [--seeds 0-2] [--minutes N]
                               [--page] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2. Rows, faults and recipes are those of `scripts/bench/run rank`; test rows come from
TUNEKIT_SHARED/data.

- kept: one run on all rows; one on the 80 % that `data rank --keep 0.8` keeps; one on 80 % drawn at random. Each with
  right rows only, and with a wrong label in a fifth of the rows.
- groups: the training rows are divided at random into 16 files. `sweep.leave_out: source` trains once with all files,
  and once without each of them. The truth is how much the evaluation loss rises without a file; the estimate is the sum
  of the influence of its rows.

Each finished unit is written to rank_use.json, so a stopped command can be continued. --minutes N: start no unit after
N minutes; --page: only write rank_use.md.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from beside.units import parse_options, run_units, shared_data, tunekit
from rank import banking, plant, recipe_of, sentiment

Row = dict[str, Any]
GROUPS, KEPT, WRONG = 16, 0.8, 0.2
SIDES = ("all", "kept", "random")
HEAD = """# What a ranking of training rows is good for

all-MiniLM-L6-v2, 400 training rows, LoRA on all linear layers, 4 epochs, as in [rank.md](rank.md). Made by
`scripts/bench/run rank_use`.

"""
KEPT_HEAD = """## Training without the lowest fifth

Accuracy on test rows. Kept: the 80 % of `data rank --keep 0.8`. Random: another 80 %, drawn. All sides train for the
same number of epochs. Interval: 95 % of a difference of two accuracies, as if their rows were independent.

| rows | wrong labels | seed | test rows | all | kept | random | kept - all | kept - random | interval |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""
GROUPS_HEAD = """
## Influence against leaving a group out

Rank correlation of 16 random groups of 25 rows, of which a fifth has a wrong label: the summed influence of a group's
rows, and the rise of the evaluation loss when the run is trained without the group.

| rows | seed | evaluation rows | rank correlation | rise of the loss without a group: least, most |
|---|--:|--:|--:|--:|
"""


def write(place: Path, name: str, rows: list[Row]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def rows_of(name: str, seed: int, data: Path) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on, the evaluation rows of the run, and test rows that no run sees."""
    train, held = {"banking": banking, "sentiment": sentiment}[name](random.Random(seed), data)
    if name == "sentiment":
        lines = (data / "sentiment_2way" / "test.jsonl").read_text("utf-8").splitlines()
        every = [{key: json.loads(line)[key] for key in ("text", "label")} for line in lines]
    else:
        with (data / "banking77" / "test.csv").open(encoding="utf-8", newline="") as file:
            every = [{"text": " ".join(row["text"].split()), "label": row["category"]} for row in csv.DictReader(file)]
        intents = {row["label"] for row in train}
        every = [row for row in every if row["label"] in intents]
    seen = {row["text"] for row in (*train, *held)}
    return train, held, [row for row in every if row["text"] not in seen]


def accuracy(place: Path, run: str) -> float:
    file = place / f"{run}.json"
    test = str(place / "test.jsonl")
    tunekit(place, "eval", str(place / run), "--data", test, "--metric", "accuracy", "--json", str(file))
    return float(json.loads(file.read_text("utf-8"))["accuracy"])


def kept_unit(name: str, wrong: float, seed: int, model: str, place: Path) -> dict[str, Any]:
    """Train on all rows, on the kept ones, and on as many random ones; returns the accuracy of each side."""
    train, held, test = rows_of(name, seed, shared_data())
    draw = random.Random(seed)
    planted, _ = plant(train, "uniform", wrong, draw)
    for file, rows in (("train", planted), ("eval", held), ("test", test)):
        write(place, f"{file}.jsonl", rows)
    write(place, "random.jsonl", draw.sample(planted, round(KEPT * len(planted))))
    recipe = recipe_of(name, model, seed, -(-len(planted) // 16))
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    tunekit(place, "train", str(place / "recipe.yaml"), "--overwrite", f"output.dir={place / 'all'}")
    kept = place / "kept.jsonl"
    kept.unlink(missing_ok=True)
    tunekit(place, "data", "rank", str(place / "all"), "--keep", str(KEPT), "--output", str(kept))
    for side in ("kept", "random"):
        more = (f"data.train={place / side}.jsonl", f"output.dir={place / side}")
        tunekit(place, "train", str(place / "recipe.yaml"), "--overwrite", *more)
    return {"test_rows": len(test), "accuracy": {side: accuracy(place, side) for side in SIDES}}


def groups_unit(name: str, seed: int, model: str, place: Path) -> dict[str, Any]:
    """Train without each group; returns the rise of the loss and the summed influence of each group."""
    train, _, test = rows_of(name, seed, shared_data())
    planted, _ = plant(train, "uniform", WRONG, random.Random(seed))
    size, files = len(planted) // GROUPS, [f"group-{number:02}.jsonl" for number in range(GROUPS)]
    for number, file in enumerate(files):
        write(place, file, planted[number * size : (number + 1) * size])
    write(place, "eval.jsonl", test)
    recipe = recipe_of(name, model, seed, -(-len(planted) // 16))
    recipe["data"]["train"] = [{"path": file} for file in files]
    recipe |= {"sweep": {"leave_out": "source"}, "output": {"dir": "sweep"}}
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    resume = ["--resume"] if (place / "sweep").exists() else []
    tunekit(place, "sweep", str(place / "recipe.yaml"), *resume)
    result = json.loads((place / "sweep" / "sweep.json").read_text("utf-8"))
    losses = {setting["setting"]: setting["mean"] for setting in result["settings"]}
    ranked = place / "rank.json"
    whole = place / "sweep" / "without=nothing"
    tunekit(place, "data", "rank", str(whole), "--influence", "--json", str(ranked))
    sums = dict.fromkeys(files, 0.0)
    for row in json.loads(ranked.read_text("utf-8"))["rows"]:
        sums[Path(row["row"].rpartition(":")[0]).name] += row["influence"]
    rises = [losses[f"without={file}"] - losses["without=nothing"] for file in files]
    return {"evaluation_rows": len(test), "rises": rises, "influence": [sums[file] for file in files]}


def page(units: dict[str, dict]) -> str:
    """rank_use.md."""
    from tunekit.evaluation.row_ranking import rank_correlation

    kept, groups = "", ""
    for key in sorted(units):
        unit, (show, name, *rest) = units[key], key.split("|")
        if show == "groups":
            rises = np.array(unit["rises"])
            agreement = rank_correlation(rises, np.array(unit["influence"]))
            groups += f"| {name} | {rest[0]} | {unit['evaluation_rows']:,} | {agreement:.2f} | "
            groups += f"{rises.min():+.4f}, {rises.max():+.4f} |\n"
            continue
        every, some, drawn = (unit["accuracy"][side] for side in SIDES)
        spread = 1.96 * ((every * (1 - every) + some * (1 - some)) / unit["test_rows"]) ** 0.5
        shares = " | ".join(f"{value:.1%}" for value in (every, some, drawn))
        gains = " | ".join(f"{100 * (some - other):+.1f}" for other in (every, drawn))
        kept += f"| {name} | {rest[0]} % | {rest[1]} | {unit['test_rows']:,} | {shares} | {gains} | "
        kept += f"± {100 * spread:.1f} |\n"
    return HEAD + (KEPT_HEAD + kept if kept else "") + (GROUPS_HEAD + groups if groups else "")


def main() -> None:
    settings = parse_options(__doc__, "rank_use", shows="kept,groups", data="sentiment,banking")
    shows, keys = settings.shows.split(","), []
    for seed in settings.seeds:
        for name in settings.data.split(","):
            keys += [f"kept|{name}|{wrong}|{seed}" for wrong in (20, 0) if "kept" in shows]
            keys += [f"groups|{name}|{seed}"] if "groups" in shows else []

    def measure(key: str, place: Path) -> dict:
        show, name, *rest = key.split("|")
        if show == "kept":
            return kept_unit(name, int(rest[0]) / 100, int(rest[1]), settings.model, place)
        return groups_unit(name, int(rest[0]), settings.model, place)

    run_units(settings, keys, measure, page)


if __name__ == "__main__":
    main()
