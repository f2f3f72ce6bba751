"""Agreement between the ranks of a run before the first step: the settings that all ranks use; and checks that all
ranks have the same recipe, options, data and base. Each difference is named, with its rank and its machine.

In a step, ranks may have different numbers of micro-batches, or none: losses and gradients are divided by the units of
all ranks, and then summed over ranks (`Run.begin_step` and `finish_step` in run.py)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tunekit.artifacts.fingerprint import MISSING, compare_fingerprints, flat_values, is_moved_file
from tunekit.data.reading.folder import media_folder
from tunekit.data.reading.several import files_of
from tunekit.errors import InputError, Problem
from tunekit.files.lock import LOCK_NAME
from tunekit.files.untrusted import RUN_RECORD, sha256_of
from tunekit.memory.sharding import TIER
from tunekit.recipe.reading.draft import dotted
from tunekit.recipe.reading.paths import NamedPath, named_paths
from tunekit.records import ExecutionSettings, JsonObject
from tunekit.training.session import Session

CLOCK_SECONDS = 30.0  # clocks that differ by more are named
SAME_COMMAND = "start all ranks with the same recipe and the same options"
CURES = {"model.dtype": "write a dtype that all of them compute, such as float32"}
SAME_FILES = "give all machines the same files, or put them on a shared disk"


def shared_execution(executions: Sequence[ExecutionSettings]) -> ExecutionSettings:
    """The choice whose `common` settings all ranks use: the micro-batches that the rank with the least memory can hold,
    and special kernels only if all ranks have them, because they round differently. It samples as
    few completions together as the rank that can hold the fewest."""
    least = min(executions, key=lambda execution: execution.micro_batch_size or 0)
    same = len({execution.kernels for execution in executions}) == 1
    sampled = min(execution.sampling_batch_size for execution in executions)
    kernels = least.kernels if same else "none"
    return replace(least, kernels=kernels, sampling_batch_size=sampled)


def shard_on_all_ranks(executions: Sequence[ExecutionSettings]) -> bool:
    """Whether all ranks shard the base, because some rank must shard it."""
    return any(execution.streaming == TIER for execution in executions)


def check_command(session: Session, options: Mapping[str, object]) -> None:
    """Compare the recipes and options of all ranks. Clocks that differ cause a warning.

    Raises: InputError, on all ranks, with each difference.
    """
    devices = session.devices
    if devices.world == 1:
        return
    values = dict(flat_values(session.loaded.recipe.model_dump(mode="json"), free=("output.dir",)))
    of_ranks = devices.gather([{**values, **options, "--accept-changed": list(session.accepted)}])
    problems = []
    for rank, theirs in enumerate(of_ranks):
        for key in dict.fromkeys([*of_ranks[0], *theirs]):
            ours, other = of_ranks[0].get(key, MISSING), theirs.get(key, MISSING)
            if ours != other and not is_moved_file(key, ours, other, of_ranks[0]):
                what = f"{other!r} on {devices.name(rank)}, but {ours!r} on {devices.name(0)}"
                problems.append(Problem(what, SAME_COMMAND, key=key))
    if problems:
        raise InputError.of(problems)
    times = devices.gather([time.time()])
    for rank, there in enumerate(times):
        if abs(there - times[0]) > CLOCK_SECONDS:
            what = (
                f"the clock of {devices.name(rank)} differs by {there - times[0]:+,.0f} seconds from {devices.name(0)}"
            )
            session.console.warn(f"{what}; synchronise the clocks, so that the times in logs can be compared")


def check_fingerprints(session: Session, fingerprint: JsonObject) -> None:
    """Compare data, base and code of all ranks. Different numbers of threads cause a warning.

    Raises: InputError, on all ranks, with each difference.
    """
    devices = session.devices
    if devices.world == 1:
        return
    of_ranks = devices.gather([fingerprint])
    pairs = [
        (rank, key, text)
        for rank, theirs in enumerate(of_ranks)
        for key, text in compare_fingerprints(of_ranks[0], theirs)
    ]
    if pairs:
        named = list(_different_files(session))
        general = [
            Problem(f"{text} on {devices.name(rank)} and {devices.name(0)}", CURES.get(key, SAME_FILES), key=key)
            for rank, key, text in pairs
        ]
        raise InputError.of(named or general)
    for rank, theirs in enumerate(of_ranks):
        if theirs["threads"] != of_ranks[0]["threads"]:
            what = (
                f"{devices.name(rank)} has {theirs['threads']} threads, but {devices.name(0)} {of_ranks[0]['threads']}"
            )
            session.console.warn(f"{what}: the last digits of results depend on it; set training.threads")


def _different_files(session: Session) -> Iterator[Problem]:
    """The files named by the recipe whose content differs from that of the main rank."""
    devices = session.devices
    digests = {
        f"{dotted(path.key)} {name}".strip(): (str(file), sha256_of(file, RUN_RECORD))
        for path in named_paths(session.loaded.recipe.model_dump(mode="json"))
        for name, file in _files_by_name(path).items()
    }
    of_ranks = devices.gather([digests])
    for rank, theirs in enumerate(of_ranks):
        for place in dict.fromkeys([*of_ranks[0], *theirs]):
            key, _, name = place.partition(" ")
            ours, other = of_ranks[0].get(place), theirs.get(place)
            if ours is not None and other is not None and ours[1] != other[1]:
                what = f"the file of {devices.name(rank)} differs from that of {devices.name(0)}"
                yield Problem(what, SAME_FILES, file=other[0], key=key)
            elif name and (ours is None or other is None):  # one of several files
                present, absent = (0, rank) if other is None else (rank, 0)
                what = f"{devices.name(present)} has this file, but not {devices.name(absent)}"
                yield Problem(what, SAME_FILES, file=(other or ours or ("",))[0], key=key)


def _files_by_name(path: NamedPath) -> dict[str, Path]:
    """The file that a path names, under the name ""; for a source of several files, each under its name."""
    if path.file.is_file():
        return {"": path.file}
    several = files_of(path.text) if path.mark.expected == "rows" else ()
    return {str(file.relative_to(media_folder(path.text))): file for file in several}


def check_folder_is_shared(session: Session, path: Path) -> None:
    """Warn about ranks that do not see the run folder of the main rank: only the main rank writes into it, but another
    machine cannot resume the run."""
    devices = session.devices
    if devices.world == 1:
        return
    text = devices.from_main(_lock_text(path))
    seen = devices.gather([_lock_text(path) == text])
    blind = [devices.name(rank) for rank, sees in enumerate(seen) if not sees]
    if blind:
        what = f"output.dir: {path} of {devices.name(0)} is not visible on {', '.join(blind)}"
        session.console.warn(f"{what}; put it on a shared disk, so that any machine can resume the run")


def _lock_text(path: Path) -> str:
    try:
        return (path / LOCK_NAME).read_text(encoding="utf-8")
    except OSError:
        return ""
