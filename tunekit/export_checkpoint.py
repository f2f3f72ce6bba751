"""`tunekit adapter export-checkpoint`: a checkpoint goes in; the adapter folder that the run would have exported after
its step comes out.
"""

from __future__ import annotations

from pathlib import Path

from tunekit.arithmetic.write import check_new_folder
from tunekit.artifacts.checkpoint import find_checkpoint
from tunekit.console import Console
from tunekit.errors import InputError
from tunekit.records import bytes_text
from tunekit.targets.export import export_checkpoint
from tunekit.targets.target import named_base


def export_checkpoint_verb(checkpoint: str, base: str | None, output: str) -> None:
    """Write the adapter. Raises: InputError where there is no such checkpoint, or its base is not there."""
    found = find_checkpoint(checkpoint)
    if found is None:
        how = "write RUN@120, RUN@best or RUN@last, or the path of a folder in RUN/checkpoints"
        raise InputError(f"{checkpoint} names no checkpoint", how)
    place = check_new_folder(Path(output), [found])
    place.parent.mkdir(parents=True, exist_ok=True)
    size_bytes = export_checkpoint(found, place, named_base(base))
    Console().info(f"the adapter of {found.name} ({bytes_text(size_bytes)}) is written to {place}")
