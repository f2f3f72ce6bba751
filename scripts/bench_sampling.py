"""Tokens a CPU second of sampling groups of completions, beside transformers' own batched generation with a cache.

usage: .venv/bin/python scripts/bench_sampling.py MODEL [--prompts 4] [--group 8] [--prompt-tokens 64] [--tokens 16,64]

Both sample from the same weights at temperature 1 and end at no token, so that all completions are equally long; the
time is the process's own (one thread), the best of --repeats, in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from tunekit.contracts import Sampling
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.model.transformers_guard import quiet
from tunekit.recipe.model import ModelSection
from tunekit.tuned.model import TunedModel


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def plain_copy(net: Any) -> Any:
    """The same weights in a net as transformers makes it, with its own attention."""
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = ModelSection(name_or_path=options.model, dtype=options.dtype)
    base, tokenizer = load_model(section, device=torch.device("cpu")), load_tokenizer(section)
    model, net = TunedModel(base, None), plain_copy(base.net)
    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(10, 1000, (options.prompts, options.prompt_tokens), generator=draw)
    every = asked.repeat_interleave(options.group, dim=0)  # (B, T)
    prompts, seeds = every.tolist(), list(range(len(every)))
    for count in map(int, options.tokens.split(",")):

        def ours(count: int = count) -> Any:
            many = {"max_new_tokens": count, "batch_size": len(prompts), "stop_ids": []}
            return model.generate(tokenizer, prompts, sampling=Sampling(1.0), seeds=seeds, **many)

        def theirs(count: int = count) -> Any:
            fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True, "temperature": 1.0}
            with quiet(), torch.no_grad():
                mask = torch.ones_like(every)
                return net.generate(every, attention_mask=mask, top_k=0, pad_token_id=0, **fixed)  # type: ignore[operator]

        found = {"tunekit": [], "transformers": []}
        for _ in range(options.repeats):
            found["tunekit"].append(seconds(ours))
            found["transformers"].append(seconds(theirs))
        rates = {name: len(prompts) * count / min(times) for name, times in found.items()}
        shape = f"{options.prompts} prompts of {options.prompt_tokens} tokens x {options.group}, {count} new tokens"
        told = ", ".join(f"{name} {rate:,.1f} tokens a CPU second" for name, rate in rates.items())
        print(f"{shape}: {told}: {rates['tunekit'] / rates['transformers']:.2f} times", flush=True)


if __name__ == "__main__":
    main()
