"""Compares tunekit with TRL's SFTTrainer and with peft in a plain loop, on one core: speed, memory, start-up, loss.

    scripts/bench/run compare [--repeats 3] [--steps 6] [--only NAME,NAME] [--gate-only | --skip-gate]
                          [--first-step-only] [--best NAME] [--venv FOLDER] [--work FOLDER] [--data FILE]
                          [--output FOLDER] [--core N]
                          [--force]

SmolLM2-135M-Instruct, LoRA r16 on all linear layers, bfloat16, 8 rows of instructions to an optimizer step, the same
rows in the same order. Every run is a fresh process on one core with one thread; runs are interleaved, and judged on
ratios of CPU time. tunekit is run as the real `tunekit train`; the other tools run in an environment that this script
makes. First the parity gate compares losses: timings count only if it passes. Results are in cpu.json and cpu.md.

tokens per CPU second = non-padding tokens of all steps from step 3 on / CPU seconds (user and system) between the end
of step 2 and the end of the last step.

memory above the weights = peak resident bytes - resident bytes of a fresh process that has only imported the same
modules - bytes of the base's file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from beside.gate import run_gate
from beside.harness import (
    BESIDE,
    RATE,
    REPOSITORY,
    ROWS_PER_STEP,
    Bench,
    best_flags,
    ended,
    facts,
    find_base,
    interleaved,
    keep,
    make_environment,
    make_parser,
    memory_above,
    start,
    summary,
)

from tunekit.model.storage.builtin import TINY_LLAMA, tiny_model_folder

FIGURES = {
    "minutes": 30,
    "options": "--force --repeats 5",
    "result": "cpu.json",
    "figures": {
        "defaults": {
            "what": "SFT against TRL's defaults",
            "unit": "tokens per CPU second",
            "ours": "summary/tunekit/tokens_per_cpu_second/1",
            "theirs": "summary/TRL, defaults/tokens_per_cpu_second/1",
        },
        "best": {
            "what": "SFT against TRL's best flags",
            "unit": "tokens per CPU second",
            "ours": "summary/tunekit/tokens_per_cpu_second/1",
            "theirs": "summary/TRL, {best_flags/name}/tokens_per_cpu_second/1",
        },
        "loop": {
            "what": "SFT, one row at a time, against peft with a plain loop",
            "unit": "tokens per CPU second",
            "ours": "summary/tunekit, one row at a time/tokens_per_cpu_second/1",
            "theirs": "summary/peft, plain loop/tokens_per_cpu_second/1",
        },
        "memory": {
            "what": "SFT, memory above the weights, against TRL's defaults",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "summary/tunekit/above_weights_bytes",
            "theirs": "summary/TRL, defaults/above_weights_bytes",
        },
        "memory_best": {
            "what": "SFT, memory above the weights, against TRL's best flags",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "summary/tunekit/above_weights_bytes",
            "theirs": "summary/TRL, {best_flags/name}/above_weights_bytes",
        },
        "memory_loop": {
            "what": "SFT, one row at a time, memory above the weights, against peft with a plain loop",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "summary/tunekit, one row at a time/above_weights_bytes",
            "theirs": "summary/peft, plain loop/above_weights_bytes",
        },
        "parity": {
            "what": "largest relative difference of 20 losses in float32 from peft's",
            "unit": "millionths",
            "divisor": 1e-6,
            "digits": 1,
            "ours": "gate/checks/0/found",
        },
        "first_step": {
            "what": "from the command to the end of the first step, against TRL",
            "unit": "CPU seconds",
            "digits": 1,
            "ours": "first_step/first step: tunekit/first_step_cpu_seconds",
            "theirs": "first_step/first step: TRL/first_step_cpu_seconds",
        },
        "smoke": {
            "what": "recipes/smoke.yaml from the command to the end of the first step, against TRL",
            "unit": "CPU seconds",
            "digits": 1,
            "ours": "first_step/smoke: tunekit/first_step_cpu_seconds",
            "theirs": "first_step/smoke: TRL/first_step_cpu_seconds",
        },
    },
}
PLAIN = {"gradient_checkpointing": False}
ONE_ROW = {"micro_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP}
CANDIDATES = {  # of TRL's flags for the best speed on a CPU; all bfloat16: base and adapters, without autocast
    "padded, all bfloat16": {"adapters": "bfloat16", "config": {**PLAIN, "bf16": False}},
    "group_by_length, all bfloat16": {
        "adapters": "bfloat16",
        "config": {**PLAIN, "bf16": False, "train_sampling_strategy": "group_by_length"},
    },
    "one row at a time": {"config": {**PLAIN, **ONE_BY_ONE}},
    "one row at a time, all bfloat16": {"adapters": "bfloat16", "config": {**PLAIN, **ONE_BY_ONE, "bf16": False}},
    "padding_free, all bfloat16": {
        "adapters": "bfloat16",
        "config": {**PLAIN, "bf16": False, "padding_free": True, "max_length": None},
    },
    "packing, all bfloat16": {
        "adapters": "bfloat16",
        "config": {**PLAIN, "bf16": False, "packing": True, "max_length": 1024, "per_device_train_batch_size": 1},
    },
}


def find_rows(named: str | None) -> Path:
    shared = os.environ.get("TUNEKIT_SHARED")
    path = Path(named) if named else Path(shared or "") / "data" / "instruct_seed" / "alpaca_format.jsonl"
    if not path.is_file():
        sys.exit("no rows: give --data FILE (JSON Lines of instruction, input, output), or set TUNEKIT_SHARED")
    return path.resolve()


def timed_runs(bench: Bench, best: str) -> list[dict]:
    """Run every competitor several times."""
    loop = {"dtype": "bfloat16", "rows_per_step": ROWS_PER_STEP, "steps": bench.settings.steps, "learning_rate": RATE}
    sides = {
        "tunekit": lambda: bench.ours("tunekit"),
        "tunekit, one row at a time": lambda: bench.ours("tunekit, one row at a time", training=ONE_ROW),
        "TRL, defaults": lambda: bench.theirs("TRL, defaults", "trl"),
        f"TRL, {best}": lambda: bench.theirs(f"TRL, {best}", "trl", **CANDIDATES[best]),
        "peft, plain loop": lambda: bench.theirs("peft, plain loop", "loop", **loop),
    }
    return interleaved(bench, sides)


def first_steps(bench: Bench) -> list[dict]:
    """Measure the time from the command to the end of the first optimizer step, with all 427 rows as text. The first
    run of each side fills its cache of rows, and does not count."""
    runs = []
    for repeat in range(-1, bench.settings.repeats):
        ours = bench.ours("first step: tunekit", rows="chat", training={"max_steps": 1})
        theirs = bench.theirs("first step: TRL", "trl", rows="turns", config={"max_steps": 1})
        if repeat >= 0:
            runs += [ours | {"repeat": repeat}, theirs | {"repeat": repeat}]
    return runs


def smoke_steps(bench: Bench) -> list[dict]:
    """Measure the time to the first step of recipes/smoke.yaml: a random base of 115,000 parameters and 12 rows, so
    nearly all of the time is start-up. tunekit also evaluates the base before step 1, as the recipe states. Both caches
    are filled."""
    model, rows = tiny_model_folder(TINY_LLAMA), REPOSITORY / "recipes" / "data" / "smoke"
    config = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 128}
    runs = []
    for repeat in range(-1, bench.settings.repeats):
        recipe = REPOSITORY / "recipes" / "smoke.yaml"
        ours = bench.recipe("smoke: tunekit", recipe, "~training.epochs", "training.max_steps=1")
        theirs = bench.theirs("smoke: TRL", "trl", rows=str(rows), model=str(model), config=config)
        if repeat >= 0:
            runs += [ours | {"repeat": repeat}, theirs | {"repeat": repeat}]
    return runs


def main() -> None:
    parser = make_parser(__doc__, CANDIDATES, steps=6)
    parser.add_argument("--gate-only", action="store_true")
    parser.add_argument("--skip-gate", action="store_true", help="the result says so")
    parser.add_argument("--first-step-only", action="store_true", help="only the start-up; no gate, no speed")
    parser.add_argument("--data", help="JSON Lines of instruction, input, output")
    settings = parser.parse_args()
    bench = start(settings)
    make_environment(Path(settings.venv))
    prepare = [str(find_base()), str(find_rows(settings.data)), str(bench.work), str(ROWS_PER_STEP * settings.steps)]
    subprocess.run([sys.executable, str(BESIDE / "prepare.py"), *prepare], check=True, capture_output=True)
    result = facts(bench)
    if not settings.first_step_only:
        result["gate"] = {"skipped": True, "passed": None} if settings.skip_gate else run_gate(bench)
        if result["gate"]["passed"] is False:
            print(json.dumps(result["gate"]["checks"], indent=1))
            sys.exit("the parity gate failed: no timing counts")
        if not settings.gate_only:
            measure(bench, settings, result)
    if not settings.gate_only:
        bench.say("first steps")
        result["first_step_runs"] = [*first_steps(bench), *smoke_steps(bench)]
        result["first_step"] = summary(result["first_step_runs"])
    later = [run for run in result.get("runs", []) if run["repeat"]]
    for run in (*result.get("candidates", []), *later, *result.get("first_step_runs", [])):
        run.pop("samples", None)  # of memory over time; the page shows them for the first repeat
    output = keep(bench, result | ended(bench), "cpu.json")
    if "summary" in result:
        page = [str(bench.rival_python), str(BESIDE / "page.py"), str(output.parent)]
        subprocess.run(page, check=True)


def measure(bench: Bench, settings: argparse.Namespace, result: dict) -> None:
    """Speed and memory."""
    if settings.best:
        best, result["candidates"] = settings.best, []
    else:
        bench.say("TRL's flags, each once")
        best, result["candidates"] = best_flags(bench, "trl", CANDIDATES)
    result["best_flags"] = {"name": best, **CANDIDATES[best]}
    bench.say("timed runs, interleaved")
    result["runs"] = timed_runs(bench, best)
    result["imported_bytes"] = memory_above(bench, result["runs"])
    result["summary"] = summary(result["runs"])


if __name__ == "__main__":
    main()
