"""Benchmarks that consist of units: their results file, their options, the loop over units, and a command of a unit.

A unit is measured once. It is on disk before the next one starts, so a stopped benchmark can be continued.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from beside.harness import FOLDER, REPOSITORY, json_text
from beside.watch import ENVIRONMENT

MINILM, SMOLLM = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"


class Results:
    """The finished units by name. Each unit is on disk before the next one starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.units: dict[str, dict] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def add(self, name: str, unit: dict) -> None:
        """Add a unit, and write it to the disk at once."""
        self.units[name] = unit
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json_text(self.units) + "\n", "utf-8")
        partial.replace(self.path)


def parse_options(told: str | None, name: str, **defaults: str | float) -> argparse.Namespace:
    """The options of a benchmark. `name`: of its files in scripts/results. `defaults`: the defaults of its further
    options; False: an option without a value."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = str(REPOSITORY / ".cache" / "bench" / name)
    shared = {"model": MINILM, "seeds": "0-2", "minutes": math.inf, "page": False, "work": work}
    for option, default in {**shared, "output": str(FOLDER / "results"), **defaults}.items():
        kind = {"action": "store_true"} if default is False else {"default": default, "type": type(default)}
        parser.add_argument(f"--{option.replace('_', '-')}", **kind)
    settings = parser.parse_args()
    first, _, last = settings.seeds.partition("-")
    settings.seeds, settings.path = range(int(first), int(last or first) + 1), Path(settings.output) / f"{name}.json"
    return settings


def run_units(
    settings: argparse.Namespace,
    keys: Iterable[str],
    measure: Callable[[str, Path], dict],
    page: Callable[[dict[str, dict]], str],
) -> None:
    """Measure the units that are not finished, and write the page. `measure`: a function of a unit's name and
    folder."""
    results, started = Results(settings.path), time.monotonic()
    for key in [] if settings.page else keys:
        if key not in results.units and time.monotonic() - started <= settings.minutes * 60:
            results.add(key, measure(key, Path(settings.work).resolve() / key.replace("|", "-")))
    results.path.with_suffix(".md").write_text(page(results.units), "utf-8")


def shared_data() -> Path:
    """The folder of the data sets."""
    return Path(os.environ.get("TUNEKIT_SHARED", "")) / "data"


def write_parts(place: Path, **parts: Iterable[Any]) -> None:
    """Write each part's rows to PART.jsonl in the folder."""
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def tunekit(place: Path, *words: str) -> tuple[float, float]:
    """Run a command, which must succeed; returns its CPU seconds and its seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with (place / "output.txt").open("a", encoding="utf-8") as output:
        subprocess.run(
            [sys.executable, "-m", "tunekit", *words],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(used, 1), round(time.monotonic() - started, 1)
