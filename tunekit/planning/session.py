"""Plans a run in its process, with the other ranks, and prints the plan. Training and sweeps both need it."""

from dataclasses import asdict

from tunekit.artifacts.report.plan_page import WEIGHTS
from tunekit.machine.memory import resident_bytes
from tunekit.planning.findings import raise_refusals
from tunekit.planning.prepare import prepare
from tunekit.planning.ranks import plan_together
from tunekit.recipe.reading.names import shows_of
from tunekit.records import ExecutionSettings, Plan, bytes_text
from tunekit.training.planned import Planned
from tunekit.training.session import Session


def plan_session(session: Session, resumed: ExecutionSettings | None = None) -> tuple[Plan, Planned]:
    """Make the plan of this process. The main rank reads the data first, so that rows are encoded only once. `resumed`:
    the settings of the run that is resumed. Raises: TunekitError with all refusals."""
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
                processors=session.processors,
            )
        )
        [(plan, planned)] = plan_together([prepared], gather, resumed)
    session.baseline_bytes = resident_bytes()  # planning has imported the libraries that the run needs
    raise_refusals(plan)
    return plan, planned


def print_plan(session: Session, plan: Plan) -> None:
    """Print the most important facts of the plan. The trials of a sweep print a line only once."""
    console, facts, rows = session.console, plan.model, plan.rows.training
    peaks = session.devices.gather([bytes_text(plan.peak_bytes.total)])
    weights = WEIGHTS.get(facts.quantization, facts.quantization)
    quantized = "" if facts.quantization == "none" else f", weights in {weights}"
    lines = [
        f"{facts.name_or_path}: {facts.model_type}, computed in {facts.dtype}{quantized}; "
        f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters trained",
        f"{rows.trained:,} rows, {rows.dropped:,} dropped, {plan.steps:,} steps, {plan.supervised_tokens:,} "
        f"{shows_of(plan.objective).units}; predicted peak {', '.join(peaks)}"
        f"{' on the ranks' if len(peaks) > 1 else ''}",
        *plan.notes,
    ]
    console.info(*(line for line in lines if line not in session.described))
    session.described.update(lines)
