"""A base divided among ranks, against one rank: losses, memory per rank, memory while loading.

    scripts/bench/run sharding [--json FILE] [--work FOLDER] [--only OBJECTIVE,...] [--parts memory,resumed,losses]

A row that is measured again replaces the row of the same name in FILE; other rows stay.

Every rank is a process on this machine (gloo, CPU, one thread).
Losses: each objective with a tiny model, dense and nf4, on 1, 2 and 4 ranks with the same rows; the largest difference
of any loss, and of any other number in metrics.jsonl.
Memory: the base of --model (SmolLM2-135M: TUNEKIT_SMOLLM2) on 1, 2 and 4 ranks. Bytes: the shares and all other tensors
of the base. Loading: the growth of resident memory (VmRSS, sampled every 2 ms) from before the base is loaded until its
shares are stored, without the code of libraries. The adapter, attached before the base is divided, is a part of it.
Resume: a run on 4, then 2, then 1 rank.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
RESULTS = REPOSITORY / "scripts" / "results"
OBJECTIVES = ("sft", "dpo", "grpo", "seq2seq", "classify")
QUANTIZATIONS = ("none", "nf4")
WORLDS = (2, 4)
SHARDED = "memory.sharding=full"
SAMPLE_SECONDS = 0.002


def measure_loading(file: Path) -> None:
    """In a rank's process: write the base's bytes and the peak of loading to `file` with the rank's number, and end."""
    from tunekit.machine.malloc import trim_heap
    from tunekit.machine.memory import status_bytes
    from tunekit.training import begin
    from tunekit.tuned import network

    load, shard, stream = begin.load_base, network.shard_base, network.stream_base
    values: dict[str, Any] = {}
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append(status_bytes("VmRSS"))

    watch = threading.Thread(target=sample)

    def loaded(*settings: Any) -> Any:
        touch_libraries()
        gc.collect()
        trim_heap()  # planning has left free pages, which loading would use again
        samples.append(status_bytes("VmRSS"))
        watch.start()
        return load(*settings)

    def finish(base: Any, divided: int) -> None:
        ended.set()
        watch.join()
        values.update(base_bytes=divided + in_memory(base), loading_bytes=max(samples) - samples[0])
        results = [file.with_suffix(f".{rank}.json") for rank in range(int(os.environ.get("WORLD_SIZE", "1")))]
        results[int(os.environ.get("RANK", "0"))].write_text(json.dumps(values), encoding="utf-8")
        while not all(path.exists() for path in results):  # the other ranks need this process until they have loaded
            time.sleep(0.05)
        time.sleep(1)
        os._exit(0)  # nothing more is measured

    def sharded(base: Any, layers: Any, tables: Any, *settings: Any) -> Any:
        if base.device.type == "meta":  # a simulation of plan
            return shard(base, layers, tables, *settings)
        values["layer_bytes"] = max(sum(tensor.nbytes for tensor in tensors) for tensors in layers)
        values["whole_bytes"] = sum({id(tensor): tensor.nbytes for tensor in frozen(base)}.values())
        slots = shard(base, layers, tables, *settings)
        finish(base, sum(share.nbytes for share in slots.copier.rounds.shares))
        return slots

    def streamed(base: Any, weights: Any, tier: str) -> Any:
        if base.device.type != "meta":
            values["whole_bytes"] = in_memory(base)
            finish(base, 0)
        return stream(base, weights, tier)

    def frozen(base: Any) -> list[Any]:
        return [tensor for tensor in [*base.net.parameters(), *base.net.buffers()] if not tensor.requires_grad]

    def in_memory(base: Any) -> int:
        return sum({id(each): min(each.nbytes, each.untyped_storage().nbytes()) for each in frozen(base)}.values())

    begin.load_base, network.shard_base, network.stream_base = loaded, sharded, streamed


def touch_libraries() -> None:
    """Load the code of all libraries into resident memory: code that runs for the first time is no growth of the run.
    Source: madvise(2), MADV_POPULATE_READ."""
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        span, mode, *_, name = line.split()
        if ".so" in name and mode.startswith("r") and "w" not in mode:
            start, end = (int(number, 16) for number in span.split("-"))
            if ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 22):
                sys.exit(f"the pages of {name} cannot be loaded")


