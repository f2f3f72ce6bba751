"""Measures CPU seconds and peak memory of `tunekit sweep` over learning rates, against one `tunekit train` for each
rate.

    scripts/bench/run sweep RECIPE [--rates 1e-4,2e-4,4e-4,8e-4] [--rounds 3] [KEY=VALUE ...]

Both sides run in turns, as processes of their own. CPU seconds are user and system time of all of their threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def measured(*words: str) -> tuple[float, float]:
    """CPU seconds, and the peak memory in MiB, of a command of tunekit."""
    process = subprocess.Popen([sys.executable, "-m", "tunekit", "--quiet", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"failed: tunekit {' '.join(words)}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--rates", default="1e-4,2e-4,4e-4,8e-4")
    parser.add_argument("--rounds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    rates = options.rates.split(",")
    sides: dict[str, list[tuple[float, float]]] = {"sweep": [], "train": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            swept = f"training.learning_rate={options.rates}"
            sides["sweep"].append(
                measured("sweep", options.recipe, swept, f"output.dir={Path(folder) / 'sweep'}", *overrides)
            )
            runs = [
                measured(
                    "train",
                    options.recipe,
                    f"training.learning_rate={rate}",
                    f"output.dir={Path(folder) / rate}",
                    *overrides,
                )
                for rate in rates
            ]
            sides["train"].append((sum(seconds for seconds, _ in runs), max(peak for _, peak in runs)))
    for name, values in sides.items():
        seconds, peaks = zip(*values, strict=True)
        print(
            f"{name}: {statistics.median(seconds):.1f} CPU seconds ({min(seconds):.1f} to {max(seconds):.1f}), "
            f"peak {statistics.median(peaks):.0f} MiB"
        )


if __name__ == "__main__":
    main()
