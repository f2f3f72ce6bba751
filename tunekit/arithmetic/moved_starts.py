"""LoRA folders of PEFT whose initialisation moved a part of the base into the adapter, as plain LoRA of twice the rank.

The base was W - s B0 A0 when training began. The trained adapter adds s (B A - B0 A0) to W, which is the low-rank
update [B, -B0] [A; A0]; PEFT's path_initial_model_for_weight_conversion writes the same.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.config import CONFIG_NAME, read_fields
from tunekit.adapters.starts.start import StartLayer, make_factors
from tunekit.arithmetic.lora_folder import LoraFolder, plain_lora_method, read_lora_folder
from tunekit.arithmetic.low_rank import LowRank
from tunekit.errors import AdapterError
from tunekit.model.storage.rewrite import Rewriter
from tunekit.recipe.bases.section import StartSettings
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.targets.target import base_section

START = "init_lora_weights"  # PEFT's field
HOW = "give --initial DIR, the adapter as it was saved before training"


def _starts() -> dict[str, StartSettings]:
    """Our settings of every initialisation, by name; PEFT's names begin so."""
    known = [settings_class("starts", name)(method=name) for name in known_names("starts")]
    return {start.method: start for start in known if isinstance(start, StartSettings)}


def start_of(folder: Path) -> str | None:
    """The folder's start, in small letters, where it moved weights of the base; else None.

    Raises: AdapterError for LoftQ, which rather replaced them.
    """
    fields = read_fields(folder)
    start = fields.get(START)
    if fields.get("peft_type") != plain_lora_method().peft.peft_type or not isinstance(start, str):
        return None
    start, known = start.lower(), _starts()
    if start in known and known[start].looks_at == "original":
        what = "LoftQ starts from a quantized base: the adapter is an update of that one, and of no other"
        how = "load the base with that quantization, and write true for the field"
        raise AdapterError(what, how, file=str(folder / CONFIG_NAME), key=START)
    return start if start.startswith(tuple(name for name in known if known[name].moves_weights)) else None


def subtract_initial(trained: LoraFolder, initial: LoraFolder) -> dict[str, LowRank]:
    """s (B A - B0 A0) of each layer.

    Raises: AdapterError where the two are not of one adapter, or `initial` starts from nothing.
    """
    here, there = trained.updates, initial.updates
    for name in sorted(here.keys() | there.keys()):
        left, right = here.get(name), there.get(name)
        facts = [update and (update.shape, update.rank, update.scaling) for update in (left, right)]
        if None in facts or facts[0] != facts[1]:
            what = f"'{name}' is missing, or has another shape, rank or scaling, in one of it and {trained.name}"
            raise AdapterError(what, HOW, file=initial.name)
    if not any(bool(update.b.any()) for update in there.values()):
        raise AdapterError("is no such start: every B is zero", HOW, file=initial.name)
    return {name: difference(update, there[name]) for name, update in here.items()}


def difference(trained: LowRank, initial: LowRank) -> LowRank:
    """s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    a, b = torch.cat([trained.a, initial.a]), torch.cat([trained.b, -initial.b], dim=1)
    return LowRank(a, b, trained.scaling, trained.embedding)


def subtract_start(trained: LoraFolder, start: StartSettings, matrix_of: Callable[[str], Tensor]) -> dict[str, LowRank]:
    """The same with the start computed again from the base's matrices (O, I), float32; embeddings start plainly."""
    if trained.fan_in_fan_out and start.depends_on_layout:
        raise AdapterError("OLoRA of Conv1D layers cannot be computed again", HOW, file=trained.config.file, key=START)
    updates = {}
    for name, update in trained.updates.items():
        if update.embedding:
            updates[name] = update
            continue
        matrix = matrix_of(name)
        if tuple(matrix.shape) != update.shape:
            what = f"'{name}' is {list(update.shape)} there and {list(matrix.shape)} in the base"
            raise AdapterError(what, "name the right base with --base", file=trained.config.file)
        (outputs, inputs), generator = update.shape, torch.Generator()
        given = StartLayer(name, inputs, outputs, update.rank, update.scaling, generator, matrix.float, None)
        a, b = make_factors(start, given)
        updates[name] = difference(update, LowRank(a, b, update.scaling))
    return updates


def untouched_updates(
    lora: LoraFolder, start: str | None, initial: Path | None, base: Mapping[str, str]
) -> tuple[dict[str, LowRank], str | None]:
    """The updates of the base as it is before any start, and where the start is taken from. `base`: as --base names it.

    Raises: AdapterError where the start can neither be read nor computed.
    """
    if initial is not None:
        note = f"what the start moved into the adapter is taken from {initial}"
        return subtract_initial(lora, read_lora_folder(initial, {START: True})), note  # as if it had started plainly
    if start is None:
        return lora.updates, None
    settings = _starts().get(start)
    if settings is None or settings.looks_at:  # not computed from the base's weights alone
        what = f"the start {start} moved weights of the base into the adapter, and cannot be computed again"
        raise AdapterError(what, HOW, file=lora.config.file, key=START)
    how = f"{HOW}, or --base MODEL, from which {start} can be computed again"
    section = base_section(lora.config, base, how)
    if section.quantization != "none":
        what = f"the start {start} on a {section.quantization} base cannot be computed again"
        raise AdapterError(what, HOW, file=lora.config.file, key=START)
    rewriter = Rewriter(section, "full")
    if lora.config.base_fingerprint and lora.config.base_fingerprint != rewriter.fingerprint():
        raise AdapterError("was trained on another base", "name the right one with --base", file=lora.config.file)
    absent = [name for name in lora.updates if name not in rewriter.modules]
    if absent:
        what = f"adapts '{absent[0]}', which {section.name_or_path} does not have"
        raise AdapterError(what, "name the right base with --base", file=lora.config.file)
    right = "right where training began from exactly these weights, not quantized"
    note = f"the start {start} is computed again from {section.name_or_path}: {right}"
    return subtract_start(lora, settings, lambda name: rewriter.trained_on(name)[0]), note
