"""Reads adapter folders that tunekit or peft wrote. Every tensor's name, shape and type is checked before the tensor is
read."""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.adapters.attach import AttachedAdapter, attach_adapter
from tunekit.adapters.base import slot_count
from tunekit.adapters.folder.class_names import renames_for
from tunekit.adapters.folder.config import AdapterConfig, adapter_header, tensors_path
from tunekit.adapters.folder.config import read_adapter_config as read_adapter_config
from tunekit.adapters.folder.earlier_peft import refuse_changed_patterns
from tunekit.adapters.folder.expected import PREFIX, expected_tensors, refuse_not_finite
from tunekit.adapters.folder.fields import SAME_NAMED
from tunekit.adapters.folder.vocabulary import added_rows, enlarge
from tunekit.adapters.folder.write import save_adapter_folder as save_adapter_folder
from tunekit.adapters.method import Method, load_method, saved_modules
from tunekit.adapters.module_names import base_modules, is_within, named_copies
from tunekit.adapters.patterns import Patterns
from tunekit.adapters.targets import find_targets
from tunekit.adapters.tokens import embedding_name, tied_with, token_rows
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError, Problem
from tunekit.files.tensors import read_tensor
from tunekit.files.untrusted import printable
from tunekit.model.families.structure import base_name
from tunekit.model.parts import is_composite, outer_parts
from tunekit.model.quantized.weights import weight_of
from tunekit.records import Target

UNBINDING = frozenset({"method", "init_from", "dropout"})  # settings that may differ without changing the computation
COMPARED = frozenset(SAME_NAMED) | {"r", "alpha"}  # compared by the resulting targets and tensors
TIED_NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES
BaseWeight = Callable[[str], Tensor]


def attach_adapter_folder(
    net: nn.Module,
    folder: Path,
    *,
    head_name: str | None,
    base_fingerprint: str | None = None,
    device: torch.device | None = None,
    base_weight: BaseWeight | None = None,
    method: Method | None = None,
    shares_base: bool = False,
) -> AttachedAdapter:
    """Attach the adapter of a folder, written by tunekit or peft, to the base.

    `base_weight`: a function that returns a module's base matrix (O, I), for a net on the meta device. It is called
    only for peft's files with a copy of an embedding.
    `method`: by default, the folder's peft_type determines the method.
    `shares_base`: whether other adapters use the same net, before or after this adapter.
    Raises: AdapterError for everything that does not fit the configuration exactly, before the base is changed.
    """
    config = _as_peft_reads(read_adapter_config(folder, method), net, head_name)
    _check_fingerprint(config, base_fingerprint)
    _refuse_other_class(config, net, head_name)
    rows = added_rows(net, head_name, tensors_path(config.folder))
    if rows and shares_base:
        what = "enlarges the vocabulary of the base, which other adapters use too"
        raise AdapterError(
            what,
            "load no other adapter: name only this adapter, as the TARGET of the command",
            file=str(tensors_path(config.folder)),
        )
    enlarge(net, rows)
    targets = _found_targets(config, net, head_name)
    tensors = _read_tensors(config, net, targets, head_name, base_weight, rows)
    attached = attach_adapter(
        net,
        config.settings,
        seed=0,
        head_name=head_name,
        device=device,
        method=config.method,
        targets=targets,
        from_folder=True,
    )
    attached.load_state(tensors, ("trained", "saved"))
    attached.added_rows = rows
    return attached


def _refuse_other_class(config: AdapterConfig, net: nn.Module, head_name: str | None) -> None:
    """Raises: AdapterError if the folder has the names of another class of this base."""
    for old, new in renames_for(net, head_name, config.folder).items():
        what = f"has the names of another class of this base: {old}, where {type(net).__name__} has {new}"
        how = f"rename them with: tunekit adapter convert {config.folder} --names base --base BASE --output FOLDER"
        raise AdapterError(what, how, file=str(config.folder))


