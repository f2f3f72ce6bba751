"""`tunekit adapter`: show, convert, combine, diff, adopt and export-checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tunekit.adapters.folder.class_names import renames_for, text_class_renames, write_renamed
from tunekit.adapters.folder.config import CONFIG_NAME, TEMPLATE_NAME, AdapterConfig, read_adapter_config
from tunekit.adapters.folder.write import save_adapter_folder
from tunekit.arithmetic.adopt import adopt_lora
from tunekit.arithmetic.combine import Mixture, check_mixture, combine
from tunekit.arithmetic.difference import TensorDifference, compare, extract, read_changes, together
from tunekit.arithmetic.linear import TO_LORA, write_linear
from tunekit.arithmetic.lora_folder import LoraFolder, plain_lora_method, read_lora_folder
from tunekit.arithmetic.losses import losses_on_rows
from tunekit.arithmetic.low_rank import reduce_rank
from tunekit.arithmetic.model_difference import compare_models, extract_models
from tunekit.arithmetic.moved_starts import START, read_started_lora, start_of, untouched_updates
from tunekit.arithmetic.nearest_lora import RankLoss, loss_between, nearest_lora, total
from tunekit.arithmetic.on_base import attach_to_base, attach_without_weights
from tunekit.arithmetic.summary import LISTED, AdapterSummary, in_order, summarise_adapter
from tunekit.arithmetic.write import BaseFacts, base_of, refuse_other_labels, write_lora
from tunekit.artifacts.checkpoint import find_checkpoint
from tunekit.artifacts.stopped import named_state
from tunekit.console import Console
from tunekit.errors import AdapterError, InputError, listed
from tunekit.files.durable import json_result
from tunekit.files.work_folder import check_new_folder, temporary_folder
from tunekit.model.storage.rewrite import Rewriter
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection
from tunekit.records import bytes_text, with_article
from tunekit.targets.export import export_checkpoint
from tunekit.targets.target import base_override, trained_base

LEFT_OUT = "tensors that differ are left out, because a LoRA cannot change them"


def show_verb(adapter: str, json_file: str | None) -> None:
    """Print the content of an adapter folder. Raises: AdapterError if it cannot be read as an adapter."""
    write_result = json_result(json_file)
    console, place = Console(json_file=json_file), find_adapter(adapter, None)
    console.info(*place.notes)
    summary = summarise_adapter(place.folder)
    _show(console, summary)
    write_result(asdict(summary))


def combine_verb(
    adapters: list[str],
    weights: str | None,
    kind: str,
    density: float | None,
    rank: int | None,
    majority_sign: str | None,
    seed: int | None,
    base: str | None,
    output: str,
) -> None:
    """Combine several adapters into one. Raises: InputError if the adapters or the options do not fit together."""
    console = Console()
    places = [find_adapter(name, base) for name in adapters]
    folders = [place.folder for place in places]
    console.info(*(note for place in places for note in place.notes))
    numbers = _numbers(weights) if weights is not None else (1 / len(folders),) * len(folders)
    mixture = Mixture(kind, numbers, density, rank, majority_sign, seed)
    check_mixture(mixture, len(folders))
    place = check_new_folder(Path(output), folders)
    configs = [read_adapter_config(folder) for folder in folders]
    facts = base_of(configs, base)
    refuse_other_labels(configs)
    methods = {config.settings.method for config in configs}
    if all(config.method is plain_lora_method() for config in configs):
        _combine_loras(console, folders, mixture, facts, place)
    elif len(methods) > 1:
        what = f"the adapters have different methods: {', '.join(sorted(methods))}"
        raise AdapterError(what, TO_LORA)
    else:
        write_linear(place, folders, mixture, facts)
    console.warn(*facts.notes)
    console.info(f"method {kind}: {' and '.join(f'{w:g} x {f}' for w, f in zip(numbers, folders, strict=True))}")
    console.info(f"written to {place}")


def _combine_loras(console: Console, folders: list[Path], mixture: Mixture, facts: BaseFacts, place: Path) -> None:
    loras = [read_lora_folder(folder) for folder in folders]
    combined = combine(loras, mixture)
    write_lora(place, facts, combined.like(loras), combined.updates)
    ranks = sorted({update.rank for update in combined.updates.values()})
    console.info(f"{len(combined.updates)} layers of rank {', '.join(map(str, ranks))}")
    name, worst = combined.worst
    console.info(
        f"the combined update differs from the weighted sum of the adapters' updates by {combined.distance:.2%} of "
        f"its norm (in the worst layer, {name}, by {worst:.2%})"
    )


def convert_verb(adapter: str, rank: int | None, initial: str | None, base: str | None, output: str) -> None:
    """Convert the adapter to plain LoRA. Raises: AdapterError if this is impossible, or if it needs an option that was
    not given."""
    console, found = Console(), find_adapter(adapter, base)
    folder = found.folder
    console.info(*found.notes)
    if rank is not None and rank < 1:
        raise InputError("the rank must be at least 1", "write --rank 8, for example", key="--rank")
    place = check_new_folder(Path(output), [folder])
    start = start_of(folder)
    config = read_adapter_config(folder, instead={START: True} if start else None)
    facts = base_of([config], base)
    if config.method is not plain_lora_method():
        _convert_method(console, config, rank, initial, base, place)
        return
    lora = read_started_lora(folder, start)
    first = None if initial is None else find_adapter(initial, base)
    updates, note = untouched_updates(lora, start, None if first is None else first.folder, base_override(base))
    console.info(*filter(None, [note]))
    if rank is not None:
        reduced = {name: reduce_rank(update, min(rank, update.rank)) for name, update in updates.items()}
        losses = {name: loss_between(name, updates[name], reduced[name]) for name in updates}
        _tell_losses(console, losses, rank)
        updates = reduced
    write_lora(place, facts, lora, updates)
    ranks = sorted({update.rank for update in updates.values()})
    console.info(f"plain LoRA of rank {', '.join(map(str, ranks))} for {len(updates)} layers")
    console.info(f"written to {place}")


def rename_verb(adapter: str, names: str, base: str | None, output: str) -> None:
    """Write the adapter with the module names of another class of its base.

    Raises: InputError for unknown `names`, or if the base is not a composite model and `names` is its text class.
    """
    if names not in ("base", "text"):
        raise InputError(f"--names {names} is unknown", "choose base or text", key="--names")
    console, found = Console(), find_adapter(adapter, base)
    folder = found.folder
    console.info(*found.notes)
    place = check_new_folder(Path(output), [folder])
    config = read_adapter_config(folder)
    section = trained_base(config, base)
    rewriter = Rewriter(section, "full" if section.quantization == "none" else "dequantized")
    net, head = rewriter.net, rewriter.head
    with temporary_folder() as work:
        source = folder
        if renames := renames_for(net, head, folder):
            source = Path(work) / "renamed"
            write_renamed(folder, source, net, renames)
        back = text_class_renames(net, head)
        if names == "text" and not back:
            what = f"{section.name_or_path} has no other class for its text: it is {type(net).__name__}"
            raise InputError(what, "write --names base", key="--names")
        if names == "text":
            write_renamed(source, place, net, back)
        else:
            attached = attach_without_weights(source, section, rewriter)
            save_adapter_folder(
                attached,
                place,
                base_name=section.name_or_path,
                base_fingerprint=rewriter.fingerprint(),
                revision=rewriter.source.commit,
                task_type=rewriter.family.task_type,
                base_dtype=config.base_dtype,
                quantization=section.quantization,
                double_quantization=section.double_quantization,
                chat_template=(folder / TEMPLATE_NAME).read_text("utf-8")
                if (folder / TEMPLATE_NAME).exists()
                else None,
                objective=config.objective,
            )
    console.info(f"written to {place} with the names of {'the text class' if names == 'text' else type(net).__name__}")


def _convert_method(
    console: Console, config: AdapterConfig, rank: int | None, initial: str | None, base: str | None, place: Path
) -> None:
    """Convert an adapter whose method is not LoRA: to a LoRA that computes the same or, with `rank`, to the nearest
    LoRA of this rank."""
    method = config.settings.method
    if initial is not None:
        raise InputError(f"--initial has no effect on {with_article(method)} adapter", "remove it", key="--initial")
    attached, rewriter = attach_to_base(config.folder, trained_base(config, base))
    lora, losses = nearest_lora(attached, config, rewriter.trained_on, rank)
    if rank is not None:
        _tell_losses(console, losses, rank)
    write_lora(place, base_of([config], base), lora, lora.updates)
    ranks = sorted({update.rank for update in lora.updates.values()})
    console.info(f"plain LoRA of rank {', '.join(map(str, ranks))} for {len(lora.updates)} layers")
    console.info(f"written to {place}")


def export_checkpoint_verb(checkpoint: str, base: str | None, output: str, *, allow_code: bool = False) -> None:
    """Write the adapter of a checkpoint. `allow_code`: code of the run's base may run.

    Raises: InputError if the checkpoint or its base does not exist.
    """
    folder = find_checkpoint(checkpoint)
    if folder is None:
        how = "write RUN@120, RUN@best or RUN@last, or the path of a folder in RUN/checkpoints"
        raise InputError(f"{checkpoint} names no checkpoint", how)
    place = check_new_folder(Path(output), [folder])
    place.parent.mkdir(parents=True, exist_ok=True)
    size_bytes = export_checkpoint(folder, place, base_override(base), allow_code=allow_code)
    what = "adapter" if (place / CONFIG_NAME).exists() else "model"
    Console().info(f"the {what} of {folder.name} ({bytes_text(size_bytes)}) is written to {place}")


def adopt_verb(file: str, base: str | None, output: str) -> None:
    """Convert a LoRA file to an adapter folder. Raises: InputError if the file or the pipeline is missing, or if the
    file does not fit the pipeline."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {file}", "name a .safetensors file of diffusers or kohya")
    if base is None:
        what = "the file does not name its pipeline"
        raise InputError(what, "name the pipeline with --base PIPELINE", key="--base")
    place = check_new_folder(Path(output), [path])
    layers, size_bytes = adopt_lora(path, base_override(base), place)
    Console().info(f"{layers} layers, written to {place} ({bytes_text(size_bytes)})")


