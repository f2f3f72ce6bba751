"""The manifest of a checkpoint: sizes and sha256 of its files, so that later damage is noticed. It is written last, so
if it exists, the other files are complete."""

import json
from pathlib import Path
from typing import TypedDict, cast

from tunekit.errors import RunFolderError
from tunekit.files import durable
from tunekit.files.untrusted import RUN_FILE, sha256_of

FORMAT = "tunekit-checkpoint"
FORMAT_VERSION = 1
MANIFEST, TENSORS, STATE = "manifest.json", "tensors.safetensors", "state.json"
OUR_NAMES = {MANIFEST, TENSORS, STATE}


class Manifest(TypedDict):
    """The content of manifest.json. `files`: file name -> its bytes and sha256."""

    step: int
    files: dict[str, dict[str, object]]


class DamagedError(Exception):
    """A checkpoint folder is damaged. load_newest then tries an older checkpoint."""


def checkpoint_name(step: int) -> str:
    """The folder name of a checkpoint, such as step-000100."""
    return f"step-{step:06d}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises: DamagedError if it is missing or invalid; RunFolderError if a newer tunekit wrote it.
    """
    if not durable.is_real_folder(folder):
        raise DamagedError("is not a folder, or is a symbolic link (links are not followed)")
    path = folder / MANIFEST
    if not durable.is_real_file(path):
        raise DamagedError(f"{MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} is not a tunekit manifest")
    version, step = manifest.get("version"), manifest.get("step")
    if isinstance(version, int) and version > FORMAT_VERSION:
        formats = f"its checkpoint format is {version}, but this version reads {FORMAT_VERSION}"
        what = f"{folder} was written by a newer tunekit ({formats})"
        raise RunFolderError(what, "resume with the version that wrote it")
    files = manifest.get("files", {})
    complete = isinstance(files, dict) and set(files) == {TENSORS, STATE}
    if version != FORMAT_VERSION or not complete or not all(isinstance(facts, dict) for facts in files.values()):
        raise DamagedError(f"{MANIFEST} is incomplete")
    if not isinstance(step, int) or checkpoint_name(step) != folder.name:
        raise DamagedError(f"{MANIFEST} belongs to step {step}")
    return cast(Manifest, manifest)


def is_ours(folder: Path) -> bool:
    """Whether tunekit wrote this checkpoint folder: it has a valid manifest, and no other files than a checkpoint
    has."""
    try:
        read_manifest(folder)
        return {entry.name for entry in folder.iterdir()} <= OUR_NAMES
    except (DamagedError, RunFolderError, OSError):
        return False


def has_sizes(folder: Path) -> bool:
    """Whether every file exists and has the size that the manifest states. This is quick, because no sha256 is
    computed."""
    files = read_manifest(folder)["files"]
    return all(
        durable.is_real_file(folder / name) and (folder / name).stat().st_size == expected.get("bytes")
        for name, expected in files.items()
    )


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size, then its sha256, with the manifest.

    Raises: DamagedError naming the file.
    """
    for name, expected in sorted(manifest["files"].items()):
        path = folder / name
        if not durable.is_real_file(path):
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != expected.get("bytes"):
            raise DamagedError(f"{name} has {path.stat().st_size} bytes, but its manifest says {expected.get('bytes')}")
        if sha256_of(path, RUN_FILE) != expected.get("sha256"):
            raise DamagedError(f"{name} differs from its sha256 in the manifest")
