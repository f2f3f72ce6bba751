"""`tunekit adapter show`, `combine`, `convert`, `diff`: what a folder holds; several made one; any made a LoRA; how far
two are apart.

Comes in: folders, or runs.  Goes out: tables, JSON files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.config import CONFIG_NAME, AdapterConfig, read_adapter_config
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.adapters.several import AdapterSet
from tunekit.arithmetic.combine import Mixture, check_mixture, combine
from tunekit.arithmetic.difference import Difference, compare, extract, plain_lora, read_changes, together
from tunekit.arithmetic.linear import combine_linear, read_linear
from tunekit.arithmetic.lora_folder import LoraFolder, plain_lora_method, read_lora_folder
from tunekit.arithmetic.low_rank import LowRank, reduce_rank
from tunekit.arithmetic.model_difference import compare_models, extract_models
from tunekit.arithmetic.moved_starts import (
    HOW,
    START,
    follows_from_base,
    read_moved,
    start_of,
    subtract_initial,
    subtract_start,
)
from tunekit.arithmetic.nearest_lora import Loss, loss_between, nearest_lora, total
from tunekit.arithmetic.on_base import attach_to_base
from tunekit.arithmetic.summary import AdapterSummary, in_order, summarise_adapter
from tunekit.arithmetic.write import (
    BaseFacts,
    base_of,
    check_new_folder,
    refuse_other_labels,
    write_lora,
    write_without_base,
)
from tunekit.console import Console
from tunekit.data.rows import load_evaluation_rows
from tunekit.errors import AdapterError, InputError
from tunekit.evaluation.adapter_losses import adapter_losses
from tunekit.files.durable import json_result
from tunekit.machine.devices import make_devices
from tunekit.model.load import LoadedModel
from tunekit.model.storage.rewrite import Rewriter
from tunekit.model.storage.source import find_source
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.model import ModelSection
from tunekit.records import bytes_text
from tunekit.targets.target import base_section, find_target, load_base, named_base, trained_base

LISTED = 12  # names printed of a list; a JSON file has them all


def show_verb(adapter: str, json_file: str | None) -> None:
    """Tell what is in the folder. Raises: AdapterError where it cannot be read as an adapter at all."""
    write_result = json_result(json_file)
    summary = summarise_adapter(adapter_folder(adapter))
    _show(Console(json_file=json_file), summary)
    write_result(asdict(summary))


def combine_verb(
    adapters: list[str],
    weights: str | None,
    kind: str,
    density: float | None,
    rank: int | None,
    majority_sign: str,
    seed: int,
    base: str | None,
    output: str,
) -> None:
    """Write one adapter made of several. Raises: InputError where they, or the options, do not go together."""
    console = Console()
    folders = [adapter_folder(name) for name in adapters]
    given = _numbers(weights) if weights is not None else (1 / len(folders),) * len(folders)
    mixture = Mixture(kind, given, density, rank, majority_sign, seed)
    check_mixture(mixture, len(folders))
    place = check_new_folder(Path(output), folders)
    configs = [read_adapter_config(folder) for folder in folders]
    facts = base_of(configs, base)
    refuse_other_labels(configs)
    methods = {config.settings.method for config in configs}
    if all(config.method is plain_lora_method() for config in configs):
        _combine_loras(console, folders, mixture, facts, place)
    elif len(methods) > 1:
        what = f"the adapters are of different methods: {', '.join(sorted(methods))}"
        raise AdapterError(what, "make a LoRA of each first: tunekit adapter convert --rank R")
    else:
        _combine_others(folders, mixture, facts, place)
    console.warn(*facts.notes)
    console.info(f"{kind} of {' and '.join(f'{w:g} x {f}' for w, f in zip(given, folders, strict=True))}")
    console.info(f"written to {place}")


def _combine_loras(console: Console, folders: list[Path], mixture: Mixture, facts: BaseFacts, place: Path) -> None:
    loras = [read_lora_folder(folder) for folder in folders]
    combined = combine(loras, mixture)
    same = next((lora for lora in loras if lora.updates.keys() == combined.updates.keys()), loras[0])
    conv1d = any(lora.fan_in_fan_out for lora in loras)
    parameters = frozenset[str]().union(*(lora.parameters for lora in loras))
    like = replace(same, rest=combined.rest, fan_in_fan_out=conv1d, parameters=parameters)
    write_lora(place, facts, like, combined.updates)
    ranks = sorted({update.rank for update in combined.updates.values()})
    console.info(f"{len(combined.updates)} layers of rank {', '.join(map(str, ranks))}")
    name, worst = combined.worst
    console.info(
        f"the update differs from the weighted sum of the adapters' updates by {combined.distance:.2%} of its norm "
        f"(at most {worst:.2%}, in {name})"
    )


def _combine_others(folders: list[Path], mixture: Mixture, facts: BaseFacts, place: Path) -> None:
    """Adapters of another method than LoRA, where that can be."""
    parts = [read_linear(folder) for folder in folders]
    config = parts[0].config
    if mixture.kind != "linear":
        what = f"{config.settings.method} adapters are combined by linear alone, and not by {mixture.kind}"
        raise AdapterError(what, "use --method linear, or make a LoRA of each first", key="--method")
    tensors = combine_linear(parts, mixture.weights)
    kept = ("target_modules", "fan_in_fan_out")
    fields: dict[str, object] = {key: config.fields[key] for key in kept if key in config.fields}
    write_without_base(place, facts, config.method, config.settings, tensors, fields)


def convert_verb(adapter: str, rank: int | None, initial: str | None, base: str | None, output: str) -> None:
    """Write the adapter as plain LoRA. Raises: AdapterError where that cannot be, or needs what was not given."""
    console = Console()
    folder = adapter_folder(adapter)
    if rank is not None and rank < 1:
        raise InputError("the rank must be at least 1", key="--rank")
    place = check_new_folder(Path(output), [folder])
    start = start_of(folder)
    config = read_adapter_config(folder, instead={START: True} if start else None)
    facts = base_of([config], base)
    if config.method is not plain_lora_method():
        _convert_method(console, folder, config, rank, initial, base, place)
        return
    lora = read_lora_folder(folder, {START: True} if start else None)
    updates = _untouched(console, lora, start, initial, base)
    if rank is not None:
        reduced = {name: reduce_rank(update, min(rank, update.rank)) for name, update in updates.items()}
        losses = {name: loss_between(name, updates[name], reduced[name]) for name in updates}
        _tell_losses(console, losses, rank)
        updates = reduced
    write_lora(place, facts, lora, updates)
    ranks = sorted({update.rank for update in updates.values()})
    console.info(f"plain LoRA of rank {', '.join(map(str, ranks))}, {len(updates)} layers")
    console.info(f"written to {place}")


def _untouched(
    console: Console, lora: LoraFolder, start: str | None, initial: str | None, base: str | None
) -> dict[str, LowRank]:
    """The updates of the base as it is before any start."""
    if initial is not None:
        first = adapter_folder(initial)
        console.info(f"what the start moved into the adapter is taken from {first}")
        return subtract_initial(lora, read_moved(first))
    if start is None:
        return lora.updates
    if not follows_from_base(start):
        what = f"the start {start} moved weights of the base into the adapter, and cannot be computed again"
        raise AdapterError(what, HOW, file=lora.config.file, key=START)
    how = f"{HOW}, or --base MODEL, from which {start} can be computed again"
    section = base_section(lora.config, named_base(base), how)
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
    console.info(
        f"the start {start} is computed again from {section.name_or_path}: right where training began from exactly "
        "these weights, not quantized"
    )
    return subtract_start(lora, start, lambda name: rewriter.trained_on(name)[0])


def _convert_method(
    console: Console,
    folder: Path,
    config: AdapterConfig,
    rank: int | None,
    initial: str | None,
    base: str | None,
    place: Path,
) -> None:
    """Another method than LoRA, by the nearest LoRA of a rank."""
    method = config.settings.method
    if initial is not None:
        raise InputError(f"an initial adapter says nothing of {method}", "leave it out", key="--initial")
    if rank is None:
        what = f"no LoRA computes exactly what a {method} adapter does"
        raise AdapterError(what, "--rank R writes the nearest of that rank, and tells the error", file=config.file)
    attached, rewriter = attach_to_base(folder, trained_base(config, base))
    found = nearest_lora(attached, config, rewriter.trained_on, rank)
    _tell_losses(console, found.losses, rank)
    write_lora(place, base_of([config], base), found.lora, found.lora.updates)
    console.info(f"written to {place}")


def diff_verb(
    left: str,
    right: str,
    rank: int | None,
    data: str | None,
    base: str | None,
    json_file: str | None,
    output: str | None,
) -> None:
    """Compare two adapters or two models. Raises: InputError where they are not two of a kind."""
    console, write_result = Console(json_file=json_file), json_result(json_file)
    if (rank is None) != (output is None) or (rank is not None and rank < 1):
        raise InputError("to extract a LoRA takes a rank and a folder", "give --extract-rank R --output DIR")
    folders = [adapter_folder(left), adapter_folder(right)]
    adapters = [(folder / CONFIG_NAME).exists() for folder in folders]
    if adapters[0] != adapters[1]:
        raise InputError(f"{left} and {right} are an adapter and a model", "name two adapters, or two models")
    if data is not None and not all(adapters):
        raise InputError("--data measures two adapters on one base", "measure a model with: tunekit eval", key="--data")
    losses = None if data is None else _measure(folders, data, base)
    if all(adapters):
        place = None if output is None else check_new_folder(Path(output), folders)
        differences = _diff_adapters(console, folders, rank, base, place)
    else:
        differences = _diff_models(console, [left, right], rank, None if output is None else Path(output))
    write_result([asdict(difference) for difference in differences])
    if losses is not None:
        labels = ("the base alone", f"with A ({left})", f"with B ({right})")
        console.table(["", "loss"], list(zip(labels, losses, strict=True)), title=data)


def _measure(folders: Sequence[Path], data: str, base: str | None) -> list[float]:
    """Losses of the base, of A and of B on the same rows; the base is loaded once, with both over it."""
    target = find_target(str(folders[0]), base, [])
    source = Source(path=str(Path(data).resolve()) if Path(data).exists() else data)
    template = None if target.template_file is None else str(target.template_file)
    section = DataSection(train=(source,), eval=(source,), chat_template=template)
    devices = make_devices()
    try:
        target, model, processor, known = load_base(target, devices.device)
        loaded = load_evaluation_rows(section, known, seed=target.seed)
        rows, objective = loaded.evaluation, loaded.objective
        assert rows is not None  # the section asks for them
        adapters = AdapterSet(model.net)
        for name, folder in zip("AB", folders, strict=True):
            adapters.add(name, partial(_attach, model, folder))
        losses = adapter_losses(model, adapters, processor, objective, rows, devices, target.evaluation)
    finally:
        devices.close()
    return [losses[name] for name in (None, "A", "B")]


def _attach(model: LoadedModel, folder: Path) -> AttachedAdapter:
    head_name = model.family.head_name(model.net)
    return attach_adapter_folder(model.net, folder, head_name=head_name, base_fingerprint=model.fingerprint)


def _diff_adapters(
    console: Console, folders: list[Path], rank: int | None, base: str | None, place: Path | None
) -> list[Difference]:
    first, second = (read_changes(folder, base) for folder in folders)
    facts = base_of([first.config, second.config], base)
    differences = [
        compare(name, first.of(name), second.of(name)) for name in sorted(first.names | second.names, key=in_order)
    ]
    _tell_differences(console, "updates of layers", differences)
    others = [compare(key, first.rest.get(key), second.rest.get(key)) for key in sorted({*first.rest, *second.rest})]
    if others:
        _tell_differences(console, "tensors trained whole", others)
    if rank is not None and place is not None:
        lora, losses = extract(first, second, rank)
        changed = [other.name for other in others if not other.equal]
        _list(console, "tensors differ that a LoRA cannot hold, and are left out", changed)
        _write_extracted(console, place, facts, lora, losses, rank)
    return differences + others


def _diff_models(console: Console, names: list[str], rank: int | None, output: Path | None) -> list[Difference]:
    sections = [ModelSection.model_validate(named_base(name)) for name in names]
    sources = [find_source(section, weights=True) for section in sections]
    packed = next((source.gguf_file for source in sources if source.gguf_file), None)
    if packed:
        raise InputError(f"{packed} is a GGUF file", "two models are compared as folders of safetensors")
    place = None if output is None else check_new_folder(output, [source.folder for source in sources])
    differences = list(compare_models(sources[0].folder, sources[1].folder))
    _tell_differences(console, "tensors", differences)
    if rank is not None and place is not None:
        one, two = (Rewriter(section, "full") for section in sections)
        found = extract_models(one, two, rank)
        facts = BaseFacts(sections[0].name_or_path, fingerprint=one.fingerprint(), task_type=one.family.task_type)
        lora = plain_lora(found.updates, conv1d=found.conv1d, target_modules=found.target_modules)
        _list(console, "tensors differ that a LoRA cannot hold, and are left out", list(found.left_out))
        _write_extracted(console, place, facts, lora, found.losses, rank)
    return differences


def _write_extracted(
    console: Console, place: Path, facts: BaseFacts, lora: LoraFolder, losses: Mapping[str, Loss], rank: int
) -> None:
    _tell_losses(console, losses, rank)
    write_lora(place, facts, lora, lora.updates)
    console.info(f"A with this adapter is near B; written to {place}")


def _tell_differences(console: Console, what: str, differences: list[Difference]) -> None:
    """Those that differ, and the whole."""
    rows = [(d.name, d.left, d.right, d.distance, d.cosine) for d in differences if not d.equal]
    if rows:
        console.table(["name", "|A|", "|B|", "|B - A|", "cosine"], rows)
    whole = together(differences)
    equal = len(differences) - len(rows)
    console.info(f"{len(differences)} {what}: {equal} equal, {len(rows)} different")
    if rows and whole.left:
        cosine = "" if whole.cosine is None else f", cosine {whole.cosine:.4f}"
        console.info(f"|A| {whole.left:.4g}, |B| {whole.right:.4g}, |B - A| {whole.distance:.4g}{cosine}")


def _tell_losses(console: Console, losses: Mapping[str, Loss], rank: int) -> None:
    """What a lower rank loses, layer by layer."""
    rows = [
        (loss.name, loss.norm, f"{loss.share:.2%}", f"{loss.kept:.2%}")
        for loss in sorted(losses.values(), key=lambda loss: in_order(loss.name))
    ]
    console.table(["layer", "norm of the update", "error", "energy kept"], rows)
    whole = total(losses)
    console.info(
        f"rank {rank}: error {whole.share:.2%} of the norm of all updates, {whole.kept:.2%} of the energy kept"
    )


def _numbers(text: str) -> tuple[float, ...]:
    """0.7,0.3 as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"'{text}' is no list of numbers", "write them as 0.7,0.3", key="--weights") from None


