"""The choice between an adapter as low-rank pairs and a merged model, for all formats that write LoRA folders."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tunekit.arithmetic.merge import merge
from tunekit.arithmetic.merge_output import collect_changes
from tunekit.arithmetic.nearest_lora import NotLowRank
from tunekit.arithmetic.normalise import PlainAdapter, normalise
from tunekit.arithmetic.on_base import attach_to_base
from tunekit.errors import AdapterError, Problem
from tunekit.exports.format import Exported, Options
from tunekit.model.families import make_family
from tunekit.model.storage.portable import read_model_files
from tunekit.model.storage.programs import FolderReading, readings
from tunekit.targets.exportable import Exportable


def composite_problems(exportable: Exportable, program: str) -> list[Problem]:
    """The reason why a model that also reads images or audio is not converted for this program. A merged folder has the
    names of its base's files, which the program's own converter reads."""
    if make_family(exportable.family).trained_as is None:
        return []
    what = f"{exportable.architecture} also reads images or audio, and tunekit does not convert such a model"
    return [Problem(what, f"write a merged folder with tunekit merge, and convert it with {program}", key="--to")]


def unwritable(exportable: Exportable, program: str) -> list[Problem]:
    """Reasons why the adapter can be neither written nor merged: the adapter is a prompt, which does not change
    weights, or the program does not know the model, or computes it wrongly."""
    reading = _reading(exportable, program)
    if reading.unsupported:
        return [Problem(f"{program} {reading.version} {reading.unsupported}", "choose another --to", key="--to")]
    wrong = [finding.what for finding in reading.findings if not (finding.mendable or finding.limit)]
    if wrong:
        what = f"{program} {reading.version} cannot compute this model: {'; '.join(wrong)}"
        return [Problem(what, "export it for another program, such as --to vllm", key="--to")]
    try:
        normalise(exportable.target)
    except NotLowRank:
        return []
    except AdapterError as error:
        return list(error.problems)
    return []


def _reading(exportable: Exportable, program: str) -> FolderReading:
    """How a program reads the base: the features that it does not support, or computes differently."""
    every = readings(replace(read_model_files(exportable.folder), config=exportable.config))
    return next(reading for reading in every if reading.program == program)


def limit_notes(exportable: Exportable, program: str) -> tuple[str, ...]:
    """Notes on the text length up to which the program computes the base as torch does."""
    return tuple(finding.what for finding in _reading(exportable, program).findings if finding.limit)


def plain_or_reason(
    exportable: Exportable, options: Options, program: str, refusal: Callable[[PlainAdapter], str]
) -> tuple[PlainAdapter | None, str]:
    """The adapter as low-rank pairs and an empty text; or None, and the reason for a merged model.

    `refusal`: returns the reason why the program cannot hold these pairs, or an empty text.
    """
    if options.merged:
        return None, "asked for with --merged"
    if make_family(exportable.family).trained_as is not None:
        return None, f"the base is a model with image or audio parts, for which {program}'s adapters were not compared"
    if exportable.family != "causal" or exportable.gguf_file is not None:
        return None, "the base is not a text model in a folder of safetensors files"
    for finding in _reading(exportable, program).findings:
        if not finding.limit:  # the merged model is written in the portable form
            return None, f"with this base {program} {finding.what}"
    try:
        plain = normalise(exportable.target)
    except NotLowRank as error:
        return None, error.problems[0].what
    reason = _left_out(plain) or refusal(plain)
    return (None, reason) if reason else (plain, "")


def _left_out(plain: PlainAdapter) -> str:
    """The reason why low-rank pairs cannot hold the adapter: it trains other tensors too, or has no pairs. Otherwise an
    empty text."""
    if plain.rest:
        key = next(iter(plain.rest)).removeprefix("base_model.model.")
        return f"besides low-rank updates, the adapter trains {key} ({len(plain.rest)} such tensors)"
    return "" if plain.pairs else "the adapter has no low-rank updates"


def merging_unties(exportable: Exportable) -> bool:
    """Whether embedding and head share one matrix in the base, but not in the merged model."""
    attached, rewriter = attach_to_base(exportable.adapter, exportable.target.model)
    return rewriter.unties(collect_changes(attached))


def write_merged(exportable: Exportable, path: Path, reason: str, command: str) -> Exported:
    """Write the merged model. `command`: the command that runs it, with PATH in place of the folder."""
    merge(exportable.target, path)
    return Exported(
        path, "merged", (f"merged into the base: {reason}", f"run it with: {command.replace('PATH', str(path))}")
    )


def quantization_note(exportable: Exportable) -> tuple[str, ...]:
    """A warning if the adapter was trained on quantized weights: the other program uses the full weights."""
    kind = exportable.target.model.quantization
    if kind == "none":
        return ()
    what = f"the adapter was trained on {kind} weights, so on the full base its results differ by rounding errors"
    return (f"{what}; with --merged, the base has the weights of the training",)
