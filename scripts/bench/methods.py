"""Compares adapter methods on two data sets with three seeds, for the page "Which method?".

    scripts/bench/run methods --minilm FOLDER [--data banking,orders] [--methods NAME,NAME] [--seeds 0-2] [--minutes N]
                          [--page] [--work FOLDER] [--output FOLDER] [--core N]

banking: the 77 intents of Banking77, all-MiniLM-L6-v2, 10 training rows of each intent, drawn by seed. orders: the rows
of the quickstart, SmolLM2-135M-Instruct. A tenth of the training rows only chooses the learning rate: with seed 0, each
method is trained with rates at factors of about 3, until the best one has a worse one on both sides. All seeds use this
rate. Test rows choose nothing.

A unit is one `tunekit train` and one `tunekit eval` in fresh processes on one core with one thread. A unit is written
to methods.json when it is finished, and is never measured again, so a stopped command can be continued. --minutes N:
start no unit after N minutes. --page: only write methods.md and the page. Rows come from TUNEKIT_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beside.harness import FOLDER, REPOSITORY, find_base, hardware
from beside.units import Results
from beside.watch import watch
from cards import filled
from halving import banking, orders, write_rows

Unit = dict[str, Any]
LOW_RANK = {"method": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": LOW_RANK,
    "rsLoRA": {**LOW_RANK, "use_rslora": True},
    "DoRA": {**LOW_RANK, "method": "dora"},
    "PiSSA": {**LOW_RANK, "alpha": 16, "start": "pissa"},
    "IA3": {"method": "ia3", "target_modules": "all-linear"},
    "prompt": {"method": "prompt", "num_virtual_tokens": 40},
    "full": {"method": "full"},
}
FIRST_RATES = {"LoRA": 1e-3, "rsLoRA": 3e-4, "DoRA": 1e-3, "PiSSA": 3e-4, "IA3": 1e-2, "prompt": 1e-2, "full": 1e-4}
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FEED_FORWARD = {  # modules whose inputs IA3 scales
    "banking": ["intermediate.dense", "output.dense"],
    "orders": ["gate_proj", "up_proj", "down_proj"],
}
SIZES = {"banking": (10, 13), "orders": (0, 0)}  # rows of each intent to learn from and to test on; orders has its own
NOT_FINITE = 3  # the exit code of a run whose numbers went wrong
METRICS = {"banking": "accuracy", "orders": "exact_match"}
BASES = {"banking": "all-MiniLM-L6-v2", "orders": "SmolLM2-135M-Instruct"}
HEAD = """# Adapter methods on two data sets

Made by `scripts/bench/run methods` on {date}; every unit is in [methods.json](methods.json). banking: 77 intents,
693 training rows and 1,001 test rows, all-MiniLM-L6-v2, 8 epochs, accuracy. orders: the quickstart, 216 training
rows and 60 test rows, SmolLM2-135M-Instruct, 1 epoch, exact match of greedy answers. LoRA, rsLoRA, DoRA and PiSSA
have rank 16 on all linear layers; prompt has 40 vectors. Each method has its best of the tried rates, chosen with seed
0 on rows that no figure below counts. A value is the mean over the seeds, with the minimum and the maximum. CPU
seconds and memory are of the training alone, on one core of {processor}.

"""
COLUMNS = (
    *("data", "method", "seeds", "rate (tried)", "metric", "min, max", "loss"),
    *("trained", "MB", "CPU s", "peak, MB"),
)
PAGES = REPOSITORY / "scripts" / "site" / "pages" / "guide"
PAGE_COLUMNS = ("method", "banking: accuracy", "orders: exact match", "CPU time", "peak memory", "adapter")
NOT_MEASURED = "There are no figures yet: `scripts/bench/run methods` was not run to its end."


def rows_of(name: str, data: Path, seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows to learn from, rows to choose the rate (a tenth), and test rows."""
    draw = random.Random(seed)
    train, test = {"banking": banking, "orders": orders}[name](data, draw, *SIZES[name])
    draw.shuffle(train)
    count = len(train) // 10
    return train[count:], train[:count], test


def recipe_of(name: str, method: str, rate: float, seed: int, base: Path) -> dict[str, Any]:
    """The recipe of a unit, as a mapping. Paths are relative to the unit's folder."""
    adapter = dict(ADAPTERS[method])
    if method == "IA3":
        adapter["feedforward_modules"] = FEED_FORWARD[name]
    classifies = name == "banking"
    return {
        "model": str(base),
        "data": {"train": "train.jsonl", "eval": ["choose.jsonl"], "max_length": 64 if classifies else 256},
        "objective": "classify" if classifies else "sft",
        "adapter": adapter,
        "training": {
            "learning_rate": rate,
            "epochs": 8 if classifies else 1,
            "micro_batch_size": 16 if classifies else 4,
            "gradient_accumulation_steps": 1,
            "seed": seed,
            "warmup_ratio": 0.05,
            "save_steps": 10**6,
            "eval_steps": 10**6,
        },
        "evaluation": {"before_training": False, "max_new_tokens": 32, "batch_size": 20},
        "output": {"dir": "run"},
    }