def adapter_folder(name: str) -> Path:
    """The folder itself, or the result of the run that is named."""
    folder = Path(name).expanduser()
    inner = folder / "adapter"
    return inner if not (folder / CONFIG_NAME).exists() and (inner / CONFIG_NAME).exists() else folder


def _show(console: Console, summary: AdapterSummary) -> None:
    """Layer by layer, and at the end, where a terminal stands, the whole in a few lines."""
    rows = [(layer.name, layer.rank, layer.parameters, layer.norm, layer.update_norm) for layer in summary.layers]
    columns = ["layer", "rank", "parameters", "norm of its tensors", "norm of s B A"]
    width = 5 if any(row[4] is not None for row in rows) else 4
    console.table(columns[:width], [row[:width] for row in rows])
    _list(console, "all-zero tensors (as they started, or dead)", summary.dead)
    _list(console, "tensors with NaN or infinity", summary.not_finite)
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in summary.ranks.items())
    facts = {
        "method": f"{summary.method} (peft type {summary.peft_type})",
        "base": summary.base or "not named",
        "revision": summary.revision,
        "fingerprint": summary.fingerprint,
        "ranks": ranks or None,
        "settings": _settings_text(summary) or None,
        "parameters": summary.parameters,
        "file": f"{bytes_text(summary.tensor_bytes)}, {len(summary.tensors)} tensors",
    }
    console.panel(summary.folder, facts)
    console.warn(*(f"would not be loaded: {fault}" for fault in summary.faults))


def _settings_text(summary: AdapterSummary) -> str:
    """Settings that say something; of long lists and mappings, how long they are."""
    said = {key: value for key, value in summary.settings.items() if value not in (None, [], {}, "", False)}
    short = {
        key: f"({len(value)})" if isinstance(value, list | dict) and len(value) > LISTED else value
        for key, value in said.items()
    }
    return ", ".join(f"{key} {value}" for key, value in short.items() if key != "method")


def _list(console: Console, title: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        console.info(f"{len(names)} {title}: {', '.join(names[:LISTED])}{more}")
