"""Plans a run in its process, with the other ranks. Training and sweeps both need it."""

from dataclasses import asdict

from tunekit.machine.memory import resident_bytes
from tunekit.planning.findings import raise_refusals
from tunekit.planning.prepare import prepare
from tunekit.planning.ranks import plan_together
from tunekit.records import ExecutionSettings, Plan
from tunekit.training.planned import Planned
from tunekit.training.session import Session


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
                resumed=resumed is not None,
                in_resumed_sweep=in_resumed_sweep,
                processors=session.processors,
            )
        )
        [(plan, planned)] = plan_together([prepared], gather, resumed)
    session.baseline_bytes = resident_bytes()  # planning has imported the libraries that the run needs
    raise_refusals(plan)
    return plan, planned
