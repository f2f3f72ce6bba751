"""The output of `tunekit plan`: facts about the run, and tables of the adapted layers and of the memory."""

from dataclasses import asdict

from tunekit.recipe.reading.names import shows_of
from tunekit.records import Plan, Target, bytes_text, short_name

ATTENTION = {
    "products_per_document": "matrix products, separately for each document of a row; sdpa if they do not fit",
    "sdpa_per_document": "sdpa, separately for each document of a row",
    "eager_per_document": "eager, separately for each document of a row",
    "varlen_per_document": "one kernel for all documents of a row; if it cannot be used, sdpa for each document",
}
WEIGHTS = {"none": "not quantized", "kept": "the quantized blocks of the file"}
SMALLEST_LOGITS = 1024  # bytes; for a denoiser nothing counts as logits, for a classifier often only the loss


def facts(plan: Plan) -> dict[str, object]:
    """The facts about the run that `tunekit plan` prints, by name. A value is None if it does not apply."""
    model, rows, choice = plan.model, plan.rows.training, plan.choice
    per_epoch = "" if plan.rows.steps_per_epoch is None else f", {plan.rows.steps_per_epoch:,} an epoch"
    share = plan.trainable_parameters / max(plan.total_parameters, 1)
    about = "about " if rows.estimated else ""
    shows, kernel = shows_of(plan.objective), model.attention
    attention = kernel if plan.text is None else ATTENTION.get(kernel, f"{kernel}, with a mask over whole rows")
    learned = f"{about}{plan.supervised_tokens:,} {shows.units}"
    dropped = "".join(f"; {number:,} dropped: {reason}" for reason, number in rows.dropped_reasons.items())
    return {
        "model": f"{model.model_type}, {model.layers} layers, computed in {model.dtype} on {plan.device}",
        "weights": WEIGHTS.get(model.quantization, model.quantization),
        "parameters": f"{plan.trainable_parameters:,} of {plan.total_parameters:,} trained ({share:.2%})",
        "rows": f"{rows.trained:,} of {rows.read:,} ({rows.truncated:,} truncated{dropped})",
        shows.sizes: f"{about}{rows.tokens:,} an epoch; {learned} in the run",
        "evaluation rows": None if plan.rows.evaluation is None else f"{plan.rows.evaluation.trained:,}",
        "attention": attention,
        "packing": None if plan.text is None else f"{'yes' if plan.rows.packing else 'no'}: {plan.rows.packing_reason}",
        "steps": f"{plan.steps:,}{per_epoch}; {plan.warmup_steps:,} of warm-up",
        "micro-batches": _micro_batches(plan),
        "longest first": f"{'yes' if plan.tries_longest_batch else 'no'}: {plan.trial_reason}",
        "recomputed": f"{choice.checkpointed_layers} of {model.layers} layers",
        "threads": _threads(plan),
        "logits": None if plan.text is None else f"{choice.logits_chunk_tokens:,} positions at a time",
    }


def _micro_batches(plan: Plan) -> str:
    """How a step's rows are divided into micro-batches."""
    count = plan.choice.micro_batch_size
    unit = ("pack" if plan.rows.packing else "row") + ("" if count == 1 else "s")
    tokens = plan.recipe.get("training", {}).get("micro_batch_tokens")
    size = f"{count:,} {unit}" if count else f"{unit} of {tokens:,} padded {shows_of(plan.objective).sizes}"
    steps = plan.choice.gradient_accumulation_steps
    rows = f": {count * steps:,} {'packs' if plan.rows.packing else 'rows'} a step" if count else ""
    return f"{steps:,} a step, of {size} each{rows}"


def _threads(plan: Plan) -> str | None:
    """The number of CPU threads as text; None if the run does not compute on a CPU."""
    count = plan.choice.threads
    if count is None or plan.device != "cpu":
        return None
    adapts = plan.recipe.get("training", {}).get("threads") == "adaptive" and count > 1
    return f"{count:,}" + (" at first, fewer while other programs use the cores" if adapts else "")


def target_rows(plan: Plan) -> list[list[object]]:
    """One line of the table of adapted layers: name, layers, shape, rank, parameters. Layers with the same last name,
    shape and rank share a line."""
    grouped: dict[tuple[str, str, int | None], list[Target]] = {}
    for target in plan.targets:
        shape = f"{target.in_features} -> {target.out_features}"
        grouped.setdefault((short_name(target.name), shape, target.r), []).append(target)
    return [
        [name, len(group), shape, rank, sum(target.trainable_parameters for target in group)]
        for (name, shape, rank), group in grouped.items()
    ]


def memory_rows(plan: Plan, available: int | None) -> list[list[object]]:
    """The table of memory: one line for each part of the predicted peak, and a last line with the total, the budget and
    the device's free memory."""
    parts = {name: size for name, size in asdict(plan.peak_bytes).items() if name != "total"}
    limits = [(plan.budget_bytes, "in the budget"), (available, "free")]
    free = ", ".join(f"{bytes_text(size)} {name}" for size, name in limits if size is not None)
    shown = {name: size for name, size in parts.items() if size >= SMALLEST_LOGITS or name != "logits"}
    lines: list[list[object]] = [[name, bytes_text(size)] for name, size in shown.items()]
    kept = plan.peak_bytes.total - sum(parts.values())
    if kept > 0:
        lines.append(["the process, freed memory that malloc keeps, and loading", bytes_text(kept)])
    return [*lines, ["peak", bytes_text(plan.peak_bytes.total) + (free and f" of {free}")]]
