"""Base plus adapter as one model folder, and how far it is from the running adapter."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.arithmetic.on_base import attach_without_weights
from tunekit.contracts import Objective
from tunekit.data.rows import load_rows
from tunekit.errors import AdapterError, InputError, ResourceError
from tunekit.files.durable import free_bytes, write_json
from tunekit.model.load import LoadedModel, load_model, load_packed_folder
from tunekit.model.storage.model_folder import copy_companions, whole_model_folder
from tunekit.model.storage.rewrite import Changes, Rewriter
from tunekit.model.storage.source import find_source
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.records import bytes_text
from tunekit.tuned.network import prepare_network
from tunekit.tuned.target import Target, as_trained, load_target

REPORT = "merge_report.json"
SPARE_BYTES = 64 * 2**20  # configuration, tokenizer, report
MAX_ROWS, MAX_TOKENS = 8, 64
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(first, second):\n    return first + second\n",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils sooner.",
    '{"name": "Ada", "born": 1815, "known_for": ["notes", "numbers"]}',
)


@dataclass(frozen=True)
class Difference:
    """Absolute differences of logits, with the spread of the logits to compare them with, and mean token losses."""

    largest: float
    mean: float
    spread: float
    running_loss: float | None  # of the next token; None of models that predict none
    merged_loss: float | None
    rows: str  # which rows, in words
    tokens: int


@dataclass(frozen=True)
class MergeResult:
    """What was written, onto what and why, and how far the result is from the running adapter."""

    folder: Path
    onto: str
    reason: str
    difference: Difference


def merge_adapter(target: Target, output: Path, onto: str | None = None) -> MergeResult:
    """Write the merged model beside `output`, measure it, and rename it into place; on any failure nothing stays.

    Raises: AdapterError where the method is no change of weights; InputError for a choice or a folder that cannot be;
    ResourceError where the disk is too small.
    """
    if target.adapter is None and target.kind == "run":
        what = f"there is nothing to merge: the run trained its base, and the result is {target.model.name_or_path}"
        raise InputError(what, "use that folder as it is")
    if target.adapter is None:
        raise InputError("there is no adapter to merge", "name an adapter folder, or a run")
    chosen, reason = choose_onto(target, onto)
    source = find_source(target.model, weights=True)
    adapter = target.adapter
    target, _ = as_trained(target, load_tokenizer(target.model))
    output = output.expanduser().absolute()
    _check_output(output, [source.folder, adapter])
    rewriter = Rewriter(target.model, chosen)
    changes = collect_changes(attach_without_weights(adapter, target.model, rewriter))
    _check_space(output, rewriter.output_bytes(changes))
    with whole_model_folder(output) as staging:
        rewriter.write(staging, changes)
        copy_companions(target.model, source.folder, load_tokenizer(target.model), target.chat_template, staging)
        difference = measure_difference(target, staging, requantized=chosen == "quantized")
        write_json(staging / REPORT, _report(chosen, reason, difference))
    return MergeResult(output, chosen, reason, difference)


def choose_onto(target: Target, onto: str | None) -> tuple[str, str]:
    """What to merge onto, and why, in words.

    Raises: InputError where the base is not quantized, or not to 4 bits.
    """
    kind = target.model.quantization
    if kind == "none":
        if onto in (None, "full"):
            return "full", "the adapter was trained on the base's own weights"
        raise InputError(f"--onto {onto} is for a quantized base, and this adapter was trained on a full one")
    if onto in (None, "dequantized"):
        return "dequantized", f"the adapter was trained on the {kind} weights, and these are their exact values"
    if onto == "full":
        return "full", f"asked for; the adapter was trained on {kind} weights, so the result differs by their rounding"
    if onto != "quantized":
        raise InputError(f"--onto {onto} is unknown", "choose dequantized, full or quantized", key="--onto")
    if kind not in ("nf4", "fp4"):
        raise InputError(f"--onto quantized writes nf4 and fp4, and this base is {kind}", "choose dequantized or full")
    return "quantized", f"asked for; rounding the merged weights to {kind} again loses a part of the adapter"


def _check_output(output: Path, sources: list[Path]) -> None:
    """A new or empty folder, apart from base and adapter."""
    for source in sources:
        real, place = source.resolve(), output.resolve()
        if place == real or real in place.parents or place in real.parents:
            raise InputError(f"{output} overlaps {source}, from which the merge reads", "choose another --output")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} exists and is not a folder", "choose another --output")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty", "choose another --output, or empty it yourself")


def _check_space(output: Path, weight_bytes: int) -> None:
    wanted, free = weight_bytes + SPARE_BYTES, free_bytes(output.parent)
    if wanted > free:
        raise ResourceError(
            f"{output} needs {bytes_text(wanted)}, and {bytes_text(free)} are free there", "choose another disk"
        )


def collect_changes(attached: AttachedAdapter) -> Changes:
    """The adapter as changes of layers and parameters.

    Raises: AdapterError for a method that changes what goes in or out and not the weights.
    """
    if attached.model_adapter is not None:
        raise AdapterError("a prompt adapter is not a change of weights and cannot be merged", "use it as an adapter")
    parameters: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        name: adapter.merged for name, adapter in attached.parameters.items()
    }
    for name, copy in attached.copies.items():
        for own_name, tensor in copy.copied().items():
            parameters[f"{name}.{own_name}"] = _constant(tensor.detach().float())
    for name, tokens in attached.tokens.items():
        change = tokens.merged  # one and the same for a tied head, so that it stays tied
        parameters[f"{name}.weight"] = change
        if attached.head_name in attached.tied_tokens.get(name, ()):
            parameters[f"{attached.head_name}.weight"] = change
    return Changes(layers={name: layer.merged for name, layer in attached.layers.items()}, parameters=parameters)


def _constant(new: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change that does not ask what was there."""
    return lambda _old: new


