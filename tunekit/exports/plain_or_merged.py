"""The choice between an adapter as low-rank pairs and a merged model, for all formats that write LoRA folders."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tunekit.adapters.folder.config import CONFIG_NAME, FACTS_NAME
from tunekit.arithmetic.merge import merge
from tunekit.arithmetic.merge_output import collect_changes
from tunekit.arithmetic.nearest_lora import NotLowRank
from tunekit.arithmetic.normalise import PlainAdapter, normalise
from tunekit.arithmetic.on_base import attach_to_base
from tunekit.errors import AdapterError, Problem
from tunekit.exports.format import Exported, Options
from tunekit.exports.questions import full_base_text
from tunekit.files.durable import write_json
from tunekit.files.untrusted import sha256_of
from tunekit.model.families import make_family
from tunekit.model.storage.portable import read_model_files
from tunekit.model.storage.programs import FolderReading, readings
from tunekit.model.storage.source import read_json
from tunekit.model.storage.upload import hub_name
from tunekit.recipe.bases.paths import last_name
from tunekit.targets.exportable import Exportable

MERGED = "with --merged, the base has the weights of the training"


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
    if make_family(exportable.family).objectives != "causal" or exportable.gguf_file is not None:
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


def base_repository(exportable: Exportable) -> str:
    """The base's name on the hub; the last part of its path if the base is on this machine only."""
    name = exportable.target.model.name_or_path
    return hub_name(name) or last_name(name)


def name_base(folder: Path, exportable: Exportable) -> None:
    """Replace the path of the base on this machine by the base's name in an adapter folder."""
    config, file = folder / CONFIG_NAME, folder / FACTS_NAME
    write_json(config, read_json(config) | {"base_model_name_or_path": base_repository(exportable)})
    if file.exists():
        facts = read_json(file)
        facts["base"]["path"] = None
        facts["files"][CONFIG_NAME] = {"bytes": config.stat().st_size, "sha256": sha256_of(config)}
        write_json(file, facts)


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


def quantization_note(exportable: Exportable, remedy: str = MERGED) -> tuple[str, ...]:
    """A note if the adapter was trained on quantized weights: the other program uses the full weights, unless the user
    follows `remedy`."""
    kind = exportable.target.model.quantization
    if kind == "none":
        return ()
    what = (
        f"the adapter was trained on {kind} weights, so its results on the full base differ by the quantization error"
    )
    return (f"{what} ({full_base_text(exportable)}); {remedy}",)