def _found_targets(config: AdapterConfig, net: nn.Module, head_name: str | None) -> list[Target]:
    """The modules that the folder adapts. Modules outside of a composite model's language model count only if the
    folder has tensors for them: other tools write entries that also match these modules."""
    targets = find_targets(net, config.settings, head_name=head_name, method=config.method, file=config.file)
    outside = outer_parts(net, base_name(net), head_name) if is_composite(net) else []
    keys = tuple(adapter_header(tensors_path(config.folder))) if outside else ()
    targets = [
        target
        for target in targets
        if not is_within(target.name, outside) or any(key.startswith(f"{PREFIX}{target.name}.") for key in keys)
    ]
    refuse_changed_patterns(config, {target.name: (target.r, target.alpha) for target in targets})
    return _with_tied_rank(targets, config, net, head_name)


def _as_peft_reads(config: AdapterConfig, net: nn.Module, head_name: str | None) -> AdapterConfig:
    """The configuration, with modules_to_save extended by all modules that PEFT would copy. PEFT compares an entry with
    the end of each name, so `classifier` includes DistilBERT's `pre_classifier`. PEFT also adds tied modules."""
    saved = tuple(saved_modules(config.settings))
    modules = [name for name in base_modules(net) if name]
    named = named_copies(modules, saved)
    matched = [name for name in modules if name.endswith(saved) and not is_within(name, named)] if saved else []
    if matched:
        settings = config.settings.model_copy(update={"modules_to_save": (*saved, *matched)})
        config = replace(config, settings=settings)
    return _with_tied_partners(config, net, head_name)


def _with_tied_partners(config: AdapterConfig, net: nn.Module, head_name: str | None) -> AdapterConfig:
    """The configuration with the modules that PEFT adds for ensure_weight_tying: if the embedding is copied or adapted,
    the tied head is too, and vice versa. PEFT's files contain the tensors of both.

    PEFT does this only for entries that end with one of TIED_NAMES: not for GPT-2's wte.
    """
    modules = base_modules(net)
    embedding = embedding_name(net, modules)
    if not config.fields.get("ensure_weight_tying") or head_name not in tied_with(modules, embedding):
        return config
    for key in ("modules_to_save", "target_modules"):  # PEFT adds to the first of them that names the embedding
        named = getattr(config.settings, key)
        if isinstance(named, str):
            patterns = Patterns(file=config.file, key=key)
            if any(patterns.matches(named, name) for name in TIED_NAMES):
                both = "|".join(map(re.escape, (embedding, head_name)))
                return replace(config, settings=config.settings.model_copy(update={key: f"(?:{named})|{both}"}))
        elif any(entry.rpartition(".")[2] in TIED_NAMES for entry in named or ()):
            entries = (*named, embedding, head_name)
            return replace(config, settings=config.settings.model_copy(update={key: entries}))
    return config


def _with_tied_rank(
    targets: list[Target], config: AdapterConfig, net: nn.Module, head_name: str | None
) -> list[Target]:
    """The targets, in which a head that PEFT keeps tied to the embedding (ensure_weight_tying) has the embedding's
    rank. PEFT shares the embedding's tensors with the head, whatever rank rank_pattern gives the head, and uses the
    head's rank only in its scaling. The new alpha gives the same scaling."""
    modules, layer = base_modules(net), config.method.layer
    by_name = {target.name: target for target in targets}
    embedding, head = by_name.get(embedding_name(net, modules)), by_name.get(head_name or "")
    if not config.fields.get("ensure_weight_tying") or layer is None or embedding is None or head is None:
        return targets
    if head.name not in tied_with(modules, embedding.name) or embedding.r == head.r:
        return targets
    assert embedding.r is not None
    assert head.r is not None
    assert head.alpha is not None
    ratio = embedding.r / head.r
    alpha = head.alpha * (math.sqrt(ratio) if config.low_rank.use_rslora else ratio)
    new = replace(head, r=embedding.r, alpha=alpha)
    new = replace(new, trainable_parameters=slot_count(layer.slots(config.settings, new).values()))
    return [new if target is head else target for target in targets]


