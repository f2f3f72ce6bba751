"""Measures tokens per CPU second of greedy decoding: tunekit, transformers' generate and continuous batching, and
llama.cpp (F16).

    scripts/bench/run decoder MODEL [--rows 1,4,32] [--tokens 16,64,512] [--dtypes float32,bfloat16] [--output FOLDER]

All sides have the same weights and lengths, do not stop at an end token, and use one thread. The time is the CPU time
of the process for prompts and new tokens: the best of --repeats, measured in turns. llama.cpp runs in a separate
process (scripts/certify llama.cpp), and is left out if it is not installed. "Products" is the limit of the speed: only
the linear products of the same forwards. --resume keeps the cells of an earlier call. Results: decoder.json and
decoder.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from beside.harness import BESIDE, FOLDER, hardware, versions
from sampling import plain_copy, seconds
from transformers import ContinuousBatchingConfig, GenerationConfig

from tunekit.exports.programs.install import is_installed
from tunekit.exports.programs.versions import interpreter
from tunekit.model.load import load_model
from tunekit.model.text.generation import generate_texts
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.model import ModelSection

FIGURES = {
    "minutes": 25,
    "options": "$TUNEKIT_SMOLLM2",
    "result": "decoder.json",
    "figures": {
        "one_row": {
            "what": "decoding 64 tokens of one row in float32, against transformers' generate",
            "unit": "tokens per CPU second",
            "ours": "rates/float32/1/64/tunekit",
            "theirs": "rates/float32/1/64/generate",
        },
        "four_rows": {
            "what": "decoding 64 tokens of 4 rows in float32, against transformers' generate",
            "unit": "tokens per CPU second",
            "ours": "rates/float32/4/64/tunekit",
            "theirs": "rates/float32/4/64/generate",
        },
        "rows": {
            "what": "decoding 64 tokens of 32 rows in float32, against transformers' generate",
            "unit": "tokens per CPU second",
            "ours": "rates/float32/32/64/tunekit",
            "theirs": "rates/float32/32/64/generate",
        },
    },
}
SIDES = ("tunekit", "generate", "continuous", "products")
PAGE_TOKENS = 256  # of transformers' paged cache
PAGE = """# Decoding on one CPU core

New tokens a CPU second, one thread: {model}, greedy, prompts of {prompt_tokens} tokens, their computation included. The
best of {repeats} each, in turns. `generate`: transformers with its cache; `continuous`: its continuous batching;
`products`: only the linear products of the same forwards, in torch. {processor}, {date}, load average {load:.2f}
before; torch {torch}, transformers {transformers}.
Made by `scripts/bench/run decoder`; the numbers are in [decoder.json](decoder.json).

