"""LoRA folders of PEFT whose start moved a part of the base into the adapter, as plain LoRA of twice the rank.

Comes in: such a folder; its adapter as it was before training, or the base.  Goes out: updates of the untouched base.
Next: loose_writing.py.

The base was W - s B0 A0 when training began. What the trained adapter adds to W is s (B A - B0 A0), which is the
low-rank update [B, -B0] [A; A0]; PEFT's path_initial_model_for_weight_conversion writes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.folder.config import CONFIG_NAME
from tunekit.arithmetic.loose_lora import LooseLora, read_loose_lora
from tunekit.arithmetic.low_rank import LowRank
from tunekit.errors import AdapterError
from tunekit.files.untrusted import parse_json, read_small, shown

START = "init_lora_weights"  # PEFT's field
MOVING = ("pissa", "olora", "corda", "lora_ga")  # how the names of such starts begin
FROM_BASE = ("pissa", "olora")  # these follow from the base's weights alone
HOW = "give --initial DIR, the adapter as it was saved before training"


def start_of(folder: Path) -> str | None:
    """The folder's start, in small letters, where it moved weights of the base; else None.

    Raises: AdapterError for LoftQ, which rather replaced them.
    """
    file = folder / CONFIG_NAME
    fields = parse_json(read_small(file), str(file))
    start = fields.get(START)
    if fields.get("peft_type") != "LORA" or not isinstance(start, str):
        return None
    start = start.lower()
    if start == "loftq":
        raise AdapterError(
            "LoftQ starts from a quantized base: the adapter is an update of that one, and of no other",
            "load the base with that quantization, and write true for the field",
            file=str(file),
            key=START,
        )
    return start if start.startswith(MOVING) else None


def read_moved(folder: Path) -> LooseLora:
    """Read the folder as if it had started plainly: its tensors, and not what they mean."""
    return read_loose_lora(folder, {START: True})


def subtract_initial(trained: LooseLora, initial: LooseLora) -> dict[str, LowRank]:
    """s (B A - B0 A0) of each layer.

    Raises: AdapterError where the two are not of one adapter, or `initial` starts from nothing.
    """
    here, there = trained.updates, initial.updates
    for name in sorted(here.keys() | there.keys()):
        left, right = here.get(name), there.get(name)
        if (
            left is None
            or right is None
            or (left.shape, left.rank, left.scaling)
            != (
                right.shape,
                right.rank,
                right.scaling,
            )
        ):
            what = f"'{name}' is missing, or has another shape, rank or scaling, in one of it and {trained.name}"
            raise AdapterError(what, HOW, file=initial.name)
    if not any(bool(update.b.any()) for update in there.values()):
        raise AdapterError("is no such start: every B is zero", HOW, file=initial.name)
    return {name: difference(update, there[name]) for name, update in here.items()}


def difference(trained: LowRank, initial: LowRank) -> LowRank:
    """s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    a, b = torch.cat([trained.a, initial.a]), torch.cat([trained.b, -initial.b], dim=1)
    return LowRank(a, b, trained.scaling, trained.embedding)


def subtract_start(trained: LooseLora, start: str, matrix_of: Callable[[str], Tensor]) -> dict[str, LowRank]:
    """The same with the start computed again from the base's matrices (O, I), float32; embeddings start plainly.

    Raises: AdapterError where the start does not follow from the weights.
    """
    if start not in FROM_BASE:
        raise AdapterError(
            f"the start {shown(start)} cannot be computed again", HOW, file=trained.config.file, key=START
        )
    if trained.fan_in_fan_out and start == "olora":
        raise AdapterError("OLoRA of Conv1D layers cannot be computed again", HOW, file=trained.config.file, key=START)
    make: Any = {"pissa": principal, "olora": orthonormal}[start]
    updates = {}
    for name, update in trained.updates.items():
        if update.embedding:
            updates[name] = update
            continue
        matrix = matrix_of(name)
        if tuple(matrix.shape) != update.shape:
            what = f"'{name}' is {list(update.shape)} there and {list(matrix.shape)} in the base"
            raise AdapterError(what, "name the right base with --base", file=trained.config.file)
        a, b = make(matrix, update.rank, update.scaling)
        updates[name] = difference(update, LowRank(a, b, update.scaling))
    return updates


def principal(matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0, B0 of PiSSA: s B0 A0 is the best approximation of W of that rank (Meng et al. 2024, eq. 2 and 3)."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def orthonormal(matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0, B0 of OLoRA: the first rows of R and columns of Q of W = Q R (Buyukakyuz 2024, algorithm 1)."""
    q, r = torch.linalg.qr(matrix)
    return r[:rank], q[:, :rank]
