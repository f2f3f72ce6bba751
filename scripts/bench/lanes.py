"""Compares eight trials of a sweep over one streamed base with eight `tunekit train`: CPU seconds and peak memory.

    scripts/bench/run lanes [--tokens 16,80,256] [--lanes 8] [--rank 16] [--layers 22] [--steps 4]
        [--quantization nf4] [--dtype bfloat16] [--json FILE] [--work FOLDER]

The base is TinyLlama's shape (1.1B parameters, random weights), streamed from disk; each step has one row of
--tokens tokens; LoRA r16 on all linear layers; one thread. Take --dtype float32 on a processor without bfloat16. Both
sides are fresh processes of the real commands. One `train` is measured and counted eight times, because the eight runs
differ only in their learning rate. It is measured before and after the sweep, so that other programs slow both sides.

- a step: CPU seconds of all trials together, from the end of one step to the end of the next, without the first step
  and the measurements before it
- a process: all CPU seconds, with imports, planning, loading and the export
- memory: the peak of the process. The bar is the peak of one run, and for each further trial its adapter, gradient,
  moments and the hidden states between layers, plus 10 %.

Checked: the adapter of a trial equals the adapter of its `train`, byte for byte (one trial is compared).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from shutil import rmtree

from beside.harness import hardware
from estimate import run_python, write_rows
from load import HIDDEN
from stream import write_model

FIGURES = {
    "minutes": 40,
    "options": "--json $RESULTS/lanes.json",
    "result": "lanes.json",
    "figures": {
        "step16": {
            "what": "a step of 8 trials of 16 tokens over a streamed base of 1.1B parameters in NF4",
            "unit": "CPU seconds",
            "digits": 1,
            "ours": "rows/8x16/together/step",
            "theirs": "rows/8x16/alone/step",
        },
        "step80": {
            "what": "the same with 80 tokens",
            "unit": "CPU seconds",
            "digits": 1,
            "ours": "rows/8x80/together/step",
            "theirs": "rows/8x80/alone/step",
        },
        "step256": {
            "what": "the same with 256 tokens",
            "unit": "CPU seconds",
            "digits": 1,
            "ours": "rows/8x256/together/step",
            "theirs": "rows/8x256/alone/step",
        },
    },
}
STATE_BYTES = 16  # of a trained number: weight, gradient and two moments in float32

RUN = """
import json, os, resource, sys, time
sys.path.insert(0, {repository!r})
from tunekit.machine.variables import variables
os.environ.update(variables())
import torch
torch.set_num_threads(1)
from tunekit.training.engine import Engine
ends, run = [], Engine.run
def timed(engine, works):
    results = run(engine, works)
    if not any(work.batches.is_dry_run for work in works):
        ends.append(time.process_time())
    return results
Engine.run = timed
verb, recipe, *overrides = sys.argv[1:]
if verb == "sweep":
    from tunekit.recipe.reading.trial_recipes import load_sweep
    from tunekit.sweep import sweep_verb
    sweep_verb(load_sweep(recipe, overrides), False, None)
else:
    from tunekit.recipe.load import load_recipe
    from tunekit.train import train_verb
    train_verb(load_recipe(recipe, overrides), False, False)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"ends": ends, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}}))
"""


def rates_of(lanes: int) -> list[str]:
    """The learning rates of the trials."""
    return [f"{rate}e-4" for rate in range(1, lanes + 1)]


def side(processes: Sequence[dict], steps: int) -> dict[str, float]:
    """The figures of processes that ran the same command: `steps` steps each, after measurements that plan needs."""
    ends = [process["ends"][-steps:] for process in processes]
    return {
        "step": statistics.median(after - before for each in ends for before, after in pairwise(each)),
        "process": statistics.mean(process["cpu_seconds"] for process in processes),
        "peak_bytes": max(process["peak_bytes"] for process in processes),
    }


def write_recipe(folder: Path, tokens: int, options: argparse.Namespace) -> Path:
    """Write the recipe and rows of `tokens` tokens each."""
    rows = str(folder / "rows.jsonl")
    write_rows(Path(rows), options.steps, tokens)
    training = {"max_steps": options.steps, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "warmup_ratio": 0}
    recipe = {
        "model": {
            "name_or_path": str(folder / "model"),
            "dtype": options.dtype,
            "quantization": options.quantization,
        },
        "data": {"train": rows, "eval": [rows], "max_length": max(tokens, 16)},  # a sweep compares evaluations
        "adapter": {"method": "lora", "r": options.rank},
        "training": training,
        "memory": {"streaming": "disk"},
        "evaluation": {"before_training": False},
        "output": {"dir": "run"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


def measure(folder: Path, tokens: int, options: argparse.Namespace) -> dict[str, object]:
    """Both sides of one size."""
    path, swept, alone = write_recipe(folder, tokens, options), folder / f"sweep-{tokens}", folder / f"train-{tokens}"
    rates = rates_of(options.lanes)
    first = [f"training.learning_rate={rates[0]}", f"output.dir={alone}"]
    more = [f"training.learning_rate={','.join(rates)}", f"output.dir={swept}"]
    before = run_python(RUN, "train", str(path), *first)
    together = side([run_python(RUN, "sweep", str(path), *more)], options.steps)
    rmtree(alone)
    solo = side([before, run_python(RUN, "train", str(path), *first)], options.steps)
    trial = next(each for each in sorted(swept.iterdir()) if each.name.endswith("0.0001"))
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (trial, alone)]
    plan = json.loads((alone / "plan.json").read_text("utf-8"))
    of_number = 4 if options.dtype == "float32" else 2
    added = plan["trainable_parameters"] * STATE_BYTES + options.layers * tokens * HIDDEN * of_number
    return {
        "tokens": tokens,
        "lanes": options.lanes,
        "dtype": options.dtype,
        "together": together,
        "alone": {key: value * (1 if key == "peak_bytes" else options.lanes) for key, value in solo.items()},
        "bar_bytes": round(1.1 * (solo["peak_bytes"] + (options.lanes - 1) * added)),
        "equal": weights[0] == weights[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16,80,256")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    rows = json.loads(options.json.read_text("utf-8"))["rows"] if options.json and options.json.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        folder = Path(scratch)
        os.environ["TUNEKIT_CACHE"] = str(folder / "cache")
        write_model(folder / "model", options.layers)
        warm = [f"output.dir={folder / 'warm'}", "training.max_steps=1"]  # packs the base into the cache
        run_python(RUN, "train", str(write_recipe(folder, 16, options)), *warm)
        for tokens in map(int, options.tokens.split(",")):
            row = {**measure(folder, tokens, options), "load": os.getloadavg(), "processor": hardware()["processor"]}
            of_dtype = "" if options.dtype == "bfloat16" else f" {options.dtype}"
            rows[f"{options.lanes}x{tokens}{of_dtype}"] = row
            ours, theirs = row["together"], row["alone"]
            print(
                f"{tokens} tokens: step {ours['step']:.2f} against {theirs['step']:.2f} CPU seconds "
                f"({theirs['step'] / ours['step']:.2f}x), process {ours['process']:.0f} against "
                f"{theirs['process']:.0f} ({theirs['process'] / ours['process']:.2f}x), peak "
                f"{ours['peak_bytes'] / 1e6:.0f} MB (bar {row['bar_bytes'] / 1e6:.0f}, one run "
                f"{theirs['peak_bytes'] / 1e6:.0f}); equal: {row['equal']}",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    if not all(row["equal"] for row in rows.values()):
        sys.exit("a trial differs from its own train")


if __name__ == "__main__":
    main()