def run_unit(key: str, base: Path, work: Path, core: int) -> Unit:
    """Train and evaluate one unit. `key`: data, method, rate and seed, separated by bars."""
    name, method, rate, seed = key.split("|")
    place = work / key.replace("|", "-")
    train, choose, test = rows_of(name, Path(os.environ.get("TUNEKIT_SHARED", "")) / "data", int(seed))
    write_rows(place, train, test)
    (place / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choose), "utf-8")
    (place / "recipe.yaml").write_text(json.dumps(recipe_of(name, method, float(rate), int(seed), base)), "utf-8")
    log, environment = place / "run" / "metrics.jsonl", {"PYTHONPATH": str(REPOSITORY)}
    tunekit = [sys.executable, "-m", "tunekit"]
    try:
        argv = [*tunekit, "train", str(place / "recipe.yaml")]
        measured = watch(argv, log, place / "output.txt", core=core, environment=environment)
    except RuntimeError as error:
        status = place / "run" / "status.json"
        if not status.exists() or json.loads(status.read_text("utf-8"))["exit_code"] != NOT_FINITE:
            raise  # only a rate that is much too high is a result
        return {"failed": str(error).strip().splitlines()[-1][:200]}
    chosen = [json.loads(line)["eval"]["loss"] for line in log.read_text("utf-8").splitlines() if '"eval"' in line]
    scores = place / "scores.json"
    options = ["--data", str(place / "test.jsonl"), "--metric", METRICS[name], "--metric", "loss"]
    argv = [*tunekit, "eval", str(place / "run"), *options, "--json", str(scores)]
    watch(argv, place / "none.jsonl", place / "eval.txt", core=core, environment=environment)
    tested, report = (json.loads(file.read_text("utf-8")) for file in (scores, place / "run" / "report.json"))
    return {
        "rows": [len(train), len(choose), len(test)],
        "choice_loss": chosen[-1],
        "test_loss": tested["loss"],
        "metric": tested[METRICS[name]],
        "trainable_parameters": report["trainable_parameters"],
        "adapter_bytes": report["adapter_bytes"],
        "cpu_seconds": round(measured["cpu_seconds"], 1),
        "peak_bytes": measured["peak_bytes"],
        "processor": hardware()["processor"],
        "date": time.strftime("%Y-%m-%d"),
    }


def tried_rates(units: Mapping[str, Unit], name: str, method: str) -> dict[float, float]:
    """The loss on the rows that choose, by rate, of the finished units of seed 0. A failed run has an infinite loss."""
    losses = {}
    for key, unit in units.items():
        data, owner, rate, seed = key.split("|")
        if (data, owner, seed) == (name, method, "0"):
            losses[float(rate)] = unit.get("choice_loss", math.inf)
    return losses


def next_rate(losses: Mapping[float, float], first: float) -> float | None:
    """The next rate to try: first, then both neighbours of the best rate; None if both were tried."""
    if not losses:
        return first
    at = RATES.index(min(losses, key=lambda rate: losses[rate]))
    return next((rate for rate in RATES[max(at - 1, 0) : at + 2] if rate not in losses), None)


def next_key(units: Mapping[str, Unit], name: str, method: str, seed: int) -> str | None:
    """The next unit of a method with this seed; None if there is none."""
    losses = tried_rates(units, name, method)
    rate = next_rate(losses, FIRST_RATES[method])
    if rate is None:
        rate = min(losses, key=lambda each: losses[each])
    elif seed:
        raise ValueError(f"{name}, {method}: seed 0 has not chosen a rate yet")
    key = f"{name}|{method}|{rate:g}|{seed}"
    return None if key in units else key


def summaries(units: Mapping[str, Unit]) -> dict[tuple[str, str], dict[str, Any]]:
    """The results of each method whose rate is chosen, by data and method. Means are over the seeds."""
    results = {}
    for name in BASES:
        for method in ADAPTERS:
            losses = tried_rates(units, name, method)
            if next_rate(losses, FIRST_RATES[method]) is not None:
                continue
            rate = min(losses, key=lambda each: losses[each])
            seeds = [unit for key, unit in units.items() if key.startswith(f"{name}|{method}|{rate:g}|")]
            seeds = [unit for unit in seeds if "failed" not in unit]
            if seeds:
                results[name, method] = {"rate": rate, "tried": len(losses), "units": seeds}
    return results


