"""`tunekit plan`: prints the plan of a training run, and writes it as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

import torch

from tunekit.artifacts.report.next_step import after_plan
from tunekit.artifacts.report.plan_page import facts, memory_rows, target_rows
from tunekit.console import Console
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.errors import RecipeError
from tunekit.files.durable import json_result
from tunekit.machine.cards import card_named, planning_for
from tunekit.machine.devices import Devices, make_devices
from tunekit.machine.memory import available_bytes
from tunekit.planning.card_speed import speed_note
from tunekit.planning.checks import raise_refusals
from tunekit.planning.ranks import devices_of, plan_ranks
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import Plan


def plan_verb(
    loaded: LoadedRecipe, json_file: str | None, ranks: int = 1, device: str | None = None, card: str | None = None
) -> None:
    """Print the plan of a training run on `ranks` processes. `device`: --device, for the command to train. `card`: the
    name of a card that is not in this machine.

    Raises: TunekitError with all refusals.
    """
    planned = None if card is None else card_named(card)
    if planned is not None and device is not None:
        raise RecipeError(f"--device {device} and --card {card} name two devices", "leave one of them out")
    refuse_to_replace("--json", json_file, loaded)
    write_result = json_result(json_file)
    devices = Devices(torch.device("cpu")) if planned else make_devices()
    console = Console(enabled=devices.is_main, json_file=json_file)
    with devices, planning_for(planned):
        console.info(*loaded.rewrites)
        places = devices_of(torch.device("cuda") if planned else devices.device, max(ranks, devices.world))
        plans = plan_ranks(loaded, places)
        plan = plans[0]
        console.panel(plan.model.name_or_path, facts(plan))
        console.table(["target", "layers", "shape", "rank", "parameters"], target_rows(plan))
        console.table(["memory", *_heads(len(plans), len(places))], _memory_rows(plans, places))
        speed = None if card is None or planned is None or plan.refusals else speed_note(plan, card, planned)
        console.info(*plan.notes, *([] if speed is None else [speed]))
        for rank, other in enumerate(plans):
            console.info(*(f"rank {rank}: {note}" for note in other.notes if note not in plan.notes))
        refused = next((each for each in plans if each.refusals), plan)
        command = partial(after_plan, overrides=loaded.overrides, ranks=len(places), device=device)
        console.next_steps(command(refused, loaded.path))
        if devices.is_main:
            more = {"peak_bytes_of_ranks": [each.peak_bytes.total for each in plans]} if len(plans) > 1 else {}
            write_result(asdict(plan) | more)
        raise_refusals(plan)
        for rank, other in enumerate(plans):
            named = [replace(refusal, message=f"rank {rank}: {refusal.message}") for refusal in other.refusals]
            raise_refusals(replace(other, refusals=named))


def _heads(plans: int, ranks: int) -> list[str]:
    """The heads of the columns of the table of memory."""
    if plans > 1:
        return [f"rank {rank}" for rank in range(ranks)]
    return ["at the peak" if ranks == 1 else f"at the peak, on each of {ranks} ranks"]


def _memory_rows(plans: Sequence[Plan], places: Sequence[torch.device]) -> list[list[object]]:
    """The table of memory, with one column for each plan."""
    pairs = zip(plans, places, strict=False)
    tables = [memory_rows(plan, available_bytes(place)) for plan, place in pairs]
    columns = [{row[0]: row[1] for row in table} for table in tables]
    names = dict.fromkeys(name for column in columns for name in column if name != "peak")
    return [[name, *(column.get(name, "") for column in columns)] for name in [*names, "peak"]]
