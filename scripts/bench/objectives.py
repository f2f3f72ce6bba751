"""Measures what each objective learns from few rows: its metric on held-out rows before and after training, next to
baselines.

    scripts/bench/run objectives [--only NAME,NAME] [--seeds 3] [--folds 5] [--minutes N] [--page] [--work FOLDER]
                             [--output FOLDER] [--core N]

A unit has one seed (for pairs: one seed and one fold). It is one real `tunekit train` in a fresh process on one core
with one thread, of at most five CPU minutes. A unit is written to objectives.json when it is finished, and is never
measured again, so a stopped command can be continued. --minutes N: start no unit after N minutes. --page: only write
the page, objectives.md. The held-out rows choose neither a checkpoint nor a setting. The rows come from
TUNEKIT_SHARED/data. The base is SmolLM2-135M-Instruct; for tags, it is all-MiniLM-L6-v2 (in the folder TUNEKIT_MINILM).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from beside.harness import FOLDER, REPOSITORY, find_base, hardware
from beside.prepare import write_base
from beside.tasks import TASKS, Split, Task, paired_accuracy
from beside.units import Results, write_parts
from beside.watch import watch

MOST_SECONDS = 300


def run_unit(task: Task, split: Split, base: Path, work: Path, core: int) -> dict:
    """Run one training; returns its results."""
    place = work / "units" / split.name
    write_parts(place, train=split.train, held=split.held)
    recipe = task.recipe(base, place, split.seed)
    (place / "recipe.yaml").write_text(json.dumps(recipe, indent=1), "utf-8")
    argv = [sys.executable, "-m", "tunekit", "train", str(place / "recipe.yaml"), "--overwrite"]
    log = place / "run" / "metrics.jsonl"
    found = watch(argv, log, place / "output.txt", core=core, environment={"PYTHONPATH": str(REPOSITORY)})
    if found["cpu_seconds"] > MOST_SECONDS:
        print(f"{split.name}: {found['cpu_seconds']:.0f} CPU seconds, more than {MOST_SECONDS}", flush=True)
    report = json.loads((place / "run" / "report.json").read_text("utf-8"))
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    evaluations = {line["step"]: line["eval"] for line in lines if "eval" in line}
    after = evaluations[max(evaluations)].get(task.metric)
    if after is None:  # kto has single answers: its preference is measured on the held-out pairs
        after = paired_accuracy(place / "run", place / "held.jsonl", task.data["max_length"])
    return {
        "task": task.name,
        "seed": split.seed,
        "rows": [len(split.train), len(split.held)],
        "before": evaluations[0].get(task.metric) if 0 in evaluations else None,
        "after": after,
        "baselines": split.baselines,
        "adapter_bytes": report["adapter_bytes"],
        "predicted_bytes": report["predicted_bytes"],
        "measured_bytes": report["measured_bytes"],
        "cpu_seconds": found["cpu_seconds"],
        "load": os.getloadavg()[0],
        "processor": hardware()["processor"],
        "date": time.strftime("%Y-%m-%d"),
    }


HEAD = """# What objectives learn from few rows

Made by `scripts/bench/run objectives`; every unit is in [objectives.json](objectives.json). On one CPU core, one
thread, LoRA r16 on all linear layers, in bfloat16 where the processor computes it. Held-out rows decided nothing. A
value is the mean over the seeds, with the least and the most of them; of pairs each seed's value is that of all its
folds together, in which each pair is held out once. Interval: 95 % (Wilson), of one seed's held-out rows. Pairs are
those whose prompts have fewer than 120 words, cut at 256 tokens; 64 of them train a fold, for two epochs (KTO, whose
KL takes as many forwards again, for one). Memory is the peak of the run, as plan predicted it and as measured. CPU
seconds are of {processors}, whose other core was often busy, which made some runs of DPO twice as long.