def diff_verb(
    left: str,
    right: str,
    rank: int | None,
    data: str | None,
    base: str | None,
    json_file: str | None,
    output: str | None,
    *,
    allow_code: bool = False,
) -> None:
    """Compare two adapters or two models. `allow_code`: the code of a run's base may run, for `data`.

    Raises: InputError if one is an adapter and the other is a model.
    """
    console, write_result = Console(json_file=json_file), json_result(json_file)
    if (rank is None) != (output is None) or (rank is not None and rank < 1):
        raise InputError("extracting a LoRA needs a rank and a folder", "give --extract-rank R --output DIR")
    places = [find_adapter(name, base, allow_code=allow_code) for name in (left, right)]
    folders = [place.folder for place in places]
    console.info(*(note for place in places for note in place.notes))
    adapters = [(folder / CONFIG_NAME).exists() for folder in folders]
    absent = [name for name, folder in zip((left, right), folders, strict=True) if not folder.exists()]
    if adapters[0] != adapters[1] and absent:
        raise InputError(f"there is no folder {absent[0]}", "name two adapters, or two models")
    if adapters[0] != adapters[1]:
        raise InputError(
            f"one of {left} and {right} is an adapter, the other is a model", "name two adapters, or two models"
        )
    if data is not None and not all(adapters):
        raise InputError("--data needs two adapters of one base", "measure a model with: tunekit eval", key="--data")
    losses = None if data is None else losses_on_rows(folders, data, base, allow_code=allow_code)
    if all(adapters):
        place = None if output is None else check_new_folder(Path(output), folders)
        differences = _diff_adapters(console, folders, rank, base, place)
    else:
        differences = _diff_models(console, list(map(str, folders)), rank, None if output is None else Path(output))
    values = [asdict(difference).items() for difference in differences]
    write_result([{name: value for name, value in each if value is not None} for each in values])
    if losses is not None:
        labels = ("the base alone", f"with A ({left})", f"with B ({right})")
        console.table(["", "loss"], list(zip(labels, losses, strict=True)), title=data)


