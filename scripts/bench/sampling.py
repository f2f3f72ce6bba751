"""Measures tokens per CPU second of sampling groups of completions, next to transformers' batched generation with a
cache.

    scripts/bench/run sampling MODEL [--prompts 4] [--group 8] [--prompt-tokens 64] [--tokens 16,64] [--output FOLDER]

Both sides sample from the same weights at temperature 1, and do not stop at an end token, so all completions have the
same length. The time is the CPU time of the process (one thread): the best of --repeats, measured in turns. Results are
in sampling.json and sampling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from beside.harness import FOLDER, hardware, versions

from tunekit.contracts import RowKind, Sampling
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.model import ModelSection
from tunekit.tuned.model import ModelRun, TunedModel

FIGURES = {
    "minutes": 5,
    "options": "$TUNEKIT_SMOLLM2",
    "result": "sampling.json",
    "figures": {
        "short": {
            "what": "sampling 16 tokens, against transformers' generate",
            "unit": "tokens per CPU second",
            "ours": "rates/0/tunekit",
            "theirs": "rates/0/transformers",
        },
        "long": {
            "what": "sampling 64 tokens, against transformers' generate",
            "unit": "tokens per CPU second",
            "ours": "rates/1/tunekit",
            "theirs": "rates/1/transformers",
        },
    },
}
PAGE = """# Sampling on one CPU core

Sampled tokens a CPU second of the whole process, one thread: {model} in {dtype}, {prompts} prompts of {tokens} tokens
with {group} completions each, side by side, at temperature 1; beside transformers' own `generate` with its cache, a
batch of the same size. The best of {repeats} each, in turns. {processor}, {date}, load average {load:.2f} before; torch
{torch}, transformers {transformers}.
Made by `scripts/bench/run sampling`; the numbers are in [sampling.json](sampling.json).

| new tokens of each | tunekit | transformers | factor |
|--:|--:|--:|--:|
"""


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def plain_copy(net: Any) -> Any:
    """A model of transformers with the same weights, and with transformers' own attention."""
    config = deepcopy(net.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        plain = type(net)._from_config(config, dtype=net.dtype)
    plain.load_state_dict(net.state_dict(), assign=True)
    plain.tie_weights()
    for name, buffer in net.named_buffers():  # rotations, which no state holds
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return plain.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in (("prompts", 4), ("group", 8), ("prompt-tokens", 64), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", default="16,64")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", default=str(FOLDER / "results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = ModelSection(name_or_path=options.model, dtype=options.dtype)
    base, tokenizer = load_model(section, device=torch.device("cpu")), load_tokenizer(section)
    run, net = ModelRun(TunedModel(base, None), RowKind()), plain_copy(base.net)
    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(10, 1000, (options.prompts, options.prompt_tokens), generator=draw)
    every = asked.repeat_interleave(options.group, dim=0)  # (B, T)
    prompts, seeds, lines, load = every.tolist(), list(range(len(every))), list[dict[str, Any]](), os.getloadavg()[0]
    for count in map(int, options.tokens.split(",")):

        def ours(count: int = count) -> Any:
            many = {"max_new_tokens": count, "batch_size": len(prompts), "stop_ids": []}
            return run.generate(tokenizer, prompts, sampling=Sampling(1.0), seeds=seeds, **many)

        def theirs(count: int = count) -> Any:
            fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True, "temperature": 1.0}
            fixed["use_cache"] = True  # a loaded base is told to do without
            with quiet(), torch.no_grad():
                mask = torch.ones_like(every)
                return net.generate(every, attention_mask=mask, top_k=0, pad_token_id=0, **fixed)  # type: ignore[operator]

        found = {"tunekit": [], "transformers": []}
        for _ in range(options.repeats):
            found["tunekit"].append(seconds(ours))
            found["transformers"].append(seconds(theirs))
        rates = {name: len(prompts) * count / min(times) for name, times in found.items()}
        lines.append({"new_tokens": count, **rates, "factor": rates["tunekit"] / rates["transformers"]})
        print(json.dumps(lines[-1]), flush=True)
    known = versions(Path(sys.executable))
    told = {"processor": hardware()["processor"], "date": time.strftime("%Y-%m-%d %H:%M"), "load": load}
    told |= {**vars(options), "model": Path(options.model).name, "tokens": options.prompt_tokens}
    told |= {name: known[name] for name in ("torch", "transformers")}
    rows = [
        f"| {each['new_tokens']} | {each['tunekit']:.1f} | {each['transformers']:.1f} | {each['factor']:.2f} |\n"
        for each in lines
    ]
    path = Path(options.output) / "sampling.json"
    path.write_text(json.dumps({"settings": told, "rates": lines}, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(PAGE.format(**told) + "".join(rows), "utf-8")


if __name__ == "__main__":
    main()