| objective | base | units | before | after | least, most | interval | baselines | adapter, MB | CPU s """
HEAD += "| predicted, MB | measured, MB |\n|---|---|--:|--:|--:|---|---|---|--:|--:|--:|--:|\n"


def page(units: dict[str, dict]) -> str:
    """The table of what is finished."""
    lines = []
    for name, task in TASKS.items():
        own = [unit for unit in units.values() if unit["task"] == name]
        seeds = sorted({unit["seed"] for unit in own})
        if not own:
            continue
        after, before = ([pooled(own, seed, key) for seed in seeds] for key in ("after", "before"))
        held = sum(unit["rows"][1] for unit in own if unit["seed"] == seeds[0])
        low, high = wilson(statistics.mean(after), held)
        kinds = own[0]["baselines"]
        beside = ", ".join(f"{kind} {mean([unit['baselines'][kind] for unit in own]):.3f}" for kind in kinds)
        first = "" if None in before else f"{mean(before):.3f}"
        cells = [f"{task.told}", task.base, f"{len(own)}", first, f"**{mean(after):.3f}**"]
        interval = "" if task.metric == "span_f1" else f"{low:.2f} to {high:.2f} of {held}"  # F1 is no share of rows
        cells += [f"{min(after):.3f}, {max(after):.3f}", interval, beside]
        cells += [f"{most(own, 'adapter_bytes') / 1e6:.1f}", f"{mean([unit['cpu_seconds'] for unit in own]):.0f}"]
        cells += [f"{most(own, key) / 1e6:.0f}" for key in ("predicted_bytes", "measured_bytes")]
        lines.append(f"| {' | '.join(cells)} |\n")
    processors = " and ".join(sorted({unit["processor"] for unit in units.values()}))
    return HEAD.replace("{processors}", processors) + "".join(lines)


def pooled(units: list[dict], seed: int, key: str) -> float | None:
    """The mean of a value over all folds of a seed, weighted by their held-out rows."""
    own = [unit for unit in units if unit["seed"] == seed]
    if any(unit[key] is None for unit in own):
        return None
    return sum(unit[key] * unit["rows"][1] for unit in own) / sum(unit["rows"][1] for unit in own)


def mean(values: list) -> float:
    return statistics.mean(values)


def most(units: list[dict], key: str) -> float:
    """The largest value of all units; for memory, the value on the device."""
    return max(value if isinstance(value := unit[key], int) else max(value.values()) for unit in units)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `count` rows."""
    middle, wide = share + z**2 / (2 * count), z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return (middle - wide) / (1 + z**2 / count), (middle + wide) / (1 + z**2 / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5, help="of the five, how many")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", default=str(REPOSITORY / ".cache" / "bench"))
    parser.add_argument("--output", default=str(FOLDER / "results"))
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    settings = parser.parse_args()
    output, work, started = Path(settings.output), Path(settings.work).resolve(), time.monotonic()
    results = Results(output / "objectives.json")
    shared = Path(os.environ.get("TUNEKIT_SHARED", "")) / "data"
    if not settings.page:
        if not (work / "model" / "model.safetensors").exists():
            write_base(find_base(), work / "model")
        bases = {
            "SmolLM2-135M-Instruct": work / "model",
            "all-MiniLM-L6-v2": Path(os.environ.get("TUNEKIT_MINILM", "")),
        }
        names = settings.only.split(",")
        wanted = [(TASKS[name], seed) for seed in range(settings.seeds) for name in names]  # each of them once first
        for task, seed in wanted:
            for split in task.splits(shared, seed, settings.folds):
                if split.name in results.units:
                    continue
                if time.monotonic() - started > settings.minutes * 60:
                    break
                unit = run_unit(task, split, bases[task.base], work, settings.core)
                results.add(split.name, unit)
                (output / "objectives.md").write_text(page(results.units), "utf-8")
                print(
                    f"{time.strftime('%H:%M:%S')} {split.name}: {task.metric} {unit['before']} -> {unit['after']:.3f}, "
                    f"{unit['baselines']}, {unit['cpu_seconds']:.0f} CPU s",
                    flush=True,
                )
    (output / "objectives.md").write_text(page(results.units), "utf-8")


if __name__ == "__main__":
    main()