def compare_losses(work: Path, shared: Path, objectives: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one entry for each number of ranks, objective and quantization."""
    from tests.support.ranks_case import differences, train_in_ranks, write_case

    for world, objective, quantization in product((1, *WORLDS), objectives, QUANTIZATIONS):
        folder = work / objective
        recipe = folder / "recipe.yaml" if folder.exists() else write_case(objective, folder, shared)
        more = [f"model.quantization={quantization}", *([SHARDED] if world > 1 else [])]
        run = folder / f"{quantization}-{world}"
        require_success(train_in_ranks(recipe, run, *more, world=world))
        if world > 1:
            largest = differences(folder / f"{quantization}-1", run)
            loss = max(value for name, value in largest.items() if name.endswith("loss"))
            others = max(value for name, value in largest.items() if "perplexity" not in name)
            row = {"objective": objective, "quantization": quantization, "ranks": world}
            yield row | {"loss": loss, "any": others}


def compare_resumed(work: Path, shared: Path) -> Iterator[dict[str, Any]]:
    """Yields the largest difference of an undisturbed run from one that is stopped and resumed on fewer ranks."""
    from tests.support.ranks_case import differences, stop_at, train_in_ranks, write_case

    recipe = write_case("sft", work / "resumed", shared)
    more = ["training.epochs=3", "training.save_steps=1"]
    require_success(train_in_ranks(recipe, work / "alone", *more, world=1))
    for world, step in ((4, 2), (2, 4), (1, None)):
        before = partial(stop_at, step)
        ends = train_in_ranks(recipe, work / "fewer", *more, SHARDED, world=world, resume=world < 4, before=before)
        require_success(ends, 0 if step is None else 143)
    yield {name: value for name, value in differences(work / "alone", work / "fewer").items() if "loss" in name}


def compare_memory(work: Path, model: str) -> Iterator[dict[str, Any]]:
    """Yields the bytes of the base and the peak of loading on every rank, for each quantization and number of ranks."""
    from tests.support.ranks_case import train_in_ranks
    from tests.support.train_case import write_recipe

    changes = {"model": {"name_or_path": model, "dtype": "bfloat16"}, "data": {"eval": None}}
    recipe = write_recipe(work / "memory", Path(model), rows=4, training={"max_steps": 1, "epochs": None}, **changes)
    for quantization, world in product(QUANTIZATIONS, (1, *WORLDS)):
        run = work / "memory" / f"{quantization}-{world}"
        more = [f"model.quantization={quantization}", *([SHARDED] if world > 1 else [])]
        require_success(train_in_ranks(recipe, run, *more, world=world, before=partial(measure_loading, run)))
        ranks = [json.loads(run.with_suffix(f".{rank}.json").read_text("utf-8")) for rank in range(world)]
        yield {"quantization": quantization, "ranks": world, "of_each": ranks}


def require_success(ends: list[Any], code: int = 0) -> None:
    for end in ends:
        if end.code != code:
            sys.exit(f"a rank ended with {end.code}:\n{end.output}")


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def page(values: dict[str, Any]) -> str:
    """The results as Markdown."""
    losses = [
        [row["objective"], row["quantization"], str(row["ranks"]), f"{row['loss']:.0e}", f"{row['any']:.0e}"]
        for row in values["losses"]
    ]
    memory = []
    for row in values["memory"]:
        first, peaks = row["of_each"][0], [each["loading_bytes"] for each in row["of_each"]]
        largest = "not measured" if None in peaks else f"{max(peaks) / 1e6:.1f}"
        part = max(each["base_bytes"] for each in row["of_each"])
        whole = first.get("whole_bytes", part)
        limit = "" if row["ranks"] == 1 else f"{(part + 2 * first['layer_bytes']) / 1e6:.1f}"
        cells = [f"{part / 1e6:.1f}", f"{part / whole:.3f}", largest, limit]
        memory.append([row["quantization"], str(row["ranks"]), *cells])
    resumed = (
        "not measured"
        if not values["resumed"]
        else ", ".join(f"{name} {value:.0e}" for each in values["resumed"] for name, value in each.items())
    )
    return f"""# A base divided among ranks

`scripts/bench/run sharding` measured this on a CPU with gloo; the last row on {values["date"]}.

## Losses, against one rank

{table(["objective", "weights", "ranks", "largest difference of a loss", "of any other number"], losses)}

## Memory of a rank (SmolLM2-135M, bfloat16), MB

{table(["weights", "ranks", "the base", "share", "peak while loading", "share and two layers"], memory)}

The peak contains more than weights: the adapter, which is attached before the base is divided (LoRA of rank 4: up to
4.9 MB), and the Python objects of the net's modules (2 to 3 MB with nf4, whatever the size of the weights). One rank
maps the cache file of nf4 weights, and reads it only when it computes.

## Resume on 4, then 2, then 1 rank

Largest differences from a run on one rank: {resumed}.
"""


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes a row from the others of its table."""
    return tuple(row.get(name) for name in ("objective", "quantization", "ranks"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--json", type=Path, default=RESULTS / "sharding.json")
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--only", default=",".join(OBJECTIVES))
    arguments.add_argument("--parts", default="memory,resumed,losses")
    arguments.add_argument("--model", default=os.environ.get("TUNEKIT_SMOLLM2", str(REPOSITORY / ".cache" / "smollm2")))
    chosen = arguments.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp(prefix="sharding-"))
    os.environ["TUNEKIT_CACHE"] = str(work / "cache")
    shared = Path(os.environ.get("TUNEKIT_SHARED", REPOSITORY.parent / "shared"))
    import torch

    import tunekit.train  # noqa: F401  every rank is forked from this process, which has imported everything

    torch.set_num_threads(1)
    parts = {
        "memory": compare_memory(work, chosen.model),
        "resumed": compare_resumed(work, shared),
        "losses": compare_losses(work, shared, chosen.only.split(",")),
    }
    values: dict[str, Any] = {name: [] for name in parts}
    values |= json.loads(chosen.json.read_text("utf-8")) if chosen.json.exists() else {}
    for name in chosen.parts.split(","):
        for row in parts[name]:
            print(name, row, flush=True)
            values["date"] = time.strftime("%Y-%m-%d")
            values[name] = [*(other for other in values[name] if place_of(other) != place_of(row)), row]
            chosen.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            chosen.json.with_suffix(".md").write_text(page(values), encoding="utf-8")


if __name__ == "__main__":
    main()
