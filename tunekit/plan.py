"""`tunekit plan`: prints the plan of a training run, and writes it as JSON."""

from dataclasses import asdict

from tunekit.artifacts.report.next_step import after_plan
from tunekit.artifacts.report.plan_page import facts, memory_rows, target_rows
from tunekit.console import Console
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.files.durable import json_result
from tunekit.machine.devices import make_devices
from tunekit.machine.memory import available_bytes
from tunekit.planning.findings import raise_refusals
from tunekit.planning.plan import make_plan
from tunekit.recipe.load import LoadedRecipe


def plan_verb(loaded: LoadedRecipe, json_file: str | None, ranks: int = 1) -> None:
    """Print the plan of a training run on `ranks` processes.

    Raises: TunekitError with all refusals.
    """
    refuse_to_replace("--json", json_file, loaded)
    write_result = json_result(json_file)
    devices = make_devices()
    console = Console(enabled=devices.is_main, json_file=json_file)
    try:
        console.info(*loaded.rewrites)
        ranks = max(ranks, devices.world)
        plan, _ = make_plan(loaded, device=devices.device, check_folder=True, ranks=ranks)
        console.panel(plan.model.name_or_path, facts(plan))
        console.table(["target", "layers", "shape", "rank", "parameters"], target_rows(plan))
        where = "at the peak" if ranks == 1 else f"at the peak, on each of {ranks} ranks"
        console.table(["memory", where], memory_rows(plan, available_bytes(devices.device)))
        console.info(*plan.notes)
        console.next_steps(after_plan(plan, loaded.path, overridden=bool(loaded.overridden)))
        if devices.is_main:
            write_result(asdict(plan))
    finally:
        devices.close()
    raise_refusals(plan)
