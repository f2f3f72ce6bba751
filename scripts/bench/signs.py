"""Measures what tunekit says after runs with a planted fault, and after good runs (scripts/results/signs.md).

    scripts/bench/run signs --model MODEL [--minutes N] [--page] [--work FOLDER] [--output FOLDER]

MODEL: all-MiniLM-L6-v2. Rows are made from TUNEKIT_SHARED/data, models of text are in TUNEKIT_SHARED/models. Every run
is init's recipe with the changes of its line. A planted fault needs the sentence that names it; a good run must get
none, and no advice to train longer. A unit is never measured again. --page: only write the page.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from beside.default_sets import SETS, Row
from beside.units import parse_options, run_units, shared_data, write_parts
from defaults import redirected

RATE, STEPS = "training.learning_rate", "training.max_steps"
DECODER = "sounds-600"
# name: set of rows, changes of the recipe, words of the sentence
PLANTED: dict[str, tuple[str, dict[str, object], str]] = {
    "rate 100 times too low": (
        "intents12-600",
        {RATE: 1e-5, STEPS: 150},
        "which is too low: set training.learning_rate",
    ),
    "rate 100 times too high": ("intents12-600", {RATE: 0.1, STEPS: 150}, "too high: set training.learning_rate"),
    "rate 100 times too low, tags": ("tags-220", {RATE: 2e-6}, "which is too low: set training.learning_rate"),
    "rate 100 times too high, pairs": ("pairs-600", {RATE: 0.1, STEPS: 60}, "too high: set training.learning_rate"),
    "rate 100 times too low, decoder": (DECODER, {RATE: 2e-6}, "which is too low: set training.learning_rate"),
    "rate 300 times too high, decoder": (DECODER, {RATE: 0.06}, "too high: set training.learning_rate"),
    "one label missing": ("intents12-200", {STEPS: 200}, "never predicted right: {label} (1 training rows)"),
    "labels shuffled": ("binary-200", {STEPS: 150}, "check that each label belongs to its row"),
    "too few steps": ("intents12-600", {STEPS: 20}, "too few: set training.max_steps"),
    "the schedule ended": ("intents77-3000", {STEPS: 150}, "train longer, for example with training.max_steps"),
    "truncated rows": (
        "binary-200",
        {STEPS: 100, "data.max_length": 8, "data.excess_length": "truncate"},
        "training rows were truncated to data.max_length",
    ),
}
GOOD: dict[str, tuple[str, int, dict[str, object]]] = {  # name: set of rows, draw, changes
    **{f"binary-50, draw {draw}": ("binary-50", draw, {STEPS: 100}) for draw in range(4)},
    **{f"binary-200, seed {seed}": ("binary-200", 0, {STEPS: 120, "training.seed": seed}) for seed in range(3)},
    **{f"source-300, seed {seed}": ("source-300", 0, {STEPS: 120, "training.seed": seed}) for seed in range(3)},
    **{f"intents12-200, seed {seed}": ("intents12-200", 0, {"training.seed": seed}) for seed in range(3)},
    **{f"tags-220, seed {seed}": ("tags-220", 0, {RATE: 1e-3, STEPS: 300, "training.seed": seed}) for seed in range(2)},
    **{f"pairs-600, seed {seed}": ("pairs-600", 0, {STEPS: 150, "training.seed": seed}) for seed in range(2)},
    "overlap-600": ("overlap-600", 0, {RATE: 1e-3, STEPS: 300}),
    **{f"decoder, seed {seed}": (DECODER, 0, {RATE: 3e-3, "training.seed": seed}) for seed in range(2)},
}


def missing_label(parts: dict[str, list[Row]]) -> str:
    """Leave only one training row of the label that is the most frequent one of the other rows."""
    labels = [row["label"] for row in parts["held"]]
    label = max(sorted(set(labels)), key=labels.count)
    of_label = [row for row in parts["train"] if row["label"] == label]
    parts["train"] = [row for row in parts["train"] if row["label"] != label] + of_label[:1]
    return str(label)


def shuffled(rows: list[Row]) -> list[Row]:
    """The rows, with labels in random order."""
    labels = [row["label"] for row in rows]
    random.Random(0).shuffle(labels)
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def measure(key: str, place: Path, model: str) -> dict[str, Any]:
    """Train one run in this process. Returns its sentences, and its score."""
    from tunekit.artifacts.report.bad_signs import bad_signs
    from tunekit.artifacts.report.next_step import after_training
    from tunekit.artifacts.report.values import read_run
    from tunekit.init import init_verb
    from tunekit.recipe.load import load_recipe
    from tunekit.train import train_verb

    source, draw, changes = (PLANTED[key][0], 0, PLANTED[key][1]) if key in PLANTED else GOOD[key]
    started = time.process_time()
    base = str(shared_data().parent / "models" / "stories260k") if source == DECODER else model
    drawn = SETS[source].parts(shared_data(), draw)
    parts = {"train": drawn["train"], "held": drawn["validation"]}
    label = missing_label(parts) if key == "one label missing" else ""
    if key == "labels shuffled":
        parts = {part: shuffled(rows) for part, rows in parts.items()}
    write_parts(place, **parts)
    overrides = [f"{name}={value}" for name, value in changes.items()]
    overrides += [f"data.eval={place / 'held.jsonl'}", f"output.dir={place / 'run'}"]
    with (place / "output.txt").open("w", encoding="utf-8") as output, redirected(output):
        (place / "recipe.yaml").unlink(missing_ok=True)
        init_verb(str(place / "train.jsonl"), str(place / "recipe.yaml"), base, "lora", "none", None)
        if STEPS in changes and "\n  epochs:" in (place / "recipe.yaml").read_text("utf-8"):
            overrides.append("~training.epochs")  # init's recipe has no measured number of steps
        train_verb(load_recipe(place / "recipe.yaml", overrides), resume=False, dry_run=False, overwrite=True)
    run = read_run(place / "run")
    sentences, steps = bad_signs(run), [text for text in after_training(run) if "train longer" in text]
    plain = {name: value for name, value in run.report.part("baselines").items() if name != "label_rows"}
    wanted = PLANTED[key][2].format(label=label) if key in PLANTED else ""
    printed = (place / "output.txt").read_text("utf-8").replace("\n", " ")
    assert all(text in printed for text in sentences), "a sentence was not printed"
    return {
        "planted": key in PLANTED,
        "wanted": wanted,
        "is_right": any(wanted in text for text in sentences) if wanted else not [*sentences, *steps],
        "sentences": [*sentences, *steps],
        "verdict": run.report.get("verdict"),
        "score": {name: round(value, 4) for name, value in run.exported.numbers("eval").items()},
        "plain": plain,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def page(units: dict[str, dict[str, Any]]) -> str:
    """The table of all runs."""
    lines = [
        "# What a run says when it went badly",
        "",
        "Written by `scripts/bench/run signs`: init's recipe, changed.",
    ]
    for planted, title in ((True, "Planted faults"), (False, "Good runs")):
        some = {name: unit for name, unit in units.items() if unit["planted"] == planted}
        right = sum(unit["is_right"] for unit in some.values())
        lines += [
            "",
            f"## {title}: {right} of {len(some)} as they must be",
            "",
            "| run | score | sentences |",
            "|---|---|---|",
        ]
        for name, unit in some.items():
            changes = PLANTED[name][1] if planted else GOOD[name][2]
            score = ", ".join(f"{metric} {value:.3g}" for metric, value in list(unit["score"].items())[:2])
            said = " / ".join(unit["sentences"]) or "none"
            lines.append(
                f"| {name} ({json.dumps(changes)[1:-1]}) | {score} | {'' if unit['is_right'] else '**wrong** '}{said} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    settings = parse_options(__doc__, "signs")
    model = str(Path(settings.model).resolve()) if Path(settings.model).exists() else settings.model
    run_units(settings, [*PLANTED, *GOOD], lambda key, place: measure(key, place, model), page)


if __name__ == "__main__":
    main()
