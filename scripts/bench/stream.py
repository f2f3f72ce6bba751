"""Trains a model that is larger than its memory limit: 1.1B parameters on a CPU, with streamed layers.

    scripts/bench/run stream [--limit 1.0] [--layers 22] [--tokens 512] [--only none|nf4] [--json FILE] [--work FOLDER]

The base (TinyLlama's shape, bfloat16, 2.2 GB) is trained for three steps by the real `train`, in fresh processes: with
memory.streaming: disk under RLIMIT_DATA = the data size of the process after all imports + the limit (GB), and with
memory.streaming: off without a limit. RLIMIT_DATA counts every private writable page; weights are mapped shared and
read-only. RssAnon is sampled every 10 ms.  Checked: adapter, optimizer state (the moments of the gradients) and losses
are equal bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from estimate import PLAN, run_python, write_rows
from load import GROUPS, HEADS, HIDDEN, INTERMEDIATE, VOCABULARY, WRITE

FIGURES = {
    "minutes": 15,
    "options": "--tokens 128 --json $RESULTS/stream.json",
    "result": "stream.json",
    "figures": {
        "memory": {
            "what": "1.1B parameters in bfloat16, anonymous memory: streamed against resident",
            "unit": "MB",
            "divisor": 1e6,
            "ours": "rows/0/streamed/anonymous",
            "theirs": "rows/0/resident/anonymous",
        },
    },
}
STEPS = 3
GB = 1_000_000_000

TRAIN = """
import importlib, json, os, resource, sys, threading
sys.path.insert(0, {repository!r})
from tunekit.machine.variables import variables
os.environ.update(variables())
from tunekit.machine.memory import status_bytes
def memory(*names):
    return [status_bytes(name) for name in names]
for name in json.loads(open(sys.argv[1]).read()):
    try:
        importlib.import_module(name)
    except Exception:
        pass
import torch
torch.set_num_threads(1)
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb
limit = int(sys.argv[2])
before, anonymous = memory("VmData", "RssAnon")
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (before + limit, before + limit))
samples, ended = [(before, anonymous)], threading.Event()
def sample():
    while not ended.wait(0.01):
        samples.append(tuple(memory("VmData", "RssAnon")))
watch = threading.Thread(target=sample)
watch.start()
try:
    train_verb(load_recipe(sys.argv[3], sys.argv[4:]), False, False)
finally:
    ended.set()
    watch.join()
print(json.dumps({{"anonymous": max(each[1] for each in samples) - anonymous,
    "data": max(each[0] for each in samples) - before, "cpu_seconds": sum(os.times()[:2]), "seconds": os.times()[4]}}))
"""


def write_model(folder: Path, layers: int) -> int:
    """A random llama with a byte-level tokenizer; returns the bytes of its weights."""
    folder.mkdir()
    code = "import sys; sys.path.insert(0, {repository!r})\n"
    code += "from pathlib import Path; from tunekit.model.storage.builtin import write_tiny_llama\n"
    code += "write_tiny_llama(Path(sys.argv[1])); print('{{}}')"
    run_python(code, str(folder))
    (folder / "model.safetensors").unlink()
    sizes = json.dumps([HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, GROUPS])
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(folder), str(layers), "5", sizes], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])["bytes"]


def outcome(run: Path) -> dict[str, object]:
    """The results of a run that must be equal in both runs."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    newest = max((run / "checkpoints").iterdir())
    return {
        "adapter": hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "weights and moments": hashlib.sha256((newest / "tensors.safetensors").read_bytes()).hexdigest(),
        "losses": [step["loss"] for step in steps],
        "norms": [step["grad_norm"] for step in steps],
    }


def measure(folder: Path, quantization: str, limit: int, tokens: int) -> dict[str, object]:
    """Both runs of one storage."""
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "bfloat16", "quantization": quantization},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": tokens},
        "adapter": {"method": "lora", "r": 16},
        "training": {"max_steps": STEPS, "micro_batch_size": 1, "gradient_accumulation_steps": 4, "warmup_ratio": 0},
        "output": {"dir": "run"},
    }
    path = folder / f"{quantization}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    found: dict[str, object] = {"quantization": quantization, "limit_bytes": limit, "tokens_per_step": 4 * tokens}
    outcomes = {}
    for name, tier, allowed in (("streamed", "disk", limit), ("resident", "off", 0)):
        run = folder / f"{quantization}-{name}"
        overrides = [f"memory.streaming={tier}", f"output.dir={run}"]
        planned = run_python(PLAN, str(path), *overrides)
        (folder / "modules.json").write_text(json.dumps(planned["modules"]))
        started = time.monotonic()
        seen = run_python(TRAIN, str(folder / "modules.json"), str(allowed), str(path), *overrides)
        report = json.loads((run / "report.json").read_text("utf-8"))
        outcomes[name] = outcome(run)
        found[name] = seen | {
            "wall_seconds": time.monotonic() - started,
            "tokens_per_second": report["tokens_per_second"],
            "predicted_bytes": report["predicted_bytes"]["cpu"],
            "measured_bytes": report["measured_bytes"]["cpu"],
            "notes": [note for note in planned["plan"]["notes"] if "stream" in note],
        }
    found["equal"] = outcomes["streamed"] == outcomes["resident"]
    found["outcome"] = outcomes
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1.0, help="GB above the interpreter")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=int, default=512, help="of a row; four rows make a step")
    parser.add_argument("--only", choices=["none", "nf4"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        folder = Path(scratch)
        os.environ["TUNEKIT_CACHE"] = str(folder / "cache")
        stored = write_model(folder / "model", given.layers)
        write_rows(folder / "rows.jsonl", 12, given.tokens)
        for quantization in [given.only] if given.only else ["none", "nf4"]:
            result = measure(folder, quantization, int(given.limit * GB), given.tokens)
            results.append(result)
            print(
                f"base {stored / 1e6:.0f} MB, {quantization}; streamed equals resident bit for bit: {result['equal']}"
            )
            for name in ("streamed", "resident"):
                row = result[name]
                sizes = {
                    "anonymous +": row["anonymous"],
                    "private writable +": row["data"],
                    "predicted": row["predicted_bytes"],
                    "measured": row["measured_bytes"],
                }
                text = "  ".join(f"{label} {size / 1e6:7.1f} MB" for label, size in sizes.items())
                print(f"  {name:9} {text}  {row['tokens_per_second']:6.1f} tok/s", flush=True)
    if given.json:
        machine = {"machine": platform.machine(), "system": platform.platform(), "load": os.getloadavg()}
        given.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1), encoding="utf-8")
    if not all(result["equal"] for result in results):
        sys.exit("the runs differ")


if __name__ == "__main__":
    main()
