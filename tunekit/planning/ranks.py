"""Plans the ranks of a run, whose devices or budgets may differ, so that they agree: of a run in its processes, and of
one that is only planned."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from tunekit.machine.devices import is_here, kind_of
from tunekit.machine.memory import resident_bytes, total_bytes
from tunekit.memory.sharding import TIER
from tunekit.planning.checks import raise_refusals
from tunekit.planning.plan import plan
from tunekit.planning.prepare import prepare
from tunekit.planning.prepared import Prepared
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import ExecutionSettings, Plan
from tunekit.training.ranks import shard_on_all_ranks, shared_execution
from tunekit.training.session import Planned, Session


def devices_of(device: torch.device, ranks: int) -> list[torch.device]:
    """The device of each rank: the GPUs of this machine in turn, as on each of several equal machines."""
    if not (kind_of(device).numbered and is_here(device)):
        return [device] * ranks
    count = torch.get_device_module(device).device_count()
    return [torch.device(device.type, rank % count) for rank in range(ranks)]


def plan_ranks(loaded: LoadedRecipe, devices: Sequence[torch.device]) -> list[Plan]:
    """The plan of each rank; only that of rank 0 if all ranks have the same budget and memory."""
    ranks = len(devices)
    totals = [total_bytes(device) if is_here(device) else None for device in devices]
    budgets = [loaded.recipe.memory.of_rank(rank, ranks).budget for rank in range(ranks)]
    equal = len(set(zip(budgets, totals, strict=True))) == 1
    prepared = [
        prepare(loaded, device, rank=rank, ranks=ranks, check_folder=rank == 0)
        for rank, device in enumerate(devices[:1] if equal else devices)
    ]
    return [plan for plan, _ in plan_together(prepared, list)]


def plan_together(
    prepared: Sequence[Prepared],
    gather: Callable[[list[ExecutionSettings]], list[ExecutionSettings]],
    resumed: ExecutionSettings | None = None,
) -> list[tuple[Plan, Planned]]:
    """Plan the ranks of this process, so that they agree with all ranks of the run.

    `gather`: returns the settings of all ranks, from those of this process. `resumed`: the settings of the run that is
    resumed.
    """

    def make(one: Prepared, shared: ExecutionSettings | None, sharded: bool) -> tuple[Plan, Planned]:
        return plan(one, resumed or shared, may_recompute_more=resumed is not None, sharded=sharded)

    planned = [make(one, None, False) for one in prepared]
    settings = gather([each.choice for each, _ in planned])
    sharded = shard_on_all_ranks(settings)
    if sharded:  # the whole base does not fit on some rank
        pairs = zip(prepared, planned, strict=True)
        planned = [pair if pair[0].choice.streaming == TIER else make(one, None, True) for one, pair in pairs]
        settings = gather([each.choice for each, _ in planned])
    shared = shared_execution(settings)
    pairs = zip(prepared, planned, strict=True)
    return [pair if pair[0].choice.common == shared.common else make(one, shared, sharded) for one, pair in pairs]


def plan_session(
    session: Session, resumed: ExecutionSettings | None = None, *, in_resumed_sweep: bool = False
) -> tuple[Plan, Planned]:
    """Make the plan of this process. The main rank reads the data first, so that rows are encoded only once. `resumed`:
    the settings of the run that is resumed. `in_resumed_sweep`: the run is part of a sweep that is resumed. Raises:
    TunekitError with all refusals."""
    devices = session.devices

    def gather(settings: list[ExecutionSettings]) -> list[ExecutionSettings]:
        return [ExecutionSettings(**each) for each in devices.gather([asdict(each) for each in settings])]

    with session.timed("data"):
        prepared = devices.main_first(
            lambda: prepare(
                session.loaded,
                devices.device,
                rank=devices.rank,
                ranks=devices.world,
                resumed="run" if resumed else "sweep" if in_resumed_sweep else None,
                processors=session.processors,
            )
        )
        [(plan, planned)] = plan_together([prepared], gather, resumed)
    session.baseline_bytes = resident_bytes()  # planning has imported the libraries that the run needs
    raise_refusals(plan)
    return plan, planned
