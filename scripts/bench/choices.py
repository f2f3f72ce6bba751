"""Measures rows per second of multiple choice, with one shared prompt for all answers, and with one forward per answer.

    scripts/bench/run choices --model MODEL --data FILE.csv [--rows 48] [--plain-rows 4] [--batch-size 8] [--json FILE]

Each line of the file has a text and its class, as in Banking77. One thread, float32, CPU time of the process. Both ways
must give the same log-probabilities up to rounding.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import torch

from tunekit.data.rows import Written
from tunekit.evaluation import choices as room
from tunekit.formats.example import CompletionExample
from tunekit.machine.devices import make_devices
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.tuned.model import TunedModel

FIGURES = {
    "minutes": 5,
    "options": "--model $TUNEKIT_SMOLLM2 --data $TUNEKIT_SHARED/data/banking77/test.csv --rows 36 "
    "--json $RESULTS/choices.json",
    "result": "choices.json",
    "figures": {
        "rate": {
            "what": "77 choices: one shared prompt against one row per choice",
            "unit": "rows per CPU second",
            "digits": 3,
            "ours": "shared",
            "theirs": "plain",
        },
    },
}


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--plain-rows", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    section, device = ModelSection(name_or_path=asked.model, dtype="float32"), torch.device("cpu")
    tokenizer, model = load_tokenizer(section), TunedModel(load_model(section, device=device), None)
    objective = make_objective(SftSettings(), tokenizer)
    with open(asked.data, encoding="utf-8", newline="") as file:
        lines = [(text, label.replace("_", " ")) for text, label in list(csv.reader(file))[1:]]
    chosen = room.Choices(tuple(sorted({label for _, label in lines})), "sum")
    rows = [Written(asked.data, at, CompletionExample(f"{text}\nIntent:", f" {label}")) for at, (text, label) in
            enumerate(lines[: asked.rows], 2)]  # fmt: skip
    questions = room.make_questions(rows, chosen, objective.rows)

    def measure(count: int) -> tuple[float, torch.Tensor]:
        started = time.process_time()
        found = room.choice_scores(
            model, objective, chosen, questions[:count], make_devices(), batch_size=asked.batch_size
        )
        return count / (time.process_time() - started), found

    measure(1)  # what the first forward alone costs
    shared, ours = measure(asked.rows)
    room._shares_prompt = lambda model, longest: False
    plain, theirs = measure(asked.plain_rows)
    difference = float((ours[: asked.plain_rows] - theirs).abs().max())
    print(f"{len(chosen.texts)} answers; largest difference of a log-probability {difference:.1e}")
    print(f"one shared prompt            {shared:8.3f} rows per CPU second ({asked.rows} rows)")
    print(f"one row for each answer      {plain:8.3f} rows per CPU second ({asked.plain_rows} rows)")
    print(f"ratio                        {shared / plain:8.1f}")
    if asked.json:
        found = {"shared": shared, "plain": plain, "answers": len(chosen.texts), "difference": difference}
        asked.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
