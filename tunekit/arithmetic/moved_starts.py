"""Converts PEFT's LoRA folders to plain LoRA if their initialisation (such as PiSSA) moved a part of the base's weights
into the adapter.

The base was W - s B0 A0 at the start of training, so the trained adapter adds s (B A - B0 A0) to W. This is a low-rank
update with the factors [B, -B0] and [A; A0], of twice the rank, as in PEFT's path_initial_model_for_weight_conversion.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.config import CONFIG_NAME, read_fields
from tunekit.adapters.folder.expected import BASE_COPY
from tunekit.adapters.starts.start import StartLayer, make_factors
from tunekit.arithmetic.lora_folder import PREFIX, LoraFolder, plain_lora_method, read_lora_folder
from tunekit.arithmetic.low_rank import LowRank
from tunekit.errors import AdapterError
from tunekit.model.storage.rewrite import Rewriter
from tunekit.recipe.bases.section import StartSettings
from tunekit.recipe.reading.names import known_names, settings_class
from tunekit.targets.target import base_section

START = "init_lora_weights"  # PEFT's field
HOW = "give --initial DIR, the adapter that was saved before training"


def _starts() -> dict[str, StartSettings]:
    """The settings of all initialisations, by tunekit's name. PEFT's names begin with these names."""
    known = [settings_class("starts", name)(method=name) for name in known_names("starts")]
    return {start.method: start for start in known if isinstance(start, StartSettings)}


def start_of(folder: Path) -> str | None:
    """The name of the folder's initialisation in lower case, if this initialisation moved weights of the base into the
    adapter. Otherwise None.

    Raises: AdapterError for LoftQ, which replaced the weights of the base.
    """
    fields = read_fields(folder)
    start = fields.get(START)
    if fields.get("peft_type") != plain_lora_method().peft.peft_type or not isinstance(start, str):
        return None
    start, known = start.lower(), _starts()
    if start in known and known[start].looks_at == "original":
        what = "LoftQ starts from a quantized base, and the adapter is an update of exactly this base"
        how = "load the base with the same quantization, and set this field to true"
        raise AdapterError(what, how, file=str(folder / CONFIG_NAME), key=START)
    return start if start.startswith(tuple(name for name in known if known[name].moves_weights)) else None


def read_started_lora(folder: Path, start: str | None) -> LoraFolder:
    """Reads a LoRA folder whose initialisation is `start`; None: an initialisation that moved no weights.

    PEFT's file contains the matrix W - s B0 A0 of an adapted head. It is left out, because the converted adapter is an
    update of W.
    """
    lora = read_lora_folder(folder, {START: True} if start else None)
    moved = {f"{PREFIX}{name}{BASE_COPY}" for name, update in lora.updates.items() if start and not update.embedding}
    return replace(lora, rest={key: tensor for key, tensor in lora.rest.items() if key not in moved})


def subtract_initial(trained: LoraFolder, initial: LoraFolder) -> dict[str, LowRank]:
    """The update s (B A - B0 A0) of each layer, with B0 and A0 from the folder `initial`.

    Raises: AdapterError if the two folders do not belong to the same adapter, or if all B0 are zero.
    """
    here, there = trained.updates, initial.updates
    for name in sorted(here.keys() | there.keys()):
        left, right = here.get(name), there.get(name)
        facts = [update and (update.shape, update.rank, update.scaling) for update in (left, right)]
        if None in facts or facts[0] != facts[1]:
            what = f"'{name}' is missing in this adapter or in {trained.name}, or its shape, rank or scaling differs"
            raise AdapterError(what, HOW, file=initial.name)
    if not any(bool(update.b.any()) for update in there.values()):
        raise AdapterError("is not the initial state of this adapter, because every B is zero", HOW, file=initial.name)
    return {name: difference(update, there[name]) for name, update in here.items()}


def difference(trained: LowRank, initial: LowRank) -> LowRank:
    """The update s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    a, b = torch.cat([trained.a, initial.a]), torch.cat([trained.b, -initial.b], dim=1)
    return LowRank(a, b, trained.scaling, trained.embedding)


def subtract_start(trained: LoraFolder, start: StartSettings, matrix_of: Callable[[str], Tensor]) -> dict[str, LowRank]:
    """The update s (B A - B0 A0) of each layer, with B0 and A0 computed again from the base.

    `matrix_of`: returns the base's matrix (O, I) of a layer in float32. Updates of embeddings are unchanged, because
    these initialisations treat embeddings like plain LoRA.
    """
    if trained.fan_in_fan_out and start.depends_on_layout:
        raise AdapterError("OLoRA of Conv1D layers cannot be recomputed", HOW, file=trained.config.file, key=START)
    updates = {}
    for name, update in trained.updates.items():
        if update.embedding:
            updates[name] = update
            continue
        matrix = matrix_of(name)
        if tuple(matrix.shape) != update.shape:
            what = f"'{name}' has the shape {list(update.shape)}, but {list(matrix.shape)} in the base"
            raise AdapterError(what, "name the right base with --base", file=trained.config.file)
        (outputs, inputs), generator = update.shape, torch.Generator()
        given = StartLayer(name, inputs, outputs, update.rank, update.scaling, generator, matrix.float, None)
        a, b = make_factors(start, given)
        updates[name] = difference(update, LowRank(a, b, update.scaling))
    return updates


def untouched_updates(
    lora: LoraFolder, start: str | None, initial: Path | None, base: Mapping[str, str]
) -> tuple[dict[str, LowRank], str | None]:
    """The updates relative to the original base, and a note that says where the initial factors B0 and A0 come from.

    `base`: the base that --base names. Raises: AdapterError if B0 and A0 can neither be read nor computed.
    """
    if initial is not None:
        note = f"the initial factors of the adapter, which contain a part of the base, are read from {initial}"
        return subtract_initial(lora, read_lora_folder(initial, {START: True})), note  # read like plain LoRA
    if start is None:
        return lora.updates, None
    settings = _starts().get(start)
    if settings is None or settings.looks_at:  # it needs more than the base's weights
        what = f"the initialisation {start} moved weights of the base into the adapter, and cannot be recomputed"
        raise AdapterError(what, HOW, file=lora.config.file, key=START)
    how = f"{HOW}, or give --base MODEL, from which {start} can be recomputed"
    section = base_section(lora.config, base, how)
    if section.quantization != "none":
        what = f"the initialisation {start} on a {section.quantization} base cannot be recomputed"
        raise AdapterError(what, HOW, file=lora.config.file, key=START)
    rewriter = Rewriter(section, "full")
    if lora.config.base_fingerprint and lora.config.base_fingerprint != rewriter.fingerprint():
        raise AdapterError(
            "was trained on a different base than this one", "name the right base with --base", file=lora.config.file
        )
    absent = [name for name in lora.updates if name not in rewriter.modules]
    if absent:
        what = f"adapts '{absent[0]}', which {section.name_or_path} does not have"
        raise AdapterError(what, "name the right base with --base", file=lora.config.file)
    if rewriter.tied and rewriter.head in lora.updates:
        what = f"the initialisation {start} of the head '{rewriter.head}' also moved the embedding that it is tied to"
        raise AdapterError(what, "merge it with peft, and use the merged model", file=lora.config.file, key=START)
    right = "this is correct only if training started from exactly these weights, unquantized"
    note = f"the initialisation {start} is recomputed from {section.name_or_path}: {right}"
    return subtract_start(lora, settings, lambda name: rewriter.trained_on(name)[0]), note
