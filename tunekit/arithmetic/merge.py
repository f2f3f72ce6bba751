"""Merges an adapter into its base, writes the result as a model or pipeline folder, and compares it with the unmerged
adapter."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import torch

from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.arithmetic import merge_output
from tunekit.arithmetic.merge_output import LogitDifference, MergeResult
from tunekit.arithmetic.merge_pipeline import merge_pipeline
from tunekit.arithmetic.on_base import attach_without_weights
from tunekit.errors import InputError, NumericsError
from tunekit.files.work_folder import check_new_folder, new_path
from tunekit.machine.memory import available_bytes
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, load_model, load_packed_folder
from tunekit.model.storage.model_folder import check_copied_files, copy_other_files
from tunekit.model.storage.rewrite import Changes, Rewriter
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection
from tunekit.targets.rows import readable_rows
from tunekit.targets.target import LoadedTarget, TargetSpec, family_of, load_target, processor_of, with_objective
from tunekit.tuned.network import prepare_network

SPARE_SHARE = 1.5  # needed memory, relative to the float32 weights: activations, logits and a temporary matrix
NetInputs = dict[str, torch.Tensor]  # the inputs of a net for one row
MAX_ROWS, MAX_TOKENS = 8, 64
PAIRS_NOTE = (
    'this model reads pairs of texts: pass both to the tokenizer, tokenizer(first, second, return_tensors="pt")'
)
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(first, second):\n    return first + second\n",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils sooner.",
    '{"name": "Ada", "born": 1815, "known_for": ["notes", "numbers"]}',
)


def merge(target: TargetSpec, output: Path, onto: str | None = None, dtype: torch.dtype | None = None) -> MergeResult:
    """Write the merged base to a temporary folder, compare it with the unmerged adapter, and rename the folder to
    `output`.

    After a failure, the temporary folder is removed. `dtype`: the dtype of the written weights; None: the dtype of the
    base.
    Raises: AdapterError if the adapter does not change weights; InputError for an invalid option or folder;
    ResourceError if the disk is too small.
    """
    if target.adapter is None and target.kind == "run":
        what = (
            f"there is nothing to merge: the run trained the base itself, and its result is {target.model.name_or_path}"
        )
        raise InputError(what, "use this folder directly")
    if target.adapter is None:
        raise InputError("there is no adapter to merge", "name an adapter folder, or a run")
    if not make_family(family_of(target)).is_pipeline:
        return _merge_model(target, target.adapter, output, onto, dtype)
    if onto not in (None, "full"):
        raise InputError(f"--onto {onto} is only for a quantized base, not for a pipeline", "leave it out")
    return merge_pipeline(target, target.adapter, output, dtype)


def _merge_model(
    target: TargetSpec, adapter: Path, output: Path, onto: str | None, dtype: torch.dtype | None
) -> MergeResult:
    chosen, reason = choose_onto(target, onto)
    if chosen == "quantized" and dtype is not None:
        raise InputError("quantized weights cannot be written in another dtype", "leave --dtype out", key="--dtype")
    source = find_source(target.model, weights=True)
    check_copied_files(target.model, source.folder)  # refused before the work
    processor = processor_of(target)
    target, objective = with_objective(target, processor)
    output = output.expanduser().absolute()
    check_new_folder(output, [source.folder / (source.gguf_file or ""), adapter])
    rewriter = Rewriter(target.model, chosen, dtype)
    attached = attach_without_weights(adapter, target.model, rewriter)
    changes = merge_output.collect_changes(attached)
    with new_path(output) as staging:
        merge_output.check_space(output, rewriter.output_bytes(changes))
        staging.mkdir()
        rewriter.write(staging, changes)
        answering = None if objective is None else objective.answering
        copy_other_files(target.model, source.folder, processor, target.chat_template, staging, answering)
        difference = measure_difference(target, staging, rewriter, changes)
        written = rewriter.dtype_of_output(f"{rewriter.embedding or next(iter(changes.layers))}.weight")
        pairs = PAIRS_NOTE if objective is not None and objective.facts.get("pairs") else ""
        note = make_family(family_of(target)).use_note(attached.net, staging) or pairs
        names = str(written)[6:], str(rewriter.compute_dtype)[6:]
        result = MergeResult(output, chosen, reason, names[0], names[1], difference, note)
        merge_output.write_report(staging, result)
    return result


def choose_onto(target: TargetSpec, onto: str | None) -> tuple[str, str]:
    """Which base weights the adapter is merged into ("full", "dequantized" or "quantized"), and the reason.

    Raises: InputError if `onto` does not fit the quantization of the base.
    """
    kind = target.model.quantization
    if kind == "none":
        if onto in (None, "full"):
            return "full", "the adapter was trained on the base's own weights"
        what = f"--onto {onto} is only for a quantized base, but this adapter's base is not quantized"
        raise InputError(what, "leave --onto out", key="--onto")
    if onto in (None, "dequantized"):
        return "dequantized", f"the adapter was trained on the {kind} weights, and these are their exact values"
    if onto == "full":
        return (
            "full",
            f"as requested; the adapter was trained on {kind} weights, so the result differs by the quantization error",
        )
    if onto != "quantized":
        raise InputError(f"--onto {onto} is unknown", "choose dequantized, full or quantized", key="--onto")
    if kind not in ("nf4", "fp4"):
        raise InputError(
            f"--onto quantized can only write nf4 and fp4 weights, but this base is {kind}",
            "choose dequantized or full",
        )
    return "quantized", f"as requested; rounding the merged weights to {kind} again loses a part of the adapter"


def measure_difference(target: TargetSpec, merged: Path, rewriter: Rewriter, changes: Changes) -> LogitDifference:
    """The difference between the logits of the unmerged adapter and of the merged model on the same rows.

    Only one of the two models is in memory at a time.
    """
    device, requantized = torch.device("cpu"), rewriter.onto == "quantized"
    loaded = load_target(target, device)
    running = loaded.model.base
    rows, described = _rows(target, loaded)
    before = logits_of(running, rows)
    dtype, attention, family = running.facts.dtype, running.facts.attention, running.family
    del loaded, running
    gc.collect()
    section = target.model.model_copy(
        update={"name_or_path": str(merged), "quantization": "none", "dtype": dtype, "attention": attention}
    )
    packed = load_packed_folder(section, device) if requantized else load_model(section, device=device)
    model = prepare_network(packed, replace(target.choice, streaming="off")).base
    difference = _compare(rows, before, logits_of(model, rows), described, predicts=family.answers and family.reads_ids)
    if requantized:
        return difference
    if dtype == "float32" and not rewriter.rounds():
        return replace(difference, written=difference.largest, unrounded=difference.largest, rounding=0.0)
    del packed, model
    gc.collect()
    return _without_rounding(difference, target, section, rewriter, changes, rows)


def _without_rounding(
    difference: LogitDifference,
    target: TargetSpec,
    section: ModelSection,
    rewriter: Rewriter,
    changes: Changes,
    rows: list[NetInputs],
) -> LogitDifference:
    """Adds to the measured difference the share that is due to rounding of the weights.

    Three models are compared in float32: the merged model as written, the merged model before rounding, and the
    unmerged adapter. The difference is returned unchanged if memory is too small, or if the vocabulary grew.
    """
    device = torch.device("cpu")
    free = available_bytes(device)
    small = free is not None and free < SPARE_SHARE * sum(each.numel() for each in rewriter.tensors.meta.values()) * 4
    if small or changes.vocabulary_size is not None:
        return difference
    model = load_model(section.model_copy(update={"dtype": "float32"}), device=device)
    rounded = logits_of(model, rows)
    rewriter.fill(model.net, changes)
    exact = logits_of(model, rows)
    rewriter.fill(model.net, Changes({}, {}))
    rewriter.tie(model.net)  # the adapter's file has the tensors of a tied base
    assert target.adapter is not None
    head, base = model.family.head_name(model.net), rewriter.fingerprint()
    attach_adapter_folder(model.net, target.adapter, head_name=head, base_fingerprint=base, device=device)
    running = logits_of(model, rows)
    written, unrounded = _largest(running, rounded), _largest(running, exact)
    return replace(difference, written=written, unrounded=unrounded, rounding=_largest(exact, rounded))


def _largest(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest absolute difference; NaN if one of the differences is NaN."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(before, after, strict=True)]).max())


def _rows(target: TargetSpec, loaded: LoadedTarget) -> tuple[list[NetInputs], str]:
    """The network's inputs for the rows of the comparison, and a description of these rows.

    The rows are up to MAX_ROWS evaluation rows of the run, each cut to MAX_TOKENS ids. If the run has no readable
    evaluation rows, they are fixed texts, or one row of noise for a model that does not read text.
    """
    base, objective = loaded.model.base, loaded.objective
    family = base.family
    reason = ""
    if target.data is not None and target.data.eval is not None:
        loaded_rows, reason = readable_rows(target, objective)
        evaluation = None if loaded_rows is None else loaded_rows.evaluation
        if evaluation is not None and len(evaluation):
            chosen = [evaluation[index] for index in range(min(MAX_ROWS, len(evaluation)))]
            described = f"{len(chosen)} eval rows of the run"
            if not family.reads_ids:
                return [objective.rows.collate([[row]]).inputs for row in chosen], described
            ids = [torch.tensor(objective.rows.text_ids(row)[:MAX_TOKENS].astype("int64"))[None] for row in chosen]
            return [family.inputs_of(each) for each in ids], described
    if not family.reads_ids or base.text is None:
        return [family.trial_inputs(base.net)], f"one row of noise{reason}"
    tokenizer, size = loaded.tokenizer, base.text.vocabulary_size
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = [[*start, *tokenizer.encode(text)][:MAX_TOKENS] for text in TEXTS]
    fitting = [torch.tensor(each)[None] for each in encoded if max(each, default=size) < size]
    return [family.inputs_of(each) for each in fitting], f"{len(fitting)} fixed texts{reason}"


@torch.no_grad()
def logits_of(model: LoadedModel, rows: list[NetInputs]) -> list[torch.Tensor]:
    """The logits (T, V) float32 of each row."""
    cast = [
        {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in row.items()} for row in rows
    ]
    return [model.family.scores(model.net, row) for row in cast]


def _compare(
    rows: list[NetInputs], before: list[torch.Tensor], after: list[torch.Tensor], described: str, *, predicts: bool
) -> LogitDifference:
    gaps = [(first - second).abs() for first, second in zip(before, after, strict=True)]
    count, largest = sum(gap.numel() for gap in gaps), _largest(before, after)
    if not math.isfinite(largest):
        what = f"the logits of the unmerged adapter or of the merged model are not finite on {described}"
        raise NumericsError(what, "the training diverged, or numbers overflow in float16; try model.dtype=float32")
    return LogitDifference(
        largest=largest,
        mean=sum(float(gap.double().sum()) for gap in gaps) / count,
        spread=float(torch.cat([logits.reshape(-1) for logits in before]).std()),
        running_loss=_loss(rows, before) if predicts else None,
        merged_loss=_loss(rows, after) if predicts else None,
        rows=described,
        tokens=sum(each.numel() for row in rows for name, each in row.items() if name.endswith("input_ids")),
    )


def _loss(rows: list[NetInputs], logits: list[torch.Tensor]) -> float:
    """The mean next-token loss over all rows."""
    predicted = torch.cat([each[:-1] for each in logits])  # (N, V)
    targets = torch.cat([row["input_ids"][0, 1:] for row in rows])  # (N,)
    return float(torch.nn.functional.cross_entropy(predicted, targets))
