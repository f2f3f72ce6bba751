"""Checks of a data file before its rows are read: it is a regular file, and its content is of the kind that its name
says.

Pipes and devices, which could block, are never opened.
"""

import errno
import gzip
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from tunekit.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
PEEK_BYTES = 4096
CHUNK_BYTES = 2**20
_GZIP = b"\x1f\x8b"
_BINARY = (
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"PK\x03\x04", "a ZIP archive", ""),
    (b"\x28\xb5\x2f\xfd", "zstd", ""),
)
_OTHER_UNICODE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
COPY = "copy or download the file again"
_KNOWN = "known endings: .jsonl, .json, .csv, .tsv, .txt (each also .gz), .parquet"


@dataclass(frozen=True)
class DataFile:
    """A checked data file. `kind`: the kind that the file's name states and its first bytes confirm."""

    path: Path
    kind: str
    compressed: bool
    size_bytes: int


def inspect_file(path: Path) -> DataFile:
    """The checked data file at a path. Raises: DataError if it is not a regular file, if it is empty, or if its
    content does not match its name."""
    size = _regular_size(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if compressed else suffixes)[-1:]
    kind = KINDS.get(suffix[0]) if suffix else None
    if kind is None or (compressed and kind == "parquet"):
        raise DataError(f"the ending of '{path.name}' does not show the kind of file", _KNOWN, file=str(path))
    if size == 0:
        raise DataError("the file is empty", "add rows to it, or name another file", file=str(path))
    found = DataFile(path, kind, compressed, size)
    _check_content(found)
    return found


def _regular_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(_why_unreachable(path, error), "check data.train and data.eval", file=str(path)) from None
    kinds = (
        (stat.S_ISDIR, "a folder", "name a file in this folder"),
        (stat.S_ISFIFO, "a pipe", "write its content to a file first"),
        (stat.S_ISCHR, "a device", "name a file"),
        (stat.S_ISBLK, "a device", "name a file"),
        (stat.S_ISSOCK, "a socket", "name a file"),
    )
    for test, what, how in kinds:
        if test(status.st_mode):
            raise DataError(f"this is {what}, not a file", how, file=str(path))
    return status.st_size


def _why_unreachable(path: Path, error: OSError | ValueError) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOENT and path.is_symlink():
        return f"this link points to a file that does not exist ({os.readlink(path)})"
    reasons = {
        errno.ENOENT: "no such file",
        errno.ELOOP: "this link points to itself",
        errno.EACCES: "no permission to read the file",
        errno.ENOTDIR: "no such file (a part of the path is not a folder)",
    }
    return reasons.get(number or 0, f"cannot be read: {getattr(error, 'strerror', None) or error}")


def open_bytes(file: DataFile) -> IO[bytes]:
    """An open stream of the file's decompressed content."""
    try:
        stream = gzip.open(file.path, "rb") if file.compressed else file.path.open("rb")  # noqa: SIM115 (returned)
    except OSError as error:
        how = "check the path and its permissions"
        raise DataError(_why_unreachable(file.path, error), how, file=str(file.path)) from None
    return cast("IO[bytes]", stream)


def _check_content(file: DataFile) -> None:
    """Raises: DataError if the first bytes contradict the kind that the name says."""
    name = str(file.path)
    with open_bytes(DataFile(file.path, file.kind, False, file.size_bytes)) as stream:
        start = stream.read(PEEK_BYTES)
    if file.compressed != start.startswith(_GZIP):
        what = "the name ends in .gz, but the content is not compressed"
        what = what if file.compressed else "the content is gzip-compressed, but the name does not end in .gz"
        raise DataError(what, "rename the file", file=name)
    if file.compressed:
        try:
            with open_bytes(file) as stream:
                start = stream.read(PEEK_BYTES)
        except (OSError, EOFError) as error:
            raise DataError(f"the compressed file is damaged: {error}", COPY, file=name) from None
    for magic, what, ending in _BINARY:
        if start.startswith(magic) and KINDS.get(ending) != file.kind:
            raise DataError(f"the content is {what}", f"rename it to {ending}" if ending else _KNOWN, file=name)
    if file.kind == "parquet":
        if not start.startswith(b"PAR1"):
            raise DataError("the name ends in .parquet, but the content is not Parquet", "rename the file", file=name)
    elif start.startswith(_OTHER_UNICODE):
        raise DataError("the file is UTF-16 or UTF-32", "save it as UTF-8", file=name, line=1)
    elif file.kind == "jsonl" and start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        raise DataError("the content is a JSON array, not JSON Lines", "rename it to .json", file=name, line=1)


def content_hash(path: Path) -> str:
    """sha256 of the file's bytes. Raises: OSError if it is not a regular file: a device could be endless."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
