"""Measures Whisper before and after a short LoRA run on spoken digits: word error rates on held-out takes and speakers,
dense and int8, over seeds: scripts/results/speech.md. Runs that are already in speech.json are not repeated.

Needs the digits of the shared data (TUNEKIT_SHARED) and folders of Whisper models. A model with a shorter window (the
same weights, fewer encoder positions) makes a step on a CPU cheaper, and recognises these clips of under a second too.

usage: scripts/bench/run speech NAME=FOLDER [NAME=FOLDER ...] [--quantization none int8] [--seeds 0 1 2] [--steps 30]
                            [--splits takes speakers]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from beside.harness import json_text

from tunekit.model.speech.processor import load_speech_processor
from tunekit.recipe.model import ModelSection

SCRIPTS = Path(__file__).resolve().parent.parent
RESULTS = SCRIPTS / "results" / "speech.json"
DIGITS = "data/audio_digits_fsdd"
HELD_TAKE = "7"  # of two takes, 0 and 7, of each digit by each speaker
RESAMPLES = 10_000
ADAPTER = {"method": "lora", "r": 16, "alpha": 32, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {"learning_rate": 1e-3, "micro_batch_size": 10, "gradient_accumulation_steps": 1, "warmup_ratio": 0.1}

Row = dict[str, Any]


def split_rows(rows: Sequence[Row], split: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows. Held out are the second take of each digit, or all rows of one speaker, which
    the seed selects."""
    speakers = sorted({row["speaker"] for row in rows})
    held_speaker = speakers[seed % len(speakers)]

    def held(row: Row) -> bool:
        take = Path(row["audio"]).stem.rpartition("_")[2]
        return take == HELD_TAKE if split == "takes" else bool(row["speaker"] == held_speaker)

    return [row for row in rows if not held(row)], [row for row in rows if held(row)]


