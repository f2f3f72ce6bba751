"""Compares predicted with measured peak memory on a CPU, for all shipped recipes with a random model, and for random
recipes.

    scripts/bench/run estimate [--only NAME] [--drawn N] [--budgets N] [--accumulated N,N] [--seed N] [--dtype NAME]
        [--json FILE] [--work FOLDER]

For each row (a measured run), three processes run one after another: the first writes a seeded random model of 100M to
200M parameters; the second plans the recipe; the third imports the same modules as planning, records its resident
memory, and trains a few steps.

measured = VmHWM - resident memory after imports; error = predicted / measured - 1. One thread, one row at a time.

The budget of a row is a share of the memory that its recipe needs without a budget; `kept` states whether measured <=
budget. --accumulated: the numbers of micro-batches per step to try, for the same 64 micro-batches of various lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, ACCUMULATED = 3, 64


@dataclass(frozen=True)
class Row:
    """One measured run: a recipe, its overrides, and the model that replaces its base."""

    name: str
    recipe: str
    overrides: list[str]
    model: dict[str, object]  # family, layers, hidden, vocabulary, file_dtype
    rows: dict[str, int] = field(default_factory=dict)  # of written data: count, tokens
    budget_share: float | None = None  # of the total that is predicted without a budget


FAMILIES = {"gpt2": "gpt2", "Qwen": "qwen2", "flan-t5": "t5"}  # word in a recipe -> kind of its model


def shipped_rows() -> list[Row]:
    """A row for every shipped recipe, with accumulation 1 and few steps, because neither changes the peak."""
    found = []
    for path in sorted((REPOSITORY / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        family = next((name for word, name in FAMILIES.items() if word in text), "llama")
        overrides = [f"training.max_steps={STEPS}", "training.gradient_accumulation_steps=1"]
        overrides += ["~training.epochs"] if "\n  epochs:" in text else []
        overrides += ["model.dtype=auto"] if "dtype: float16" in text else []  # a CPU has no float16
        if "method: adalora" in text:  # a schedule of ranks that so few steps can hold
            overrides += ["adapter.tinit=0", "adapter.tfinal=1"]
        overrides += ["~adapter.adapter_layers"] if "adapter_layers:" in text else []  # more than the model has
        found.append(Row(path.stem, str(path), overrides, {"family": family, "layers": 12, "hidden": 768}))
    return found


def drawn_rows(count: int, seed: int, folder: Path) -> list[Row]:
    """Rows with random settings. All data rows are as long as max_length, so every batch is as long as the longest
    one."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        layers, hidden = draw.choice([(8, 1024), (12, 768), (20, 640), (30, 576)])
        length = draw.choice([128, 256, 384, 512, 768])
        model = {
            "family": draw.choice(["llama", "qwen2", "gpt2"]),
            "layers": layers,
            "hidden": hidden,
            "vocabulary": draw.choice([8192, 32000, 49152]),
            "file_dtype": draw.choice(["float32", "bfloat16"]),
            "tied": draw.choice([True, True, False]),
        }
        recipe = {
            "model": {
                "name_or_path": "replaced",
                "dtype": draw.choice(["float32", "bfloat16"]),
                "quantization": draw.choice(["none", "none", "nf4", "int8_weight_only"]),
            },
            "data": {"train": "rows.jsonl", "max_length": length, "packing": draw.choice([True, False])},
            "adapter": {
                "method": "lora",
                "r": draw.choice([4, 8, 16, 32, 64]),
                "dropout": draw.choice([0.0, 0.0, 0.1]),
            },
            "training": {
                "max_steps": STEPS,
                "micro_batch_size": draw.choice([1, 2, 4]),
                "gradient_accumulation_steps": 1,
                "optimizer": draw.choice(["adamw", "adamw", "adamw_8bit"]),
            },
            "memory": {"gradient_checkpointing": draw.choice(["auto", "auto", True, layers // 2])},
            "output": {"dir": "run"},
        }
        rows = {"count": 24, "tokens": length if not recipe["data"]["packing"] else length // 3}
        found.append(make_row(f"drawn-{number:02d}", recipe, model, rows, folder))
    return found


def budget_rows(count: int, seed: int, folder: Path) -> list[Row]:
    """Random rows in batches of 4, whose budget is a share of the memory that they need."""
    draw = random.Random(f"budget {seed}")
    found = []
    for row in drawn_rows(count, seed + 1000, folder / "budget"):
        recipe = json.loads(Path(row.recipe).read_text(encoding="utf-8"))
        recipe["training"] |= {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
        recipe["memory"] = {"gradient_checkpointing": "auto"}
        name, share = row.name.replace("drawn", "budget"), draw.choice([0.55, 0.7, 0.85])
        written = make_row(name, recipe, row.model, row.rows | {"count": 48}, folder)
        found.append(replace(written, budget_share=share))
    return found


def accumulated_rows(counts: list[int], folder: Path) -> list[Row]:
    """One recipe for each of the `counts` micro-batches per step. There are 64 micro-batches, each of 2 rows of 32 to
    256 tokens."""
    found = []
    for count in counts:
        model = {"family": "llama", "layers": 4, "hidden": 384, "vocabulary": 8192, "file_dtype": "bfloat16"}
        recipe = {
            "model": {"name_or_path": "replaced"},
            "data": {"train": "rows.jsonl", "max_length": 256},
            "adapter": {"method": "lora", "r": 16},
            "training": {
                "max_steps": ACCUMULATED // count,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": count,
            },
            "output": {"dir": "run"},
        }
        rows = {"count": 2 * ACCUMULATED, "tokens": 256, "least": 32}
        found.append(make_row(f"accumulated-{count:02d}", recipe, model, rows, folder))
    return found


def make_row(name: str, recipe: dict, model: dict[str, object], rows: dict[str, int], folder: Path) -> Row:
    """A row whose recipe and data are written into `folder`."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return Row(name, str(place / "recipe.yaml"), [], model, rows)


MODEL = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {repository!r})
spec, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
from tunekit.model.storage.builtin import write_tiny_llama
write_tiny_llama(folder)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
hidden, layers, heads = spec["hidden"], spec["layers"], spec["hidden"] // 64
common = dict(vocab_size=spec.get("vocabulary", 49152), bos_token_id=0, eos_token_id=2)
common["tie_word_embeddings"] = spec.get("tied", True)
if spec["family"] == "gpt2":
    config = AutoConfig.for_model("gpt2", n_embd=hidden, n_layer=layers, n_head=heads, **common)
elif spec["family"] == "t5":
    config = AutoConfig.for_model("t5", d_model=hidden, d_ff=hidden * 4, num_layers=layers // 2, num_heads=heads,
        pad_token_id=0, decoder_start_token_id=0, **common)
else:
    groups = heads // 3 if heads % 3 == 0 else heads
    config = AutoConfig.for_model(
        spec["family"], hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096, **common)
torch.manual_seed(0)
make = AutoModelForSeq2SeqLM if spec["family"] == "t5" else AutoModelForCausalLM
model = make.from_config(config, dtype=getattr(torch, spec.get("file_dtype", "float32")))
(folder / "model.safetensors").unlink()
model.save_pretrained(folder)
print(json.dumps({{"parameters": sum(parameter.numel() for parameter in model.parameters())}}))
"""

PLAN = """
import json, sys
sys.path.insert(0, {repository!r})
import torch
torch.set_num_threads(1)
from dataclasses import asdict
from tunekit.machine.devices import make_devices
from tunekit.planning.plan import plan
from tunekit.planning.prepare import prepare
from tunekit.recipe.load import load_recipe
import tunekit.train
loaded = load_recipe(sys.argv[1], sys.argv[2:])
made, _ = plan(prepare(loaded, make_devices().device))
print(json.dumps({{"plan": asdict(made), "modules": sorted(sys.modules)}}))
"""

MEASURE = """
import importlib, json, os, sys
sys.path.insert(0, {repository!r})
from tunekit.machine.variables import variables
os.environ.update(variables())
def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
for name in json.loads(open(sys.argv[1]).read()):
    try:
        importlib.import_module(name)
    except Exception:
        pass
import torch
torch.set_num_threads(1)
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb
before = memory("VmRSS")
train_verb(load_recipe(sys.argv[2], sys.argv[3:]), False, False)
print(json.dumps({{"before": before, "peak": memory("VmHWM"), "after": memory("VmRSS")}}))
"""


def run_python(code: str, *arguments: str) -> dict:
    """The last line of a fresh interpreter's output, as JSON."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TUNEKIT_DEVICE="cpu")
    text = code.format(repository=str(REPOSITORY))
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_rows(path: Path, count: int, tokens: int, least: int | None = None) -> None:
    """Write rows of exactly `tokens` tokens of the byte-level tokenizer, with their end token. With `least`: of `least`
    to `tokens` tokens."""
    longest, shortest = tokens, tokens if least is None else least
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            tokens = longest - number * 37 % (longest - shortest + 1)
            text = f"{number} " + "abcdefgh " * tokens
            file.write(
                json.dumps({"prompt": text[: tokens // 3], "completion": text[: tokens - tokens // 3 - 1]}) + "\n"
            )


def judge(row: Row, folder: Path) -> dict:
    """One line of the table."""
    place = folder / row.name
    for name in ("model", "run"):
        shutil.rmtree(place / name, ignore_errors=True)
    model = place / "model"
    model.mkdir(parents=True)
    parameters = run_python(MODEL, json.dumps(row.model), str(model))["parameters"]
    if row.rows:
        write_rows(place / "rows.jsonl", **row.rows)
    overrides = [f"model.name_or_path={model}", f"output.dir={place / 'run'}", *row.overrides]
    planned = run_python(PLAN, row.recipe, *overrides)
    if row.budget_share is not None:
        overrides.append(f"memory.budget={round(row.budget_share * planned['plan']['peak_bytes']['total'])}B")
        planned = run_python(PLAN, row.recipe, *overrides)
    plan = planned["plan"]
    if plan["refusals"]:
        raise RuntimeError("; ".join(refusal["message"] for refusal in plan["refusals"]))
    (place / "modules.json").write_text(json.dumps(planned["modules"]))
    measured = run_python(MEASURE, str(place / "modules.json"), row.recipe, *overrides)
    for name in ("model", "run"):  # half a gigabyte
        shutil.rmtree(place / name)
    growth = measured["peak"] - measured["before"]
    predicted = plan["peak_bytes"]["total"]
    return asdict(row) | {
        "parameters": parameters,
        "predicted": predicted,
        "measured": growth,
        "error": predicted / growth - 1,
        "parts": plan["peak_bytes"],
        "checkpointed": plan["choice"]["checkpointed_layers"],
        "micro_batch_size": plan["choice"]["micro_batch_size"],
        "logits_chunk_tokens": plan["choice"]["logits_chunk_tokens"],
        "budget": plan["budget_bytes"],
        "kept": None if plan["budget_bytes"] is None else growth <= plan["budget_bytes"],
        "packing": plan["rows"]["packing"],
        "recipe_values": plan["recipe"],
    }


def budget_text(result: dict) -> str:
    """A text about a row with a budget: the budget, whether it was kept, and the settings that plan chose."""
    if result["budget"] is None:
        return ""
    kept = "kept" if result["kept"] else "EXCEEDED"
    chosen = (
        f"{result['micro_batch_size']} rows, {result['checkpointed']} layers, {result['logits_chunk_tokens']} logits"
    )
    return f"  budget {result['budget'] / 1e6:8.1f} MB {kept} ({chosen})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names that contain this")
    parser.add_argument("--drawn", type=int, default=10)
    parser.add_argument("--budgets", type=int, default=5)
    parser.add_argument("--accumulated", default="", help="numbers of micro-batches in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="of every row: auto, float32, bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        rows = shipped_rows() + drawn_rows(arguments.drawn, arguments.seed, folder)
        rows += budget_rows(arguments.budgets, arguments.seed, folder)
        rows += accumulated_rows([int(count) for count in arguments.accumulated.split(",") if count], folder)
        rows = [row for row in rows if arguments.only is None or arguments.only in row.name]
        if arguments.dtype:
            rows = [replace(row, overrides=[*row.overrides, f"model.dtype={arguments.dtype}"]) for row in rows]
        results = []
        for row in rows:
            try:
                result = judge(row, folder)
            except RuntimeError as error:
                print(f"{row.name:24} failed: {str(error).strip().splitlines()[-1]}", flush=True)
                results.append({"name": row.name, "failed": str(error)})
                continue
            results.append(result)
            print(
                f"{row.name:24} predicted {result['predicted'] / 1e6:8.1f} MB"
                f"  measured {result['measured'] / 1e6:8.1f} MB  error {result['error']:+.1%}{budget_text(result)}",
                flush=True,
            )
    if arguments.json:
        machine = {"machine": platform.machine(), "system": platform.platform(), "load": os.getloadavg()}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
