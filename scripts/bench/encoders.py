"""Compares tunekit with transformers' Trainer and peft on one core: text classification with MiniLM, and Whisper.

    scripts/bench/run encoders --minilm FOLDER --whisper FOLDER [--only minilm,whisper] [--repeats 5] [--venv FOLDER]
                           [--work FOLDER] [--output FOLDER] [--core N] [--force]

minilm: all-MiniLM-L6-v2 on rows of Banking77, 32 rows to a step, LoRA r16 on the layers that peft's all-linear names.
whisper: Whisper base on spoken digits, 4 recordings to a step, LoRA r16 on q_proj and v_proj, without SpecAugment. Both
sides have the same rows, the same initial adapter and the same order of rows, except with group_by_length. tunekit is
run as the real `tunekit train`, the other side as the published loops (beside/trainer.py), with their defaults and with
the fastest of the flags in CANDIDATES. Every run is a fresh process with one thread; the sides run in turns.

First both sides train in float32 without dropout: their losses must be equal within 1e-4. CPU seconds per row are the
user and system seconds between the end of the warm-up steps and the end of the last step, divided by the rows. If rows
differ in length, a row counts by its tokens. Memory above the weights: peak resident bytes minus the bytes of a process
that has imported the same modules, minus the weights in the run's dtype. Results: encoders.json and encoders.md; with
--only, the results of the other task are kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import sys
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beside.harness import Bench, ended, facts, hardware, keep, make_environment, make_parser, start
from beside.units import write_parts

FIGURES = {
    "minutes": 25,
    "options": "--force --minilm $TUNEKIT_MINILM --whisper $TUNEKIT_WHISPER",
    "result": "encoders.json",
    "figures": {
        "minilm": {
            "what": "classification with MiniLM against Trainer and peft, their defaults",
            "unit": "CPU ms per row",
            "digits": 1,
            "divisor": 1e-3,
            "ours": "minilm/summary/tunekit/seconds_per_row/1",
            "theirs": "minilm/summary/Trainer, defaults/seconds_per_row/1",
        },
        "minilm_best": {
            "what": "classification with MiniLM against Trainer and peft, their best flags",
            "unit": "CPU ms per row",
            "digits": 1,
            "divisor": 1e-3,
            "ours": "minilm/summary/tunekit/seconds_per_row/1",
            "theirs": "minilm/summary/Trainer, {minilm/best}/seconds_per_row/1",
        },
        "minilm_memory": {
            "what": "classification with MiniLM, memory above the weights, against Trainer and peft, their defaults",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "minilm/summary/tunekit/above_weights_bytes",
            "theirs": "minilm/summary/Trainer, defaults/above_weights_bytes",
        },
        "whisper": {
            "what": "Whisper base against Seq2SeqTrainer and peft, their defaults",
            "unit": "CPU seconds per row",
            "digits": 2,
            "ours": "whisper/summary/tunekit/seconds_per_row/1",
            "theirs": "whisper/summary/Trainer, defaults/seconds_per_row/1",
        },
        "whisper_best": {
            "what": "Whisper base against Seq2SeqTrainer and peft, their best flags",
            "unit": "CPU seconds per row",
            "digits": 2,
            "ours": "whisper/summary/tunekit/seconds_per_row/1",
            "theirs": "whisper/summary/Trainer, {whisper/best}/seconds_per_row/1",
        },
        "whisper_memory": {
            "what": "Whisper base, memory above the weights, against Seq2SeqTrainer and peft, their defaults",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "whisper/summary/tunekit/above_weights_bytes",
            "theirs": "whisper/summary/Trainer, defaults/above_weights_bytes",
        },
    },
}
SAME, GATE_STEPS = 1e-4, 4
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}  # base and adapters, without autocast
GROUPED = {"train_sampling_strategy": "group_by_length"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "bf16": {"config": {"bf16": True}},
    "all bfloat16": BFLOAT16,
    "one row at a time, all bfloat16": {**BFLOAT16, "config": {"per_device_train_batch_size": 1}},
}
BY_LENGTH: dict[str, dict[str, Any]] = {
    "group_by_length": {"config": GROUPED},
    "group_by_length, all bfloat16": {**BFLOAT16, "config": GROUPED},
}
PAGE = """# Encoders on one CPU core