def tunekit(*words: str) -> str:
    """Run a command; returns its output. Raises: CalledProcessError."""
    command = [sys.executable, "-m", "tunekit", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def answers(target: str, folder: Path, held: Sequence[Row], *overrides: str) -> list[str]:
    """The target's transcript of each clip."""
    listed = folder / "clips.txt"
    listed.write_text("".join(f"{row['audio']}\n" for row in held), encoding="utf-8")
    said = tunekit("generate", target, "--prompts", str(listed), "evaluation.max_new_tokens=16", *overrides)
    return [json.loads(line)["answer"] for line in said.splitlines()]


def errors(model: Path, held: Sequence[Row], said: Sequence[str]) -> dict[str, list[int]]:
    """Word errors of each clip, raw and after the model's normaliser; each clip is one word."""
    normalize = load_speech_processor(ModelSection(name_or_path=str(model))).normalize
    found: dict[str, list[int]] = {}
    for name, shape in (("raw", str), ("normalized", normalize)):
        pairs = [
            (str(shape(row["text"])).strip(), str(shape(text)).strip()) for row, text in zip(held, said, strict=True)
        ]
        output = [jiwer.process_words(reference, answer) for reference, answer in pairs]
        found[name] = [each.substitutions + each.deletions + each.insertions for each in output]
    return found


def measure(model: Path, quantization: str, split: str, seed: int, steps: int) -> dict[str, Any]:
    """Run one training; returns the errors of each clip before and after."""
    data = Path(os.environ["TUNEKIT_SHARED"]) / DIGITS
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        row["audio"] = str(data / row["audio"])
    trained, held = split_rows(rows, split, seed)
    base = ["model.dtype=float32", f"model.quantization={quantization}"]
    language = "en" if load_speech_processor(ModelSection(name_or_path=str(model))).multilingual else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained), encoding="utf-8")
        recipe = {
            "model": {"name_or_path": str(model), "dtype": "float32", "quantization": quantization},
            "data": {"train": str(folder / "train.jsonl")},
            "objective": {"method": "speech", "apply_spec_augment": True, "language": language},
            "adapter": ADAPTER,
            "training": {**TRAINING, "max_steps": steps, "seed": seed},
            "output": {"dir": str(folder / "run")},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        before = errors(model, held, answers(str(model), folder, held, *base))
        started = time.monotonic()
        tunekit("train", str(folder / "recipe.yaml"))
        seconds = time.monotonic() - started
        after = errors(model, held, answers(str(folder / "run"), folder, held))
        report = json.loads((folder / "run" / "report.json").read_text("utf-8"))
    return {"clips": len(held), "before": before, "after": after, "train_seconds": round(seconds, 1),
            "adapter_bytes": report["adapter_bytes"], "final_loss": report["final_loss"]}  # fmt: skip


def interval(errors_of_clips: Sequence[int]) -> tuple[float, float, float]:
    """The mean number of errors per word, and its 95 % interval over resamples of the clips (percentile bootstrap)."""
    values = np.asarray(errors_of_clips, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def page(results: dict[str, dict[str, Any]], steps: int) -> str:
    """A line for each model, base and split, over its seeds."""
    lines = [
        "# Whisper on spoken digits, before and after",
        "",
        f"Word error rate of clips that were held back, after {steps} steps of LoRA (rank {ADAPTER['r']}, q_proj and",
        f"v_proj, {TRAINING['micro_batch_size']} clips a step, rate {TRAINING['learning_rate']:g}, with SpecAugment),",
        "float32 or int8, on one CPU core.",
        "takes: trained on one take of ten digits by three speakers, measured on another. speakers: trained on two",
        "speakers, measured on the third, another one for each seed. A clip is one word; the intervals are 95 %, over",
        "10,000 resamples of all seeds' clips. normalized: after Whisper's normaliser for English without its table of",
        "spellings, so that 7 and seven are one word. A name ending in -5s: the model's weights, but of the encoder's",
        "positions the first 250, 5 s in place of 30, which is not what it was trained with: WER before is of that.",
        "base writes many languages; before it finds the language out by itself, and is trained to write English.",
        "Seconds are of a core that other work shared, and compare nothing.",
        "",
        "| model | base | held back | seeds | clips | WER before | after | normalized before | after | seconds a run |",
        "|---|---|---|--:|--:|---|---|---|---|--:|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, value in sorted(results.items()):
        name, quantization, split, _ = key.split(" ")
        groups.setdefault((name, quantization, split), []).append(value)
    for (name, quantization, split), found in groups.items():
        cells = []
        for kind in ("raw", "normalized"):
            for moment in ("before", "after"):
                mean, low, high = interval([each for one in found for each in one[moment][kind]])
                cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        clips, seconds = sum(one["clips"] for one in found), np.mean([one["train_seconds"] for one in found])
        lines.append(
            f"| {name} | {'float32' if quantization == 'none' else quantization} | {split} | {len(found)} | {clips} | "
            f"{' | '.join(cells)} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/run speech")
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--splits", nargs="+", default=["takes", "speakers"], choices=["takes", "speakers"])
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"steps": given.steps, "runs": {}}
    if kept["steps"] != given.steps:
        sys.exit(f"{RESULTS} has runs of {kept['steps']} steps: remove it, or write --steps {kept['steps']}")
    for model in given.models:
        name, _, folder = model.partition("=")
        for quantization in given.quantization:
            for split in given.splits:
                for seed in given.seeds:
                    key = f"{name} {quantization} {split} {seed}"
                    if key in kept["runs"]:
                        continue
                    kept["runs"][key] = measure(Path(folder), quantization, split, seed, given.steps)
                    RESULTS.write_text(json_text(kept) + "\n", encoding="utf-8")
                    RESULTS.with_suffix(".md").write_text(page(kept["runs"], given.steps), encoding="utf-8")
                    print(
                        key,
                        {
                            k: [round(float(np.mean(v)), 3) for v in kept["runs"][key][k].values()]
                            for k in ("before", "after")
                        },
                    )
    RESULTS.with_suffix(".md").write_text(page(kept["runs"], kept["steps"]), encoding="utf-8")


if __name__ == "__main__":
    main()
