"""A folder for a repository of the hub: the weights, a model card made from the run, and nothing private."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tunekit.adapters.folder.config import CONFIG_NAME, FACTS_NAME
from tunekit.adapters.folder.write import OUR_FILES
from tunekit.arithmetic.merge import merge
from tunekit.errors import InputError, Problem, holds_secret, redact
from tunekit.exports.card import evaluation_results, model_card
from tunekit.exports.format import Certificate, Evidence, Exported, Options, Questions
from tunekit.files.durable import write_json
from tunekit.files.untrusted import parse_json, read_small, sha256_of
from tunekit.model.storage.upload import hub_name
from tunekit.recipe.bases.paths import last_name
from tunekit.records import bytes_text
from tunekit.targets.exportable import Exportable

TAKES = frozenset({"adapter", "model"})
OPTIONS = frozenset({"merged", "push"})
SUFFIX = ""
PROGRAM = ""
TEXTS = {".json", ".md", ".yaml", ".txt", ".jinja", ".py"}
WITH_ANY_TEXT = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"}  # a vocabulary may hold such a path
_HOME = re.compile(r"(/(home|Users|root)/|[A-Za-z]:\\+Users\\+)[^\s\"']*")


def problems(exportable: Exportable, options: Options) -> list[Problem]:
    """A pushed adapter must name a base that others can download."""
    pushed_adapter = options.push and not options.merged and exportable.kind == "adapter"
    if pushed_adapter and hub_name(exportable.target.model) is None:
        what = (
            f"the base {exportable.target.model.name_or_path} is on this machine only: others cannot load the adapter"
        )
        how = f"add --merged, or leave --push out and name the base in README.md and {CONFIG_NAME}"
        return [Problem(what, how, key="--push")]
    return []


def write(exportable: Exportable, path: Path, evidence: Evidence, options: Options) -> Exported:
    """Write the folder. Raises: InputError if one of its files has a private path or a secret."""
    what = exportable.kind
    if exportable.kind == "model":
        shutil.copytree(exportable.folder, path)
    elif options.merged:
        what = "merged"
        merge(exportable.target, path)
    else:
        _copy_adapter(exportable, path)
    (path / "README.md").write_text(model_card(exportable, evidence.run, what, evidence.name), "utf-8")
    if (results := evaluation_results(evidence.run)) is not None:
        (path / ".eval_results").mkdir()
        (path / ".eval_results" / "tunekit.yaml").write_text(results, "utf-8")
    private = [place for place in (exportable.target.run, exportable.folder) if place is not None]
    if leaks := list(_leaks(path, private)):
        raise InputError.of(leaks)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = [f"  {file.relative_to(path)} ({bytes_text(file.stat().st_size)})" for file in files]
    verb = "uploaded" if options.push else "uploaded with --push"
    notes = [f"{len(files)} files are {verb}, into a private repository {evidence.name}:", *listed]
    if what == "adapter" and hub_name(exportable.target.model) is None:
        notes.append(f"the base is on this machine only: write its hub name into README.md and {CONFIG_NAME}")
    return Exported(path, what, tuple(notes))


def certify(
    written: Exported, exportable: Exportable, questions: Callable[[], Questions], options: Options
) -> Certificate | None:
    """No program is asked."""
    return None


def _copy_adapter(exportable: Exportable, path: Path) -> None:
    """The adapter's files. Paths of this machine are replaced by the name of the base."""
    path.mkdir()
    for name in sorted(OUR_FILES & set(os.listdir(exportable.adapter))):
        shutil.copyfile(exportable.adapter / name, path / name)
    model = exportable.target.model
    config = parse_json(read_small(path / CONFIG_NAME), str(path / CONFIG_NAME))
    write_json(
        path / CONFIG_NAME, config | {"base_model_name_or_path": hub_name(model) or last_name(model.name_or_path)}
    )
    if (path / FACTS_NAME).exists():
        facts = parse_json(read_small(path / FACTS_NAME), str(path / FACTS_NAME))
        facts["base"]["path"] = None
        size = (path / CONFIG_NAME).stat().st_size
        facts["files"][CONFIG_NAME] = {"bytes": size, "sha256": sha256_of(path / CONFIG_NAME)}
        write_json(path / FACTS_NAME, facts)


def _leaks(folder: Path, private: list[Path]) -> Iterator[Problem]:
    """The lines of text files with a secret, or with a path of this machine."""
    places = {str(place) for place in (Path.home(), Path.cwd(), *private) if len(place.parts) > 1}
    for file in sorted(folder.rglob("*")):
        if file.suffix not in TEXTS or not file.is_file():
            continue
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1):
            leak = next((place for place in places if place in line), None)
            if leak is None and file.name not in WITH_ANY_TEXT:
                leak = match[0] if (match := _HOME.search(line)) else None
            if leak is None and holds_secret(line):
                leak = "a secret"
            if leak is not None:
                what, where = f"holds {redact(leak)}, which is private", str(file.relative_to(folder))
                yield Problem(what, "remove it from its source", file=where, line=number)