LoRA r16 against transformers' Trainer with peft, the same rows and the same initial adapter; one thread, sides in turn.
A factor is the median over the repeats of their time by ours, with its range. Made by `scripts/bench/run encoders`;
every run's numbers are in [encoders.json](encoders.json).
"""
HEAD = (
    "| | CPU {unit} per row (least, median, most) | factor of tunekit | peak, GB | above the weights, MB "
    "| tunekit's share |\n|---|--:|--:|--:|--:|--:|\n"
)


@dataclass(frozen=True)
class Task:
    """A task to compare. `rows`: a function that writes ours.jsonl and theirs.jsonl, and returns the recipe's
    objective. `by_size`: whether rows differ in size, so that time is divided by tokens."""

    told: str
    kind: str
    rows: Callable[[Path, Path, int], dict[str, Any]]
    targets: list[str]
    rows_per_step: int
    steps: int
    warm: int
    by_size: bool
    candidates: dict[str, dict[str, Any]]
    dropout: tuple[str, ...] = ()


def banking_rows(model: Path, place: Path, count: int) -> dict[str, Any]:
    """Write rows of Banking77, drawn by a seed; returns the recipe's objective."""
    from transformers import AutoTokenizer

    with (shared() / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        drawn = random.Random(0).sample(list(csv.DictReader(file)), count)
    labels = sorted({row["category"] for row in drawn})
    texts = [" ".join(row["text"].split()) for row in drawn]
    ours = [{"text": text, "label": row["category"]} for text, row in zip(texts, drawn, strict=True)]
    ids = AutoTokenizer.from_pretrained(str(model))(texts)["input_ids"]
    theirs = [{"input_ids": row, "label": labels.index(each["label"])} for row, each in zip(ids, ours, strict=True)]
    write_parts(place, ours=ours, theirs=theirs)
    return {"method": "classify", "labels": labels}


def digit_rows(model: Path, place: Path, count: int) -> dict[str, Any]:
    """Write recordings of spoken digits; returns the recipe's objective. In theirs.jsonl, the labels are the tokens
    that Whisper predicts after its first token. A transcript begins with a space, as in Whisper's training data."""
    from transformers import WhisperProcessor

    folder = shared() / "audio_digits_fsdd"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    drawn = random.Random(0).sample(rows, count)
    tokenizer = WhisperProcessor.from_pretrained(str(model), language="en", task="transcribe").tokenizer
    audio = [at_whispers_rate(folder / row["audio"], place) for row in drawn]
    ours = [{"audio": str(file), "text": row["text"]} for file, row in zip(audio, drawn, strict=True)]
    theirs = [{"audio": row["audio"], "labels": tokenizer(f" {row['text']}").input_ids[1:]} for row in ours]
    write_parts(place, ours=ours, theirs=theirs)
    return {"method": "speech", "language": "en", "apply_spec_augment": False}


def at_whispers_rate(recording: Path, place: Path) -> Path:
    """The recording with 16,000 samples per second, resampled here because the resamplers of both sides differ."""
    import numpy as np
    import soxr

    file = place / recording.name
    with wave.open(str(recording)) as old, wave.open(str(file), "wb") as new:
        samples = np.frombuffer(old.readframes(old.getnframes()), np.int16)
        new.setparams((1, 2, 16_000, 0, "NONE", ""))
        new.writeframes(soxr.resample(samples, old.getframerate(), 16_000).tobytes())
    return file


def shared() -> Path:
    named = os.environ.get("TUNEKIT_SHARED")
    if not named:
        sys.exit("no rows: set TUNEKIT_SHARED")
    return Path(named) / "data"


TASKS = {
    "minilm": Task(
        "text classification with all-MiniLM-L6-v2 on Banking77",
        "classify",
        banking_rows,
        ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        rows_per_step=32,
        steps=16,
        warm=4,
        by_size=True,
        candidates={**CANDIDATES, **BY_LENGTH},
        dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "whisper": Task(
        "speech recognition with Whisper base on spoken digits",
        "speech",
        digit_rows,
        ["q_proj", "v_proj"],
        rows_per_step=4,
        steps=4,
        warm=1,
        by_size=False,
        candidates=CANDIDATES,
    ),
}


class Side:
    """The folder with the rows of one task, and methods that run each side."""

    def __init__(self, bench: Bench, name: str, model: Path) -> None:
        self.bench, self.task, self.model = bench, TASKS[name], model
        self.place = bench.work / name
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.still = without_dropout(model, self.place / "still", self.task.dropout)
        self.objective = self.task.rows(model, self.place, self.task.rows_per_step * self.task.steps)
        initial = self.ours("initial", model=self.still, dtype="float32", max_steps=1, warmup_steps=1)
        self.initial = str(Path(initial["place"]) / "run" / "adapter")  # a warm-up's first step has learning rate 0

    def ours(self, name: str, *, model: Path | None = None, dtype: str = "auto", **training: object) -> dict:
        """One real `tunekit train`."""
        self.bench.model, self.bench.settings.steps = model or self.model, self.task.steps
        rows = {"path": str(self.place / "ours.jsonl"), "format": "auto"}
        return self._counted(
            self.bench.ours(
                name,
                warm=self.task.warm,
                model={"name_or_path": str(self.bench.model), "dtype": dtype},
                data={"train": [rows], "max_length": 128},
                adapter={"target_modules": self.task.targets},
                objective=self.objective,
                training={"micro_batch_size": self.task.rows_per_step, **training},
            ),
            widened=0.5 if dtype == "auto" else 1.0,
        )

    def theirs(
        self, name: str, *, model: Path | None = None, dtype: str = "float32", config: dict | None = None
    ) -> dict:
        """One run of the published loop."""
        self.bench.model = model or self.model
        size = self.task.rows_per_step
        settings = {"max_length": None, "per_device_train_batch_size": size, **(config or {})}
        if settings["per_device_train_batch_size"] == 1:
            settings["gradient_accumulation_steps"] = size
        run = self.bench.theirs(
            name,
            self.task.kind,
            rows=f"{self.place.name}/theirs",
            script="trainer.py",
            dtype=dtype,
            init=self.initial,
            labels=len(self.objective.get("labels", [])) or None,
            config=settings,
        )
        return self._counted(run, widened=0.5 if dtype == "bfloat16" else 1.0)

    def _counted(self, run: dict, widened: float) -> dict:
        """The run with its CPU seconds per row. `widened`: bytes of the weights in memory / in the file."""
        size, warm, steps = self.task.rows_per_step, self.task.warm, run["steps"]
        if len(steps) > warm:
            seconds = steps[-1]["cpu_seconds"] - steps[warm - 1]["cpu_seconds"]
            tokens = run["tokens"] if self.task.by_size else [size * (number + 1) for number in range(len(steps))]
            share = (tokens[-1] - tokens[warm - 1]) / tokens[-1]
            run["seconds_per_row"] = seconds / (share * size * len(steps))
        run["weights_bytes"] = round(widened * (self.model / "model.safetensors").stat().st_size)
        run.pop("samples", None)  # of memory over time, which no page shows
        return run


def without_dropout(model: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """Write a copy of the model without dropout, for the comparison of losses."""
    if not names:
        return model
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(names, 0.0)), "utf-8")
    return folder


def gate(side: Side) -> dict[str, Any]:
    """The losses of both sides in float32, and their largest difference."""
    runs = [
        side.ours("tunekit, gate", model=side.still, dtype="float32", max_steps=GATE_STEPS),
        side.theirs("Trainer, gate", model=side.still, config={"max_steps": GATE_STEPS}),
    ]
    ours, theirs = (run["losses"] for run in runs)
    difference = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    return {"ours": ours, "theirs": theirs, "difference": difference}


def fastest(side: Side) -> tuple[str, list[dict]]:
    """Run every candidate once; returns the name of the fastest one. Without bfloat16 products in the processor, those
    with bfloat16 take several times longer, so they do not run."""
    runs, native = [], any("bf16" in flag for flag in hardware()["matrix"])
    for name, changes in side.task.candidates.items():
        if not native and ("bf16" in name or "bfloat16" in name):
            continue
        try:
            runs.append(side.theirs(f"Trainer, {name}", **changes))
        except RuntimeError as error:
            runs.append({"name": f"Trainer, {name}", "failed": str(error)[-2000:]})
            side.bench.say(f"{name}: does not run")
    best = min(runs, key=lambda run: run.get("seconds_per_row", float("inf")))
    return best["name"].removeprefix("Trainer, "), runs


def measured(side: Side) -> dict[str, Any]:
    """Compare the losses of one task, choose the fastest flags, and measure both sides."""
    checked = gate(side)
    side.bench.say(f"largest difference of a loss in float32: {checked['difference']:.1e}")
    if checked["difference"] > SAME:
        sys.exit(f"losses differ: no timing counts\n{json.dumps(checked, indent=1)}")
    best, candidates = fastest(side)
    sides: dict[str, Callable[[], dict]] = {
        "tunekit": lambda: side.ours("tunekit"),
        "Trainer, defaults": lambda: side.theirs("Trainer, defaults"),
        f"Trainer, {best}": lambda: side.theirs(f"Trainer, {best}", **side.task.candidates[best]),
        "tunekit, float32": lambda: side.ours("tunekit, float32", dtype="float32"),
    }
    runs = [run() | {"repeat": repeat} for repeat in range(side.bench.settings.repeats) for run in sides.values()]
    imported = {}
    for run in runs:
        if run["name"] not in imported:
            python = Path(sys.executable) if run["name"].startswith("tunekit") else side.bench.rival_python
            imported[run["name"]] = sum(side.bench.imported_bytes(run, python).values())
        run["above_weights_bytes"] = run["peak_bytes"] - imported[run["name"]] - run["weights_bytes"]
    texts = {"gate": checked, "candidates": candidates, "best": best, "runs": runs, "imported_bytes": imported}
    return {**texts, "told": side.task.told, "summary": summary(runs, list(sides)), "facts": facts(side.bench)}


def summary(runs: list[dict], names: list[str]) -> dict[str, Any]:
    """The medians and ranges of each side. A factor compares two runs of the same repeat."""
    mine = {run["repeat"]: run["seconds_per_row"] for run in runs if run["name"] == names[0]}
    table = {}
    for name in names:
        those = [run for run in runs if run["name"] == name]
        factors = [run["seconds_per_row"] / mine[run["repeat"]] for run in those]
        table[name] = {"seconds_per_row": spread([run["seconds_per_row"] for run in those]), "factor": spread(factors)}
        for key in ("peak_bytes", "above_weights_bytes"):
            table[name][key] = statistics.median(run[key] for run in those)
    return table


def spread(values: list[float]) -> list[float]:
    """The minimum, the median and the maximum."""
    return [min(values), statistics.median(values), max(values)]


def page(results: dict[str, Any]) -> str:
    """encoders.md."""
    lines = [PAGE]
    for name in (name for name in TASKS if name in results):
        one, task = results[name], TASKS[name]
        told, scale, digits = one["facts"], 1000 if task.by_size else 1, 1 if task.by_size else 3
        mine = one["summary"]["tunekit"]["above_weights_bytes"]
        lines.append(
            f"\n## {task.told[0].upper()}{task.told[1:]}\n\nTimes are of steps {task.warm + 1} to {task.steps}, of "
            f"{task.rows_per_step} rows each. Losses in float32 without dropout differ by "
            f"{one['gate']['difference']:.1e} at most in\n{GATE_STEPS} steps. {told['hardware']['processor']}, "
            f"{told['date']}, load average {told['load_before'][0]:.1f} before.\n\n"
        )
        lines.append(HEAD.format(unit="ms" if task.by_size else "seconds"))
        for row, values in one["summary"].items():
            times = " / ".join(f"{scale * value:.{digits}f}" for value in values["seconds_per_row"])
            low, middle, high = values["factor"]
            factor = "" if row == "tunekit" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            above = values["above_weights_bytes"]
            share = "" if row == "tunekit" else f"{mine / above:.2f}"
            lines.append(
                f"| {row} | {times} | {factor} | {values['peak_bytes'] / 1e9:.2f} | {above / 1e6:.0f} | {share} |\n"
            )
        lines.append("\nThe flags, each once, in CPU time per row by that of the fastest:\n\n")
        times = {run["name"]: run.get("seconds_per_row") for run in one["candidates"]}
        least = min(filter(None, times.values()))
        lines += [f"- {key}: {f'{value / least:.2f}' if value else 'does not run'}\n" for key, value in times.items()]
    return "".join(lines)


def main() -> None:
    parser = make_parser(__doc__, {}, steps=0)
    parser.set_defaults(repeats=5)
    for name in TASKS:
        parser.add_argument(f"--{name}", type=Path, help="the model's folder")
    settings: argparse.Namespace = parser.parse_args()
    bench = start(settings)
    make_environment(Path(settings.venv))
    file = Path(settings.output) / "encoders.json"
    results = json.loads(file.read_text("utf-8")) if settings.only and file.exists() else {}
    for name in settings.only.split(",") if settings.only else TASKS:
        if getattr(settings, name) is None:
            sys.exit(f"give --{name} FOLDER")
        results[name] = measured(Side(bench, name, getattr(settings, name).resolve())) | ended(bench)
        keep(bench, results, file.name).with_suffix(".md").write_text(page(results), "utf-8")


if __name__ == "__main__":
    main()