def load_into(attached: AttachedAdapter, folder: Path, *, base_fingerprint: str | None = None) -> None:
    """Load a folder's tensors into an adapter with the same layers, ranks and scaling, to continue its training.

    Raises: AdapterError if the folder is invalid, or with all differences between folder and adapter.
    """
    _check_fingerprint(read_adapter_config(folder), base_fingerprint)
    config, targets = continued_folder(attached, folder)
    tensors = _read_tensors(config, attached.net, targets, attached.head_name, None)
    if attached.model_adapter is not None:
        tensors = attached.model_adapter.continued_state(tensors)
    for layer in attached.layers.values():
        tensors |= layer.continued_state(tensors)
    attached.load_state(tensors, ("trained", "saved"))


def continued_folder(attached: AttachedAdapter, folder: Path) -> tuple[AdapterConfig, list[Target]]:
    """The configuration and targets of a folder from which training shall continue. The adapter need not be attached
    yet.

    Raises: AdapterError with all differences between the folder and the recipe's adapter.
    """
    config = read_adapter_config(folder)
    if attached.method.read_as and load_method(attached.method.read_as) is config.method:
        config = read_adapter_config(folder, attached.method)
    net, head_name = attached.net, attached.head_name
    config = _as_peft_reads(config, net, head_name)
    _refuse_computed(attached, config)
    _refuse_other_class(config, net, head_name)
    targets = _found_targets(config, net, head_name)
    _refuse_difference(attached, config, targets)
    return config, targets


def _refuse_difference(attached: AttachedAdapter, config: AdapterConfig, targets: list[Target]) -> None:
    """Raises: AdapterError if the folder's adapter differs from the recipe's adapter."""
    if attached.method is not config.method:
        raise AdapterError(
            "contains an adapter of a different method than the recipe",
            "change adapter.method",
            file=config.file,
        )
    theirs, ours = ({target.name: target for target in side} for side in (targets, attached.targets))
    differences = [f"{name} is adapted in the folder but not in the recipe" for name in theirs if name not in ours]
    differences += [f"{name} is adapted in the recipe but not in the folder" for name in ours if name not in theirs]
    for name, there in theirs.items():
        here = ours.get(name, there)
        if attached.method.regrows and there.trainable_parameters < here.trainable_parameters:
            there = replace(there, trainable_parameters=here.trainable_parameters)
        if here != there:
            text = (
                f"{name} has rank {there.r} and alpha {there.alpha} in the folder, but {here.r} and {here.alpha} in "
                "the recipe"
            )
            if (here.r, here.alpha) == (there.r, there.alpha):
                text = (
                    f"{name} has {there.trainable_parameters} parameters in the folder, but "
                    f"{here.trainable_parameters} in the recipe"
                )
            differences.append(text)
    model = attached.method.model
    free = UNBINDING | COMPARED | attached.method.unbinding
    free |= model.may_differ(attached.settings) if model else frozenset()
    for key, value in config.settings.model_dump(exclude=set(free)).items():
        if getattr(attached.settings, key) != value:
            recipe_value = printable(getattr(attached.settings, key))
            differences.append(f"{key} is {printable(value)} in the folder, but {recipe_value} in the recipe")
    modules, sides = base_modules(attached.net), ((config.settings, targets), (attached.settings, attached.targets))
    there_copied, here_copied = (set(attached.method.copied_modules(modules, *side)) for side in sides)
    differences += [
        f"{name} is fully trained in the folder but not in the recipe" for name in there_copied - here_copied
    ]
    differences += [
        f"{name} is fully trained in the recipe but not in the folder" for name in here_copied - there_copied
    ]
    if token_rows(attached.net, config.settings) != token_rows(attached.net, attached.settings):
        differences.append("the trained tokens of the folder and of the recipe differ, or have a different order")
    if differences:
        how = "write the values of the init_from folder into the recipe"
        raise AdapterError.of([Problem(text, how, config.file) for text in differences[:6]])


