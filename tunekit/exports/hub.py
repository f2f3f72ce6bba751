"""A folder for a repository of the hub: the weights, a model card made from the run, and nothing private."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tunekit.adapters.folder.config import CONFIG_NAME
from tunekit.adapters.folder.write import OUR_FILES
from tunekit.arithmetic.merge import merge
from tunekit.errors import InputError, Problem, holds_secret, redact
from tunekit.exports.card import evaluation_results, model_card
from tunekit.exports.format import Evidence, Exported, Options
from tunekit.exports.plain_or_merged import name_base
from tunekit.files.durable import write_json
from tunekit.model.storage.model_folder import WEIGHTS, write_portable_copy
from tunekit.model.storage.source import read_json
from tunekit.model.storage.upload import hub_name
from tunekit.records import bytes_text
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS = frozenset({"merged", "push"})
SUFFIX = ""
PROGRAM = ""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")  # may hold any text
TRAINING_STATE = (
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth", "random_states_*.pkl"),
    *("checkpoint-[0-9]*", "global_step[0-9]*", "events.out.tfevents*"),
)
_HOME = re.compile(r"(/(home|Users|root)/|[A-Za-z]:\\+Users\\+)[^\s\"']*")


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """Reasons not to export: a model is a single file or contains a training state, or the base of a pushed adapter
    is not on the hub."""
    name, folder = exportable.target.model.name_or_path, exportable.folder
    if exportable.kind == "model":
        if name.endswith(".gguf"):
            return [Problem(f"{name} is one file and not a model folder", "upload the file itself", key="--to")]
        states = [path.relative_to(folder) for pattern in TRAINING_STATE for path in sorted(folder.rglob(pattern))]
        how = "move this elsewhere, or merge or copy the model into a new folder"
        return [Problem(f"{folder} contains {state}, which is the state of a training", how) for state in states]
    if options.push and not options.merged and hub_name(name) is None:
        what = f"the base {name} is on this machine only: others cannot load the adapter"
        how = f"add --merged, or leave --push out and name the base in README.md and {CONFIG_NAME}"
        return [Problem(what, how, key="--push")]
    return []


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the folder. Raises: InputError if one of its files has a private path or a secret."""
    what = exportable.kind
    if exportable.kind == "model":
        write_portable_copy(exportable.folder, path)
    elif options.merged:
        what = "merged"
        merge(exportable.target, path)
    else:
        _copy_adapter(exportable, path)
    if what != "adapter":
        config = path / "config.json"
        write_json(config, {name: value for name, value in read_json(config).items() if name != "_name_or_path"})
    if not (path / "README.md").exists() or evidence.run is not None:
        (path / "README.md").write_text(model_card(exportable, evidence.run, what, evidence.name), "utf-8")
    if (results := evaluation_results(evidence.run)) is not None:
        (path / ".eval_results").mkdir()
        (path / ".eval_results" / "tunekit.yaml").write_text(results, "utf-8")
    source = exportable.adapter if exportable.kind == "adapter" else exportable.folder
    private = [place for place in (exportable.target.run, exportable.folder) if place is not None]
    if leaks := list(_leaks(path, private, source)):
        raise InputError.of(leaks)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = [f"  {file.relative_to(path)} ({bytes_text(file.stat().st_size)})" for file in files]
    verb = "to be uploaded" if options.push else "uploaded with --push"
    notes = [f"{len(files)} files are {verb}, into the repository {evidence.name} (private if it is new):", *listed]
    if what == "adapter" and hub_name(exportable.target.model.name_or_path) is None:
        notes.append(f"the base is on this machine only: write its hub name into README.md and {CONFIG_NAME}")
    return Exported(path, what, tuple(notes))


def _copy_adapter(exportable: Exportable, path: Path) -> None:
    """Copy the adapter's files. The path of the base on this machine is replaced by the base's name."""
    path.mkdir()
    for name in sorted(OUR_FILES & set(os.listdir(exportable.adapter))):
        shutil.copyfile(exportable.adapter / name, path / name)
    name_base(path, exportable)


def _leaks(folder: Path, private: list[Path], source: Path) -> Iterator[Problem]:
    """A problem for each line with a secret or a path of this machine, in all files except weights. It names the file
    of `source` that was copied, because the exported folder is removed."""
    places = [place for place in (Path.home(), Path.cwd(), *private) if len(place.parts) > 1]
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name.endswith(WEIGHTS):
            continue
        is_vocabulary = file.name in VOCABULARIES
        searched = [re.escape(str(place)) for place in places if not is_vocabulary or len(place.parts) > 2]
        any_place = re.compile(rf"({'|'.join(searched)})(?![\w.-])") if searched else None
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
            match = (any_place and any_place.search(line)) or (None if is_vocabulary else _HOME.search(line))
            leak = match[0] if match else "a secret" if holds_secret(line) else None
            if leak is not None:
                what, name = f"contains {redact(leak)}, which is private", file.relative_to(folder)
                where = source / name if (source / name).is_file() else name
                yield Problem(what, "remove this text from the file, and export again", file=str(where), line=number)