def _report(onto: str, reason: str, difference: Difference) -> dict[str, object]:
    return {
        "onto": onto,
        "reason": reason,
        "largest_logit_difference": difference.largest,
        "mean_logit_difference": difference.mean,
        "logit_spread": difference.spread,
        "measured_on": difference.rows,
        "tokens": difference.tokens,
        "loss_running": difference.running_loss,
        "loss_merged": difference.merged_loss,
    }


def measure_difference(target: Target, merged: Path, *, requantized: bool) -> Difference:
    """Run both models on the same rows, one after the other, so that only one is in memory."""
    device = torch.device("cpu")
    tokenizer = load_tokenizer(target.model)
    loaded = load_target(target, device)
    running = loaded.model.base
    rows, described = _rows(target, loaded.objective, tokenizer, running.text.vocabulary_size)
    before = [_logits(running, row) for row in rows]
    dtype, attention = running.facts.dtype, running.facts.attention
    family = running.family
    del loaded, running
    gc.collect()
    section = target.model.model_copy(
        update={"name_or_path": str(merged), "quantization": "none", "dtype": dtype, "attention": attention}
    )
    packed = load_packed_folder(section, device) if requantized else load_model(section, device=device)
    model = prepare_network(packed, replace(target.choice, streaming="off")).base
    after = [_logits(model, row) for row in rows]
    return _compare(rows, before, after, described, predicts=family.answers)


def _rows(
    target: Target, objective: Objective, tokenizer: LoadedTokenizer, vocabulary_size: int
) -> tuple[list[torch.Tensor], str]:
    """Up to MAX_ROWS held-out rows of up to MAX_TOKENS ids: the run's eval rows, else fixed texts."""
    if target.data is not None and target.data.eval is not None:
        evaluation = load_rows(target.data, objective, seed=target.seed).evaluation
        if evaluation is not None and len(evaluation):
            chosen = [evaluation[index] for index in range(min(MAX_ROWS, len(evaluation)))]
            parts = [[row.parts[name] for name in objective.layout.token_parts] for row in chosen]
            rows = [torch.tensor(np.concatenate(ids)[:MAX_TOKENS].astype("int64"))[None] for ids in parts]
            return rows, f"{len(rows)} eval rows of the run"
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    encoded = [[*start, *tokenizer.encode(text)][:MAX_TOKENS] for text in TEXTS]
    fitting = [ids for ids in encoded if max(ids, default=vocabulary_size) < vocabulary_size]
    return [torch.tensor(ids)[None] for ids in fitting], f"{len(fitting)} fixed texts"


@torch.no_grad()
def _logits(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head makes of one row (1, T): (T, V) float32."""
    return model.family.scores(model.net, ids)


def _compare(
    rows: list[torch.Tensor],
    before: list[torch.Tensor],
    after: list[torch.Tensor],
    described: str,
    *,
    predicts: bool,
) -> Difference:
    gaps = [(first - second).abs() for first, second in zip(before, after, strict=True)]
    count = sum(gap.numel() for gap in gaps)
    return Difference(
        largest=max(float(gap.max()) for gap in gaps),
        mean=sum(float(gap.double().sum()) for gap in gaps) / count,
        spread=float(torch.cat([logits.reshape(-1) for logits in before]).std()),
        running_loss=_loss(rows, before) if predicts else None,
        merged_loss=_loss(rows, after) if predicts else None,
        rows=described,
        tokens=sum(row.shape[1] for row in rows),
    )


def _loss(rows: list[torch.Tensor], logits: list[torch.Tensor]) -> float:
    """Mean loss of the next token over all rows."""
    predicted = torch.cat([each[:-1] for each in logits])  # (N, V)
    targets = torch.cat([row[0, 1:] for row in rows])  # (N,)
    return float(torch.nn.functional.cross_entropy(predicted, targets))
