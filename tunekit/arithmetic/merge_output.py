"""Code for merging models and for merging pipelines: checks of the output folder, the changes of weights, and the
report."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.module_names import base_modules
from tunekit.errors import AdapterError, ResourceError
from tunekit.files.durable import free_bytes, write_json
from tunekit.model.storage.rewrite import Changes
from tunekit.records import bytes_text

ParameterChange = Callable[[torch.Tensor], torch.Tensor]  # old parameter -> new parameter
REPORT = "merge_report.json"
SPARE_BYTES = 64 * 2**20  # disk space for configuration, tokenizer and report


@dataclass(frozen=True)
class LogitDifference:
    """Absolute differences between the logits of the unmerged adapter and the logits of the merged model, and the mean
    token loss of both.

    `spread`: the standard deviation of the logits, for comparison.
    """

    largest: float
    mean: float
    spread: float
    rows: str  # a description of the rows
    tokens: int
    running_loss: float | None = None  # next-token loss; None for models that do not predict tokens
    merged_loss: float | None = None
    # The largest differences if everything is computed in float32:
    written: float | None = None  # of the written weights
    unrounded: float | None = None  # of the merged weights before rounding
    rounding: float | None = None  # between these two


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge. `onto`, `reason`: which base weights the adapter was merged into, and why. `difference`:
    how much the merged model differs from the unmerged adapter."""

    folder: Path
    onto: str
    reason: str
    dtype: str  # dtype of the written weights
    computed_in: str
    difference: LogitDifference
    note: str = ""  # how to call the model, if other programs do not do so by default


def check_space(output: Path, weight_bytes: int) -> None:
    """Raises: ResourceError if the disk of `output` has too little space for the weights."""
    wanted, free = weight_bytes + SPARE_BYTES, free_bytes(output.parent)
    if wanted > free:
        what = f"{output} needs {bytes_text(wanted)}, but {bytes_text(free)} of its disk are free"
        raise ResourceError(what, "choose another disk")


def collect_changes(attached: AttachedAdapter) -> Changes:
    """The changes that the adapter makes to layers and parameters.

    Raises: AdapterError for a method that changes inputs or outputs instead of weights.
    """
    if attached.model_adapter is not None:
        raise AdapterError(
            "a prompt adapter does not change weights and cannot be merged", "use it unmerged, as an adapter"
        )
    parameters: dict[str, ParameterChange] = {name: adapter.merged for name, adapter in attached.parameters.items()}
    for copy in attached.copies.values():
        parameters |= {name: partial(_replaced, tensor.detach()) for name, tensor in copy.state().items()}
    for name, tokens in attached.tokens.items():
        together = (name, *attached.tied_tokens.get(name, ()))  # tied matrices get the same change
        parameters |= {f"{each}.weight": tokens.merged for each in together}
    for name, rows in attached.added_rows.items():
        parameters[f"{name}.weight"] = partial(_enlarged, rows, parameters.get(f"{name}.weight"))
    modules = base_modules(attached.net)
    sizes = [len(modules[name].get_parameter("weight")) for name in attached.added_rows]
    layers = {name: layer.merged for name, layer in attached.layers.items()}
    return Changes(layers, parameters, vocabulary_size=max(sizes, default=None))


def _enlarged(rows: torch.Tensor, then: ParameterChange | None, old: torch.Tensor) -> torch.Tensor:
    """Appends `rows` to the matrix, and then applies the change `then`, if there is one."""
    larger = torch.cat([old, rows.to(old)])
    return larger if then is None else then(larger)


def _replaced(new: torch.Tensor, _old: torch.Tensor) -> torch.Tensor:
    return new


def write_report(folder: Path, result: MergeResult) -> None:
    """Write the report of a merge into its folder."""
    difference = result.difference
    measured = {
        "largest_logit_difference_in_float32": difference.written,
        "largest_logit_difference_unrounded": difference.unrounded,
        "largest_logit_difference_of_rounding": difference.rounding,
    }
    report: dict[str, object] = {
        "onto": result.onto,
        "reason": result.reason,
        "dtype": result.dtype,
        "computed_in": result.computed_in,
        "largest_logit_difference": difference.largest,
        **{name: value for name, value in measured.items() if value is not None},
        "mean_logit_difference": difference.mean,
        "logit_spread": difference.spread,
        "measured_on": difference.rows,
        "tokens": difference.tokens,
        "loss_running": difference.running_loss,
        "loss_merged": difference.merged_loss,
    }
    if result.note:
        report["note"] = result.note
    write_json(folder / REPORT, report)
