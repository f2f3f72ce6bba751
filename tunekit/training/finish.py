"""Collects the facts about a finished run for its report."""

from collections.abc import Sequence
from statistics import fmean

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.artifacts.report.next_step import AFTER_VERDICT
from tunekit.artifacts.run import RunFolder
from tunekit.machine.memory import device_peaks, peak_host_bytes
from tunekit.metrics.classes import class_facts
from tunekit.model.quantized.weights import stored_bytes
from tunekit.recipe.bases.paths import relative_to
from tunekit.recipe.reading.names import shows_of
from tunekit.records import Plan, Reaction, ReportFacts
from tunekit.training.loss_warnings import KEEP_BEST, last_jump, rise
from tunekit.training.run import Run
from tunekit.tuned.model import TunedModel

REPORTED = ("step", "eval", "sources", "search")  # keys of an evaluation's record that the report contains


def _ends(name: str, values: Sequence[float], tenth: int) -> dict[str, float]:
    """The mean of a metric over the first `tenth` steps and over the last `tenth` steps."""
    return {f"first_{name}": fmean(values[:tenth]), f"final_{name}": fmean(values[-tenth:])} if values else {}


def remedy(saved_best: bool, final_step: int, run: RunFolder) -> str:
    """The advice for a run that ended badly: how to change the training, and how to export the weights of an earlier
    step."""
    if saved_best:
        return AFTER_VERDICT
    earlier = [step for step, _ in list_checkpoints(run.checkpoints) if step < final_step]
    kept = f"the checkpoint of step {earlier[0]} is {relative_to(run.path)}@{earlier[0]}" if earlier else ""
    return f"{AFTER_VERDICT}; {KEEP_BEST}; {kept or 'set training.save_steps to save checkpoints of earlier steps'}"


def base_bytes(model: TunedModel) -> int:
    """The stored bytes of the base. An adapter of the whole model is not part of the network."""
    parts = [] if model.adapter is None else model.adapter.parts()
    inside = [part for part in parts if part is not (model.adapter and model.adapter.model_adapter)]
    adapter_bytes = sum(tensor.nbytes for part in inside for tensor in part.state().values())
    return stored_bytes(model.base.net) - adapter_bytes


def report_facts(
    plan: Plan, run: Run, folder: RunFolder, adapter_bytes: int, *, saved_best: bool, start: str
) -> ReportFacts:
    """All facts for report.json. For a resumed run, they include the time before the resume. `start`: the name of the
    model before training."""
    state, records = run.state, folder.read_metrics()
    steps = [record["loss"] for record in records if "eval" not in record]
    name = shows_of(plan.objective).headline.name
    headline = [record[name] for record in records if name in record] if name != "loss" else []
    tenth = -(-len(steps) // 10)
    evaluations = [record for record in records if "eval" in record]
    classes = {record["step"]: record.get("classes") for record in evaluations}
    losses = {record["step"]: record["eval"].get("loss") for record in evaluations}
    exported = state.best_step if saved_best else max(losses, default=None)
    before, loss = losses.get(0), losses.get(exported)
    verdict = rise(steps) if (before is None or loss is None) and not headline else None
    if before is not None and loss is not None and loss > before:
        verdict = f"the exported weights are worse than {start}: eval loss {loss:.4g}, but {before:.4g} before training"
    if verdict is None and not headline and not saved_best:
        verdict = last_jump(steps)
    rows, train_seconds = plan.rows.training, state.seconds.get("train", 0.0)
    device, peaks = run.devices.device, device_peaks(run.devices.device)
    base, elsewhere = base_bytes(run.model), 0 if run.model.slots is None else run.model.slots.elsewhere_bytes
    return ReportFacts(
        peak_requested_bytes=peaks.requested,
        peak_allocated_bytes=peaks.allocated,
        peak_reserved_bytes=peaks.reserved,
        peak_host_bytes=peak_host_bytes(),
        tokens_per_second=state.tokens / train_seconds if train_seconds else None,
        supervised_tokens_per_second=state.supervised_tokens / train_seconds if train_seconds else None,
        seconds={name: round(value, 3) for name, value in sorted(state.seconds.items())},
        rows={"read": rows.read, "trained": rows.trained, "dropped": rows.dropped, "truncated": rows.truncated},
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        predicted_bytes={device.type: plan.peak_bytes.total},
        measured_bytes={device.type: run.session.peak_bytes()},
        adapter_bytes=adapter_bytes,
        base_bytes=base,
        base_bytes_of_rank=base - elsewhere if elsewhere else None,
        trainable_parameters=plan.trainable_parameters,
        best_step=state.best_step if saved_best else None,
        final_step=state.step,
        first_loss=fmean(steps[:tenth]) if steps else None,
        final_loss=fmean(steps[-tenth:]) if steps else None,
        headline=_ends(name, headline, tenth),
        base_eval_loss=before,
        eval_loss=loss,
        verdict=verdict,
        evaluations=[{name: record[name] for name in REPORTED if name in record} for record in evaluations],
        classes=None if (counts := classes.get(exported)) is None else class_facts(counts),
        reactions=[Reaction(**reaction) for reaction in state.reactions],
        skipped_steps=state.scale.skipped_steps if state.scale.enabled else None,
        calibration=state.calibration,
        budget_bytes=plan.budget_bytes,
        starts=state.starts,
    )