def _refuse_computed(attached: AttachedAdapter, config: AdapterConfig) -> None:
    """Raises: AdapterError if the folder contains only values that were computed from the trained tensors, not the
    trained tensors themselves."""
    model = attached.method.model
    if model is None or attached.method is not config.method:
        return
    trained = {slot.suffix for slot in model.slots(attached.settings, attached.net).values() if slot.kind == "trained"}
    if not trained <= {slot.suffix for slot in model.file_slots(attached.settings, attached.net).values()}:
        what = (
            "cannot be continued, because it contains only values computed from the trained tensors, not these tensors"
        )
        raise AdapterError(what, "train again, or resume the run from its checkpoints", file=str(config.folder))


def _check_fingerprint(config: AdapterConfig, base_fingerprint: str | None) -> None:
    if config.base_fingerprint and base_fingerprint and config.base_fingerprint != base_fingerprint:
        raise AdapterError(
            f"was trained on a different base ({config.base_name_or_path}; its fingerprint differs from this base's)",
            "name the right base with --base",
            file=str(config.folder),
        )


def _read_tensors(
    config: AdapterConfig,
    net: nn.Module,
    targets: list[Target],
    head_name: str | None,
    base_weight: BaseWeight | None,
    enlarged: Collection[str] = (),
) -> Tensors:
    """Reads all expected tensors, by name, after checks of header, names, shapes, types and hashes.

    `enlarged`: modules whose complete matrices are in the file, because the adapter adds rows to these matrices.
    """
    path = tensors_path(config.folder)
    header = adapter_header(path)
    expected = expected_tensors(net, config.method, config.settings, targets, head_name, enlarged)
    copies = expected.check(header, str(path))
    config.check_files()
    tensors = {
        name: read_tensor(path, header[key]).to(expected.slots[key].dtype) for key, name in expected.names.items()
    }
    refuse_not_finite(tensors, str(path))
    for key in header.keys() & expected.repeats.keys():
        shared = tensors[expected.names[expected.repeats[key]]]
        if not torch.equal(read_tensor(path, header[key]).to(shared.dtype), shared):
            what = f"'{key}' differs from '{expected.repeats[key]}', which it repeats"
            raise AdapterError(what, "write the adapter again with the program that made it", file=str(path))
    for key, module in copies.items():
        _check_base_copy(read_tensor(path, header[key]), base_modules(net)[module], module, base_weight, str(path))
    return tensors


def _check_base_copy(copy: Tensor, module: nn.Module, name: str, base_weight: BaseWeight | None, file: str) -> None:
    """Check the copy of the base's embeddings that peft adds to the file if embeddings are adapted. The copy is not
    used.

    Raises: AdapterError if the copy differs from this base's embeddings. One of the two may have been rounded, so they
    are compared in the dtype with the lower precision.
    """
    weight = weight_of(module)
    base_matrix = base_weight(name) if base_weight else None
    if base_matrix is None and weight is not None and weight.kind == "dense" and weight.device.type != "meta":
        base_matrix = weight.read(weight.dtype or torch.float32).cpu()
    if base_matrix is not None:
        copy = copy[: len(base_matrix)]  # further rows were added to the base
    if base_matrix is None:
        what = f"contains a copy of the base's weight of '{name}', which cannot be compared"
        raise AdapterError(what, "remove that tensor from this file", file=file)
    if not (torch.equal(copy.to(base_matrix.dtype), base_matrix) or torch.equal(base_matrix.to(copy.dtype), copy)):
        what = f"contains a changed copy of the base's weight of '{name}' (a resized vocabulary, or a different base)"
        raise AdapterError(what, "an adapter may not replace weights of the base", file=file)