def mean(units: list[Unit], key: str) -> float:
    return statistics.mean(unit[key] for unit in units)


def size(count: float) -> str:
    """A number of bytes as MB with two digits."""
    megabytes = count / 1e6
    return f"{megabytes:.0f}" if megabytes >= 10 else f"{megabytes:.2g}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    return line(list(columns)) + f"|---|{'--:|' * (len(columns) - 1)}\n" + "".join(map(line, rows))


def results_page(units: Mapping[str, Unit]) -> str:
    """methods.md."""
    rows = []
    for (name, method), result in summaries(units).items():
        seeds = result["units"]
        metrics = [unit["metric"] for unit in seeds]
        rows.append([
            *(name, method, f"{len(seeds)}", f"{result['rate']:g} ({result['tried']})"),
            *(f"{statistics.mean(metrics):.1%}", f"{min(metrics):.1%}, {max(metrics):.1%}"),
            *(f"{mean(seeds, 'test_loss'):.3f}", f"{seeds[0]['trainable_parameters']:,}"),
            *(size(mean(seeds, "adapter_bytes")), f"{mean(seeds, 'cpu_seconds'):.0f}"),
            size(mean(seeds, "peak_bytes")),
        ])  # fmt: skip
    whole = [unit for unit in units.values() if "failed" not in unit]
    date = max((unit["date"] for unit in whole), default="")
    processors = " and ".join(sorted({unit["processor"] for unit in whole}))
    return HEAD.format(date=date, processor=processors) + table(COLUMNS, rows)


def guide_table(units: Mapping[str, Unit]) -> str:
    """The table for the page of the guide, or a sentence if a method has no result or not all seeds."""
    results = summaries(units)
    counts = {len(result["units"]) for result in results.values()}
    if len(results) < len(BASES) * len(ADAPTERS) or min(counts) < 3:
        return NOT_MEASURED
    rows, lora = [], {name: results[name, "LoRA"]["units"] for name in BASES}
    for method in ADAPTERS:
        own = {name: results[name, method]["units"] for name in BASES}
        spreads = []
        for name in BASES:
            metrics = [unit["metric"] for unit in own[name]]
            spreads.append(f"{statistics.mean(metrics):.1%} ({min(metrics):.1%} to {max(metrics):.1%})")
        shares = [
            ", ".join(f"{mean(own[name], key) / mean(lora[name], key):.2f}" for name in BASES)
            for key in ("cpu_seconds", "peak_bytes")
        ]
        rows.append([method, *spreads, *shares, ", ".join(size(mean(own[name], "adapter_bytes")) for name in BASES)])
    date = max(unit["date"] for result in results.values() for unit in result["units"])
    note = (
        f"Measured on {date}, three seeds: mean (minimum to maximum). CPU time and peak memory of training: divided by "
        "LoRA's, on banking and on orders. Adapter: MB; of full, the whole model."
    )
    return f"{table(PAGE_COLUMNS, rows)}\n{note}"


def write_pages(units: Mapping[str, Unit], output: Path) -> None:
    """Write methods.md, and the table into the page of the guide."""
    (output / "methods.md").write_text(results_page(units), "utf-8")
    page = PAGES / "method.md"
    page.write_text(filled(page.read_text("utf-8"), "quality", guide_table(units)), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, default=Path(os.environ.get("TUNEKIT_MINILM", "")))
    parser.add_argument("--data", default=",".join(BASES))
    parser.add_argument("--methods", default=",".join(ADAPTERS))
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".cache" / "bench" / "methods")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    settings = parser.parse_args()
    results, started = Results(settings.output / "methods.json"), time.monotonic()
    first, _, last = settings.seeds.partition("-")
    for seed in range(int(first), int(last or first) + 1):
        for name in settings.data.split(","):
            for method in settings.methods.split(","):
                while not settings.page and time.monotonic() - started < settings.minutes * 60:
                    key = next_key(results.units, name, method, seed)
                    if key is None:
                        break
                    base = settings.minilm if name == "banking" else find_base()
                    results.add(key, run_unit(key, base.resolve(), settings.work.resolve(), settings.core))
                    unit = results.units[key]
                    print(key, unit.get("failed") or f"{unit['choice_loss']:.4f} {unit['metric']:.3f}", flush=True)
    write_pages(results.units, settings.output)


if __name__ == "__main__":
    main()
