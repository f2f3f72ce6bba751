"""The trained model, the plan and what was measured go in; a folder with the result and the report's facts come out."""

from __future__ import annotations

from dataclasses import dataclass

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.artifacts.run import RunFolder
from tunekit.contracts import Objective
from tunekit.model.load import LoadedModel
from tunekit.model.storage.model_folder import copy_companions, whole_model_folder
from tunekit.model.storage.rewrite import Rewriter
from tunekit.records import Plan, Reaction, ReportFacts
from tunekit.training.state import LoopState, Prepared
from tunekit.tuned.model import TunedModel


@dataclass(frozen=True)
class Measured:
    """What was measured; None where this device has no such number."""

    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_host_bytes: int
    host_growth_bytes: int  # peak_host_bytes less what the process had before it loaded the base
    base_bytes: int


def export_result(
    run: RunFolder, model: TunedModel, objective: Objective, prepared: Prepared, chat_template: str | None
) -> tuple[str, int]:
    """Write what was trained; the name of its folder, and its bytes."""
    base, adapter = model.base, model.adapter
    assert adapter is not None
    if prepared.adapter.trains_base:
        return "model", export_model(run, base, adapter, prepared, chat_template)
    return "adapter", export_adapter(run, base, adapter, objective, chat_template)


def export_adapter(
    run: RunFolder,
    base: LoadedModel,
    adapter: AttachedAdapter,
    objective: Objective,
    chat_template: str | None = None,
) -> int:
    """Write adapter/ whole or not at all; returns its bytes."""
    return save_adapter_folder(
        adapter,
        run.path / "adapter",
        base_name=base.name_or_path,
        base_fingerprint=base.fingerprint,
        revision=base.revision,
        base_dtype=base.facts.dtype,
        quantization=base.quantization,
        double_quantization=base.double_quantization,
        task_type=base.family.task_type,
        chat_template=chat_template,
        objective={"method": objective.name, **objective.facts},
    )


def export_model(
    run: RunFolder, base: LoadedModel, adapter: AttachedAdapter, prepared: Prepared, chat_template: str | None
) -> int:
    """Write model/ whole or not at all, in the dtype of the base's files, a shard in memory at a time; its bytes."""
    folder, rewriter = run.path / "model", Rewriter(prepared.model, "full", base)
    with whole_model_folder(folder) as staging:
        rewriter.write(staging, rewriter.as_changes(adapter.trained()))
        copy_companions(prepared.model, rewriter.source.folder, prepared.tokenizer, chat_template, staging)
    return sum(path.stat().st_size for path in folder.iterdir())


def report_facts(
    plan: Plan,
    state: LoopState,
    measured: Measured,
    adapter_bytes: int,
    run: RunFolder,
    saved_best: bool,
) -> ReportFacts:
    """Everything report.json says, all legs of a resumed run together."""
    rows, train_seconds = plan.rows.training, state.seconds.get("train", 0.0)
    device = "cpu" if measured.peak_allocated_bytes is None else "cuda"
    peak = measured.host_growth_bytes if device == "cpu" else measured.peak_allocated_bytes
    return ReportFacts(
        peak_allocated_bytes=measured.peak_allocated_bytes,
        peak_reserved_bytes=measured.peak_reserved_bytes,
        peak_host_bytes=measured.peak_host_bytes,
        tokens_per_second=state.tokens / train_seconds if train_seconds else None,
        supervised_tokens_per_second=state.supervised_tokens / train_seconds if train_seconds else None,
        seconds={name: round(value, 3) for name, value in sorted(state.seconds.items())},
        rows={"read": rows.read, "trained": rows.trained, "dropped": rows.dropped, "truncated": rows.truncated},
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        predicted_bytes={device: plan.peak_bytes.total},
        measured_bytes={device: int(peak or 0)},
        adapter_bytes=adapter_bytes,
        base_bytes=measured.base_bytes,
        trainable_parameters=plan.trainable_parameters,
        best_step=state.best_step if saved_best else None,
        final_step=state.step,
        final_loss=state.loss,
        evaluations=[record for record in run.read_metrics() if "eval" in record],
        reactions=[Reaction(**reaction) for reaction in state.reactions],
        calibration=state.calibration,
        budget_bytes=plan.budget_bytes,
    )
