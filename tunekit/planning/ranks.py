"""Plans the ranks of a run whose devices or budgets differ, as their processes will do it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tunekit.machine.devices import is_here, kind_of
from tunekit.machine.memory import total_bytes
from tunekit.memory.sharding import TIER
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import Choice, Plan

MakePlan = Callable[[LoadedRecipe, int, Choice | None], Plan]  # of a recipe, for a rank, with the shared settings


def shared_choice(choices: Sequence[Choice]) -> Choice:
    """The choice whose `common` settings all ranks use: the micro-batches that the rank with the least memory can hold,
    and special kernels only if all ranks have them, because they round differently. It samples as few completions
    together as the rank that can hold the fewest."""
    least = min(choices, key=lambda choice: choice.micro_batch_size or 0)
    same = len({choice.kernels for choice in choices}) == 1
    sampled = min(choice.sampling_batch_size for choice in choices)
    kernels = least.kernels if same else "none"
    return replace(least, kernels=kernels, sampling_batch_size=sampled)


def shards(loaded: LoadedRecipe, choices: Sequence[Choice]) -> LoadedRecipe:
    """The recipe; if a rank needs a sharded base, with memory.sharding: full, because then all ranks shard it."""
    if all(choice.streaming != TIER for choice in choices):
        return loaded
    memory = loaded.recipe.memory.model_copy(update={"sharding": "full"})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"memory": memory}))


def devices_of(device: torch.device, ranks: int) -> list[torch.device]:
    """The device of each rank: the GPUs of this machine in turn, as on each of several equal machines."""
    if not (kind_of(device).numbered and is_here(device)):
        return [device] * ranks
    count = torch.get_device_module(device).device_count()
    return [torch.device(device.type, rank % count) for rank in range(ranks)]


def ranks_here(device: torch.device, ranks: int) -> int:
    """The number of ranks that share this machine's memory: the number that torchrun states, or else all; at most one
    for each GPU of the machine."""
    stated = os.environ.get("LOCAL_WORLD_SIZE", "")
    here = min(int(stated), ranks) if stated.isdecimal() else ranks
    if kind_of(device).numbered and is_here(device):
        here = min(here, torch.get_device_module(device).device_count())
    return max(here, 1)


def plan_ranks(loaded: LoadedRecipe, devices: Sequence[torch.device], make: MakePlan) -> list[Plan]:
    """The plan of each rank; only that of rank 0 if all ranks have the same budget and memory."""
    first, ranks = make(loaded, 0, None), len(devices)
    totals = [total_bytes(device) if is_here(device) else None for device in devices]
    budgets = [loaded.recipe.memory.of_rank(rank, ranks).budget for rank in range(ranks)]
    if len(set(zip(budgets, totals, strict=True))) == 1:
        return [first]
    plans = [first, *(make(loaded, rank, None) for rank in range(1, ranks))]
    loaded = shards(loaded, [plan.choice for plan in plans])
    if loaded.recipe.memory.sharding == "full":
        plans = [plan if plan.choice.streaming == TIER else make(loaded, rank, None) for rank, plan in enumerate(plans)]
    shared = shared_choice([plan.choice for plan in plans])
    return [
        plan if plan.choice.common == shared.common else make(loaded, rank, shared) for rank, plan in enumerate(plans)
    ]
