"""Measures the time and the memory of `tunekit data rank`, against those of the training.

    scripts/bench/run rank_cost [--models FOLDER] [--runs NAME,NAME] [--minutes N] [--page] [--work FOLDER]
                                [--output FOLDER]

FOLDER of --models contains minilm, smollm2 and whisper-base; rows come from TUNEKIT_SHARED/data. Each run is trained,
and ranked without and with --influence, each in a fresh process with one thread. Measured: the CPU seconds of the
process, and its largest memory. A finished unit is written to rank_cost.json; --page: only write rank_cost.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from beside.harness import REPOSITORY, hardware
from beside.units import parse_options, run_units, shared_data, write_parts
from beside.watch import ENVIRONMENT
from rank import Row, recipe_of, sentiment

RUNS = {
    "classify": "classify, MiniLM, 200 rows of sentiment_2way",
    "dpo": "DPO, SmolLM2-135M, the 16 shortest pairs of preference_dpo",
    "speech": "speech, Whisper base, 16 recordings of audio_digits_fsdd",
    "streamed": "SFT, SmolLM2-135M streamed from host memory, 16 rows of the orders",
}
PARTS = ("train", "rank", "influence")
HEAD = """# Time and memory of `tunekit data rank`

CPU seconds and largest memory of a whole process, with the start of Python and the loading of the model; one thread.
Made by `scripts/bench/run rank_cost`.

| run | steps | checkpoints | training | data rank | with --influence | processor |
|---|--:|--:|--:|--:|--:|---|
"""


def lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def run_of(name: str, data: Path) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Training rows, evaluation rows, and what is different in the recipe of a run."""
    draw = random.Random(0)
    training = {"learning_rate": 1e-4, "epochs": 1, "micro_batch_size": 2, "save_steps": 4}
    if name == "classify":
        rows, held = sentiment(draw, data)
        return rows[:200], held[:50], {"training": {"epochs": 2, "save_steps": 13}}
    if name == "dpo":
        rows = sorted(lines(data / "preference_dpo" / "dpo_280.jsonl"), key=lambda row: len(json.dumps(row)))
        return rows[:16], rows[16:18], {"objective": {"method": "dpo"}, "training": training}
    if name == "speech":
        folder = data / "audio_digits_fsdd"
        rows = [{**row, "audio": str(folder / row["audio"])} for row in lines(folder / "metadata.jsonl")]
        draw.shuffle(rows)
        return rows[:16], rows[16:18], {"objective": {"method": "speech", "language": "en"}, "training": training}
    rows = lines(REPOSITORY / "recipes" / "data" / "orders" / "train.jsonl")
    return rows[:16], rows[16:18], {"memory": {"streaming": "host"}, "training": training}


def measured(place: Path, *words: str) -> dict[str, float]:
    """Run a command, which must succeed; returns its CPU seconds and its largest memory in GB."""
    with (place / "output.txt").open("a", encoding="utf-8") as output:
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "tunekit", *words]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} failed: {place / 'output.txt'}")
    return {"seconds": round(used.ru_utime + used.ru_stime, 1), "gigabytes": round(used.ru_maxrss * 1024 / 1e9, 3)}


def unit(name: str, models: Path, place: Path) -> dict[str, Any]:
    rows, held, changes = run_of(name, shared_data())
    write_parts(place, train=rows, eval=held)
    model = {"classify": "minilm", "speech": "whisper-base"}.get(name, "smollm2")
    recipe = recipe_of("sentiment" if name == "classify" else "orders", str(models / model), 0, 4)
    for key, section in changes.items():
        recipe[key] = {**recipe.get(key, {}), **section}
    if name == "speech":
        del recipe["data"]["max_length"]
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    run = str(place / "run")
    parts = {
        "train": measured(place, "train", str(place / "recipe.yaml"), "--overwrite"),
        "rank": measured(place, "data", "rank", run),
        "influence": measured(place, "data", "rank", run, "--influence"),
    }
    steps = len([1 for record in lines(place / "run" / "metrics.jsonl") if "loss" in record])
    checkpoints = len(list((place / "run" / "checkpoints").iterdir()))
    return {"steps": steps, "checkpoints": checkpoints, "parts": parts, "processor": hardware()["processor"]}


def page(units: dict[str, dict]) -> str:
    """rank_cost.md."""
    text = HEAD
    for name in filter(units.__contains__, RUNS):
        one = units[name]
        cells = [f"{one['parts'][part]['seconds']:,.0f} s, {one['parts'][part]['gigabytes']:.2f} GB" for part in PARTS]
        text += f"| {RUNS[name]} | {one['steps']} | {one['checkpoints']} | {' | '.join(cells)} | {one['processor']} |\n"
    return text


def main() -> None:
    settings = parse_options(__doc__, "rank_cost", models=".", runs=",".join(RUNS))
    run_units(settings, settings.runs.split(","), lambda name, place: unit(name, Path(settings.models), place), page)


if __name__ == "__main__":
    main()