def _diff_adapters(
    console: Console, folders: list[Path], rank: int | None, base: str | None, place: Path | None
) -> list[TensorDifference]:
    first, second = (read_changes(folder, base) for folder in folders)
    facts = base_of([first.config, second.config], base)
    names = sorted(first.names | second.names, key=in_order)
    differences = [compare(name, first.of(name), second.of(name)) for name in names]
    _tell_differences(console, "updates of layers", differences)
    others = [compare(key, first.rest.get(key), second.rest.get(key)) for key in sorted({*first.rest, *second.rest})]
    if others:
        _tell_differences(console, "fully trained tensors", others)
    if rank is not None and place is not None:
        lora, losses = extract(first, second, rank)
        _list(console, LEFT_OUT, [other.name for other in others if not other.equal])
        _write_extracted(console, place, facts, lora, losses, rank)
    return differences + others


def _diff_models(console: Console, names: list[str], rank: int | None, output: Path | None) -> list[TensorDifference]:
    sections = [ModelSection.model_validate(base_override(name)) for name in names]
    sources = [find_source(section, weights=True) for section in sections]
    packed = next((source.gguf_file for source in sources if source.gguf_file), None)
    if packed:
        raise InputError(f"{packed} is a GGUF file", "name folders with safetensors files to compare two models")
    place = None if output is None else check_new_folder(output, [source.folder for source in sources])
    differences = list(compare_models(sources[0].folder, sources[1].folder))
    _tell_differences(console, "tensors", differences)
    if rank is not None and place is not None:
        one, two = (Rewriter(section, "full") for section in sections)
        lora, losses, left_out = extract_models(one, two, rank)
        facts = BaseFacts(sections[0].name_or_path, fingerprint=one.fingerprint(), task_type=one.family.task_type)
        _list(console, LEFT_OUT, left_out)
        _write_extracted(console, place, facts, lora, losses, rank)
    return differences


