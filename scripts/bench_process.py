"""What a run on a CPU keeps resident beside tensors: code of libraries at its first use, small objects, kernels.

    scripts/bench process [--work FOLDER]

For models of three families and two shapes in float32 (whose products leave no compiled kernels): a run of three steps
in a fresh process as `scripts/bench estimate` makes it. After the loop the heap is trimmed, so that no freed block
counts; beside tensors = growth of anonymous memory - adapter - optimizer; code = growth of shared libraries' pages.
The median of the sums is memory/estimate.py's PROCESS_BYTES. None of these runs is judged by `scripts/bench estimate`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bench_estimate import MEASURE, MODEL, PLAN, make_row, run_python, write_rows

SHAPES = [(8, 1024), (30, 576)]  # layers, hidden
FAMILIES = ["llama", "gpt2", "qwen2"]
WATCH = """
import tunekit.train
from tunekit.memory.malloc import trim_heap
def libraries():
    total, library = 0, False
    for line in open("/proc/self/smaps"):
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            library = ".so" in rest.rpartition("/")[2]
        elif library and first == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total
def now():
    trim_heap()
    return memory("RssAnon"), libraries()
first, found = now(), {{}}
loop = tunekit.train.run_loop
def watched(*given):
    result = loop(*given)
    anonymous, code = now()
    found.update(anonymous=anonymous - first[0], code=code - first[1])
    return result
tunekit.train.run_loop = watched
train_verb(sys"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    watching = MEASURE.replace("train_verb(sys", WATCH) + "print(json.dumps(found))\n"
    sums = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        for layers, hidden in SHAPES:
            for family in FAMILIES:
                found = measure(folder, family, layers, hidden, watching)
                sums.append(sum(found))
                print(f"{family:6} {layers:3} x {hidden:5}", end="")
                print(f"  beside tensors {found[0] / 1e6:6.1f} MB  code {found[1] / 1e6:6.1f} MB", flush=True)
    print(f"median of the sums {statistics.median(sums) / 1e6:.1f} MB")


def measure(folder: Path, family: str, layers: int, hidden: int, watching: str) -> tuple[int, int]:
    """Bytes beside tensors, and of code."""
    recipe = {
        "model": {"name_or_path": "replaced", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "max_length": 256, "packing": False},
        "adapter": {"method": "lora", "r": 8},
        "training": {"max_steps": 3, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
        "output": {"dir": "run"},
    }
    model = {"family": family, "layers": layers, "hidden": hidden, "vocabulary": 8192, "file_dtype": "float32"}
    row = make_row(f"{family}-{layers}", recipe, model, {}, folder)
    place = folder / row.name
    (place / "model").mkdir()
    run_python(MODEL, json.dumps(model), str(place / "model"))
    write_rows(place / "rows.jsonl", 12, 256)
    overrides = [f"model.name_or_path={place / 'model'}", f"output.dir={place / 'run'}"]
    planned = run_python(PLAN, row.recipe, *overrides)
    (place / "modules.json").write_text(json.dumps(planned["modules"]))
    found = run_python(watching, str(place / "modules.json"), row.recipe, *overrides)
    parts = planned["plan"]["peak_bytes"]
    return found["anonymous"] - parts["adapter"] - parts["optimizer"], found["code"]


if __name__ == "__main__":
    main()