| dtype | rows | new tokens | tunekit | generate | continuous | llama.cpp F16 | products | / generate | / products |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|
"""


def products(net: Any, rows: int, prompt_tokens: int, count: int) -> None:
    """Compute the linear products of a prompt and of `count` tokens. The head is computed for one position per
    forward."""
    layers = [module for module in net.modules() if isinstance(module, torch.nn.Linear)]
    head = net.get_output_embeddings()
    for tokens in [prompt_tokens, *[1] * (count - 1)]:
        inputs: dict[tuple[int, int], torch.Tensor] = {}
        for module in layers:
            shape = (rows if module is head else rows * tokens, module.in_features)
            if shape not in inputs:
                inputs[shape] = torch.ones(shape, dtype=net.dtype)
            F.linear(inputs[shape], module.weight, module.bias)


def works(options: argparse.Namespace, dtype: str) -> Callable[[int, int], dict[str, Callable[[], object]]]:
    """Load the weights once; returns a function for each side, which decodes a number of rows and of new tokens."""
    section = ModelSection(name_or_path=options.model, dtype=dtype)
    base, tokenizer = load_model(section, device=torch.device("cpu")), load_tokenizer(section)
    net, draw = plain_copy(base.net), torch.Generator().manual_seed(0)

    def of(rows: int, count: int) -> dict[str, Callable[[], object]]:
        ids = torch.randint(10, 1000, (rows, options.prompt_tokens), generator=draw)
        fixed = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0
        )
        pages = rows * -(-(options.prompt_tokens + count) // PAGE_TOKENS)
        paged = ContinuousBatchingConfig(
            num_blocks=pages, max_batch_tokens=max(rows * options.prompt_tokens, PAGE_TOKENS), use_cuda_graph=False
        )

        def continuous() -> object:
            net.set_attn_implementation("sdpa")
            free = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
            answers = net.generate_batch(ids.tolist(), free, paged, progress_bar=False)
            assert [len(answer.generated_tokens) for answer in answers.values()] == [count] * rows
            return answers

        def generate() -> object:
            net.set_attn_implementation("sdpa")
            return net.generate(ids, attention_mask=torch.ones_like(ids), generation_config=fixed)

        return {
            "tunekit": lambda: generate_texts(
                base, tokenizer, ids.tolist(), max_new_tokens=count, batch_size=rows, stop_ids=[]
            ),
            "generate": generate,
            "continuous": continuous,
            "products": lambda: products(net, rows, options.prompt_tokens, count),
        }

    return of


def llama_seconds(file: Path, options: argparse.Namespace, rows: int, count: int) -> float:
    """CPU seconds of llama.cpp."""
    sizes = map(str, (rows, options.prompt_tokens, count, options.repeats))
    command = [str(interpreter("llama.cpp")), str(BESIDE / "llama_decode.py"), str(file), *sizes]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def f16_file(model: str, folder: Path) -> Path:
    """The model as an F16 GGUF file."""
    file = folder / "f16.gguf"
    command = [sys.executable, "-m", "tunekit", "export", model, "--to", "gguf", "--type", "F16", "--no-certify"]
    subprocess.run([*command, "--output", str(file)], check=True, stdout=subprocess.DEVNULL)
    return file


def measure(options: argparse.Namespace, rates: dict[str, Any], write: Callable[[], None]) -> None:
    """Add the missing cells: dtype -> rows -> tokens -> side -> rate."""
    with tempfile.TemporaryDirectory() as folder:
        file = f16_file(options.model, Path(folder)) if is_installed("llama.cpp") else None
        llama: dict[tuple[int, int], float] = {}
        for dtype in options.dtypes.split(","):
            of = works(options, dtype)
            for rows in map(int, options.rows.split(",")):
                for count in map(int, options.tokens.split(",")):
                    cells = rates.setdefault(dtype, {}).setdefault(str(rows), {})
                    if str(count) in cells:
                        continue
                    times: dict[str, list[float]] = {side: [] for side in SIDES}
                    with quiet(), torch.no_grad():
                        each = of(rows, count)
                        for _ in range(options.repeats):
                            for side in SIDES:
                                times[side].append(seconds(each[side]))
                    fastest = {side: min(taken) for side, taken in times.items()}
                    if file is not None:
                        if (rows, count) not in llama:
                            llama[rows, count] = llama_seconds(file, options, rows, count)
                        fastest["llama.cpp"] = llama[rows, count]
                    cells[str(count)] = {side: rows * count / taken for side, taken in fastest.items()}
                    print(dtype, rows, count, json.dumps(cells[str(count)]), flush=True)
                    write()


def row(dtype: str, rows: str, count: str, cell: dict[str, float]) -> str:
    """A row of the page."""
    shown = [f"{cell[side]:.1f}" if side in cell else "" for side in (*SIDES[:3], "llama.cpp", "products")]
    factor, share = cell["tunekit"] / cell["generate"], cell["tunekit"] / cell["products"]
    return f"| {dtype} | {rows} | {count} | {' | '.join(shown)} | {factor:.2f} | {share:.0%} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    for name, value in (("rows", "1,4,32"), ("tokens", "16,64,512"), ("dtypes", "float32,bfloat16")):
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--output", default=str(FOLDER / "results"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, known = Path(options.output) / "decoder.json", versions(Path(sys.executable))
    machine = {
        "processor": hardware()["processor"],
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load": os.getloadavg()[0],
    }
    packages = {name: known[name] for name in ("torch", "transformers")}
    settings = {**vars(options), "model": Path(options.model).name, **machine, **packages}
    earlier = options.resume and path.exists()
    rates = json.loads(path.read_text("utf-8"))["rates"] if earlier else {}

    def write() -> None:
        path.write_text(json.dumps({"settings": settings, "rates": rates}, indent=1) + "\n", "utf-8")
        lines = "".join(row(*names, cell) for names, cell in _cells(rates))
        path.with_suffix(".md").write_text(PAGE.format(**settings) + lines, "utf-8")

    measure(options, rates, write)


def _cells(rates: dict[str, Any]) -> list[tuple[tuple[str, str, str], dict[str, float]]]:
    """Every cell with its dtype, rows and tokens."""
    return [
        ((dtype, rows, count), cell)
        for dtype, of_rows in rates.items()
        for rows, of_counts in of_rows.items()
        for count, cell in of_counts.items()
    ]


if __name__ == "__main__":
    main()