def _write_extracted(
    console: Console, place: Path, facts: BaseFacts, lora: LoraFolder, losses: Mapping[str, RankLoss], rank: int
) -> None:
    _tell_losses(console, losses, rank)
    write_lora(place, facts, lora, lora.updates)
    console.info(f"A plus this adapter approximates B; the adapter is written to {place}")


def _tell_differences(console: Console, what: str, differences: list[TensorDifference]) -> None:
    """Print the tensors that differ, and the difference over all tensors. Tensors with unequal shapes are only listed,
    not compared."""
    shapes = [d.name for d in differences if d.distance is None and None not in (d.left, d.right)]
    if shapes:
        _list(console, "tensors that are not compared, because their shapes in A and B differ", shapes)
    differences = [d for d in differences if d.name not in shapes]
    if shapes and not differences:
        return
    rows = [(d.name, d.left, d.right, d.distance, d.cosine) for d in differences if not d.equal]
    if rows:
        console.table(["name", "|A|", "|B|", "|B - A|", "cosine"], rows)
    overall = together(differences)
    equal = len(differences) - len(rows)
    console.info(f"{len(differences)} {what}: {equal} equal, {len(rows)} different")
    if rows and overall.left:
        cosine = "" if overall.cosine is None else f", cosine {overall.cosine:.4f}"
        console.info(f"|A| {overall.left:.4g}, |B| {overall.right:.4g}, |B - A| {overall.distance:.4g}{cosine}")


def _tell_losses(console: Console, losses: Mapping[str, RankLoss], rank: int) -> None:
    """Print the error that the lower rank causes, for each layer and in total."""
    ordered = sorted(losses.values(), key=lambda loss: in_order(loss.name))
    rows = [(loss.name, loss.norm, f"{loss.share:.2%}", f"{loss.kept:.2%}") for loss in ordered]
    console.table(["layer", "norm of the update", "error", "energy kept"], rows)
    overall = total(losses)
    error, energy = f"{overall.share:.2%} of the norm of all updates", f"{overall.kept:.2%} of the energy kept"
    console.info(f"rank {rank}: error {error}, {energy}")


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers that a text such as "0.7,0.3" contains."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"'{text}' is not a list of numbers", "write them as 0.7,0.3", key="--weights") from None


@dataclass(frozen=True)
class AdapterPlace:
    """An adapter folder. `holder`: keeps the temporary folder of a checkpoint's adapter alive; `notes`: to be
    printed."""

    folder: Path
    holder: TemporaryDirectory[str] | None = None
    notes: tuple[str, ...] = ()


def find_adapter(name: str, base: str | None, *, allow_code: bool = False) -> AdapterPlace:
    """The folder of an adapter, of a run's adapter or of a checkpoint's adapter."""
    folder, checkpoint, notes = Path(name).expanduser(), find_checkpoint(name), tuple[str, ...]()
    if checkpoint is None and not (folder / CONFIG_NAME).exists() and (folder / "plan.json").exists():
        state = named_state(folder.resolve(), name)
        folder, notes = state.folder, tuple(filter(None, [state.note]))
        checkpoint = folder if state.is_checkpoint else None
    if checkpoint is None:
        inner = folder / "adapter"  # of a run folder without its plan
        has_inner = not (folder / CONFIG_NAME).exists() and (inner / CONFIG_NAME).exists()
        return AdapterPlace(inner if has_inner else folder, notes=notes)
    holder = temporary_folder()
    place = Path(holder.name) / "adapter"
    export_checkpoint(checkpoint, place, base_override(base), allow_code=allow_code)
    return AdapterPlace(place, holder, notes)


def _show(console: Console, summary: AdapterSummary) -> None:
    """Print the summary of the adapter in a few lines, then a table of its layers."""
    console.panel(summary.folder, summary.facts)
    rows = [(layer.name, layer.rank, layer.parameters, layer.norm, layer.update_norm) for layer in summary.layers]
    columns = ["layer", "rank", "parameters", "norm of\nits tensors", "norm of\ns B A"]
    width = 5 if any(row[4] is not None for row in rows) else 4
    console.table(columns[:width], [row[:width] for row in rows])
    _list(console, "all-zero tensors (at their initial value, or no longer trained)", summary.dead)
    _list(console, "tensors with NaN or infinity", summary.not_finite)
    console.warn(*(f"this adapter cannot be loaded: {fault}" for fault in summary.faults))


def _list(console: Console, title: str, names: list[str]) -> None:
    if names:
        console.info(f"{len(names)} {title}: {listed(names, LISTED)}")
