"""Loads a base from disk, dense or packed (quantized), frozen and in eval mode. It can also make the same net on the
meta device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from tunekit.errors import ModelError, listed
from tunekit.model.attention.documents import attend_per_document
from tunekit.model.attention.padding_free import skip_padding
from tunekit.model.base_spec import BaseSpec, read_base_spec
from tunekit.model.compute import resolve_dtype
from tunekit.model.families import Family, text_config
from tunekit.model.families.heads import compute_in_float32
from tunekit.model.families.structure import statistics_notes
from tunekit.model.loaded_model import LoadedModel
from tunekit.model.parts import part_notes
from tunekit.model.pretrained import config_of
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import PackedLinear, adopt_packed, element_count
from tunekit.model.storage import inspection
from tunekit.model.storage.by_transformers import from_pretrained, meta_net
from tunekit.model.storage.gguf import gguf_arguments, parsed_once
from tunekit.model.storage.gguf_facts import FOLDER
from tunekit.model.storage.mapped import mapped_net
from tunekit.model.storage.mapped_files import MappedFiles
from tunekit.model.storage.packed_cache import cached_base
from tunekit.model.storage.packing import packed_base, quantize_layers
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.reading import fill_net, missing_modules, needs_copies, open_base, open_net
from tunekit.model.storage.shards import holds_weights, read_headers
from tunekit.model.storage.sidecar import Sidecar
from tunekit.model.storage.source import ModelSource, find_source
from tunekit.model.storage.untying import untie_head
from tunekit.model.transformers_guard import model_errors, no_fetched_code, quiet
from tunekit.model.uncalled import skipped_notes
from tunekit.recipe.model import HeadedModel, ModelSection
from tunekit.records import ModelFacts, TextFacts

__all__ = ["LoadedModel", "base_fingerprint", "load_model", "make_meta_model", "resolve_dtype"]


def load_model(
    section: ModelSection,
    *,
    device: torch.device,
    streamed: bool = False,
    streamed_head: bool = False,
    sharded: bool = False,
) -> LoadedModel:
    """Load the base from safetensors or GGUF, quantize it if the section requests this, freeze it, and move it to
    `device`.

    `streamed`: keep the layers on the host, as views of files. `streamed_head`: keep the token embedding and the output
    projection there too. Everything else is moved to `device`. `sharded`: do both, because each rank will copy only
    its share.

    A folder stored in bitsandbytes' 4 bits is loaded in that form. It can be evaluated, but plan refuses to train it.
    Raises: ModelError unless the files are a complete model of a known family.
    """
    resolve_dtype(section, device)
    source = find_source(section, weights=True)
    indexed = inspection.indexed_family(source)
    if indexed is not None:
        return _load_indexed(indexed, source, section, device)
    if section.quantization == "none" and source.gguf_file is None:
        raw = inspection.read_config(source)
        if inspection.is_packed_by_bitsandbytes(raw):
            inspection.find_family(raw, section)
            return load_packed_folder(section, device)
    with parsed_once(section.name_or_path):
        spec = read_base_spec(source, section, device, weights=True)
        if streamed or streamed_head or sharded:
            return _load_streamed(spec, streamed or sharded, streamed_head or sharded, sharded)
        direct = _from_files(spec)
        net, notes, sidecar = direct or (*_read_weights(spec), None)
        spec.family.draw_head(section, net, spec.dtype)
    new_modules = _new_modules(net, spec)
    if direct is None:
        notes += _pack_layers(net, spec, device, new_modules)
    loaded = _finish(net.to(device), spec, notes, new_modules)
    loaded.sidecar = sidecar
    return loaded


def _load_streamed(spec: BaseSpec, streamed: bool, streamed_head: bool, sharded: bool) -> LoadedModel:
    """Load a base for streaming: its layers, its head, or both remain on the host, as views of mapped files."""
    family = spec.family
    with model_errors(spec.section), quiet(), no_fetched_code():
        net, notes, mapped = mapped_net(spec, sharded=sharded)
        family.draw_head(spec.section, net, spec.dtype)
    stored = [tensor for _, layer in family.layers(net) for tensor in layer.state_dict(keep_vars=True).values()]
    names = (family.head_name(net), family.embedding_name(net)) if streamed_head else ()
    tables = [tensor for name in names if name for tensor in net.get_submodule(name).parameters()]
    kept = [tensor for _, layer in family.layers(net) for tensor in (*layer.parameters(), *layer.buffers())]
    inside = {id(tensor) for tensor in [*(kept if streamed else []), *tables]}  # also buffers that no file contains
    for tensor in [*net.parameters(), *net.buffers()]:
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(spec.device)
    loaded = _finish(net, spec, notes, _new_modules(net, spec))
    views = [*stored, *tables] if sharded else stored
    loaded.mapped = frozenset(tensor.data_ptr() for tensor in views) if mapped and streamed else frozenset()
    return loaded


def make_meta_model(section: ModelSection, *, device: torch.device, all_parts: bool = False) -> LoadedModel:
    """Make the same net as load_model, but on the meta device, from the configuration alone. `device`: the device of
    the planned run. `all_parts`: with the parts of a composite model that load_model does not load.

    Raises: ModelError in the same cases as load_model, except for defects of the weights.
    """
    source = find_source(section, weights=False)
    indexed = inspection.indexed_family(source)
    if indexed is not None:
        return _load_indexed(indexed, source, section, device, meta=True)
    spec = read_base_spec(source, section, device, weights=False)
    files = _files(source)  # without files, assume that tensors are not aligned, which is most common
    net = meta_net(spec, files)
    if not all_parts:
        spec.family.leave_out(net, section)
    if source.commit is not None and len(spec.family.new_head(section, net)) > len(spec.family.trained_with(net)):
        spec = replace(spec, source=find_source(section, weights=True))  # only the files show which modules are new
    dense, alone = spec.is_dense, _can_be_read_alone(net, spec)
    if not alone:
        spec.refuse_transformers()
    copied = dense and alone and (files is None or needs_copies(files, spec.dtype, device))
    untie_head(net, spec.family, files)
    new_modules = _new_modules(net, spec)
    notes = _pack_layers(net, spec, torch.device("meta"), new_modules)
    loaded = _finish(net, spec, notes, new_modules, meta=True)
    loaded.packed_while_read, loaded.copied_while_read, loaded.read_alone = alone and not dense, copied, alone
    return loaded


def _load_indexed(
    family: Family, source: ModelSource, section: ModelSection, device: torch.device, *, meta: bool = False
) -> LoadedModel:
    """Load a base whose family has a separate loader, such as a diffusion pipeline, with the trained modules on the
    device. `meta`: without weights.

    Raises: ModelError if the section has keys that only language models support.
    """
    dtype = resolve_dtype(section, device)
    net = family.load(source.folder, section, dtype, meta=meta).to(torch.device("meta") if meta else device)
    fingerprint = None if meta else inspection.fingerprint(source)
    spec = BaseSpec(section, source, config_of(net), family, dtype, device, "sdpa", fingerprint)
    return _finish(net, spec, [], meta=meta)


def _new_modules(net: nn.Module, spec: BaseSpec) -> tuple[str, ...]:
    """Names of the head's modules that the base's files lack. Modules with packed layers are left out, because packed
    layers are always read from the files."""
    packed = tuple(name for name, module in net.named_modules() if isinstance(module, PackedLinear))
    heads = spec.family.new_head(spec.section, net)
    names = [head for head in heads if not any(f"{name}.".startswith(f"{head}.") for name in packed)]
    files = _files(spec.source) if names else None
    return missing_modules(net, {} if files is None else files.headers, names) if names else ()


def _pack_layers(net: nn.Module, spec: BaseSpec, device: torch.device, new_modules: Sequence[str]) -> list[str]:
    """Quantize the net's layers if the section requests this. Returns notes."""
    return [] if spec.is_dense else quantize_layers(net, spec, device, new_modules)


def _files(source: ModelSource) -> MappedFiles | None:
    """The base's files; None for a GGUF file, or if the files are not on this machine yet.

    Raises: ModelError for a user's folder whose weights cannot be read.
    """
    if source.gguf_file is not None:
        return None  # the folder of a GGUF file may also contain weights of other models
    try:
        return open_weights(source.folder)
    except ModelError:
        if source.commit is None and holds_weights(source.folder):
            raise
        return None


def _can_be_read_alone(net: nn.Module, spec: BaseSpec) -> bool:
    """Whether _from_files can read the base. True if the files are not on this machine yet, so that this is unknown."""
    if not spec.read_by_us:
        return False
    if spec.source.gguf_file is None and _files(spec.source) is None:
        return True
    head = spec.family.new_head(spec.section, net)
    return open_base(net, spec.source, spec.dtype, head) is not None


def load_packed_folder(section: ModelSection, device: torch.device) -> LoadedModel:
    """Load a model folder whose weights are packed by bitsandbytes. transformers reads the files. Without a device map,
    it would put the net on the first GPU."""
    source = find_source(section, weights=True)
    read_headers(source.folder)
    codec.import_bitsandbytes()
    family, dtype = inspection.find_family(inspection.read_config(source), section), resolve_dtype(section, device)
    with model_errors(section), quiet():
        net, _ = family.auto_class().from_pretrained(
            str(source.folder),
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            dtype=dtype,
            device_map={"": str(device)},
            attn_implementation=None if section.attention == "auto" else section.attention,
            trust_remote_code=section.trust_remote_code,
        )
    family.leave_out(net, section)
    adopt_packed(net, dtype)
    return _finish(net, BaseSpec(section, source, config_of(net), family, dtype, device, section.attention), [])


def base_fingerprint(section: ModelSection) -> str:
    """The sha256 that identifies the base; see inspection.fingerprint."""
    return inspection.fingerprint(find_source(section, weights=True))


def _read_weights(spec: BaseSpec) -> tuple[nn.Module, list[str]]:
    """Let transformers read the net, to the CPU. Returns the net and notes.

    Raises: ModelError if the checkpoint lacks weights, because transformers would fill them with random numbers.
    """
    spec.refuse_transformers()
    section, source = spec.section, spec.source
    arguments = gguf_arguments(source) if source.gguf_file else {"use_safetensors": True}
    net, loading = from_pretrained(spec, source.folder, **arguments)
    mismatched = cast(Iterable[tuple[str, Sequence[int], Sequence[int]]], loading["mismatched_keys"])
    if shapes := sorted((str(name), tuple(stored), tuple(wanted)) for name, stored, wanted in mismatched):
        if source.gguf_file is not None:
            what = f"{section.name_or_path} has tensors whose shapes transformers does not support in a GGUF file"
            raise ModelError(f"{what} ({listed([name for name, *_ in shapes], 5)})", FOLDER, key="model.name_or_path")
        raise _wrong_shape(source, *shapes[0], others=len(shapes) - 1)
    missing = sorted(map(str, loading["missing_keys"]))
    for head in spec.family.new_head(section, net):
        if any(key.startswith(f"{head}.") for key in missing):
            net.get_submodule(head).to("meta")  # initialised later
            missing = [key for key in missing if not key.startswith(f"{head}.")]
    if missing:
        what = f"{section.name_or_path} lacks weights that its configuration declares ({listed(missing, 5)})"
        raise ModelError(what, "these weights would be random; use a complete model", key="model.name_or_path")
    spec.family.leave_out(net, section)
    unused = sorted(key for key in map(str, loading["unexpected_keys"]) if not key.startswith(spec.family.unread))
    return net, [f"the model does not use {len(unused)} tensors of the base, for example {unused[0]}"] if unused else []


def _wrong_shape(
    source: ModelSource, name: str, stored: Sequence[int], wanted: Sequence[int], others: int = 0
) -> ModelError:
    """The error for a tensor with the shape `stored`, for which the configuration has the shape `wanted`. `others`: the
    number of other such tensors."""
    found = _files(source)  # its names may lack the prefix of the names in the net, or have one more
    entries = {} if found is None else found.headers
    files = [
        entry.file for each, entry in entries.items() if f".{each}".endswith(f".{name}") or name.endswith(f".{each}")
    ]
    more = f" (and {others:,} more)" if others else ""
    what = f"the tensor {name} has the shape {list(stored)}, but config.json declares {list(wanted)}{more}"
    how = "use the config.json that belongs to these weights"
    return ModelError(what, how, file=str(source.folder / (files or [""])[0]), key="model.name_or_path")


def _from_files(spec: BaseSpec) -> tuple[nn.Module, list[str], Sidecar | None] | None:
    """Read the net without transformers: tensor by tensor, or mapped from the cache of an earlier packing. Returns the
    net, notes and the cache file.

    None if only transformers can read the net, or if transformers can map the files without copies.
    """
    if not spec.read_by_us:
        return None
    copied = spec.source.gguf_file is not None or needs_copies(
        open_weights(spec.source.folder), spec.dtype, spec.device
    )
    if spec.is_dense and not copied:
        return None
    with model_errors(spec.section), quiet(), no_fetched_code():
        net_and_reader = open_net(spec)
    if net_and_reader is None:
        return None
    net, reader = net_and_reader
    if spec.is_dense:
        fill_net(net, reader)
        return net, [], None
    packed = packed_base(net, reader, spec)
    sidecar, notes = cached_base(packed)
    return net, [*packed.notes, *notes], sidecar


def _finish(
    net: nn.Module, spec: BaseSpec, notes: list[str], new_modules: tuple[str, ...] = (), *, meta: bool = False
) -> LoadedModel:
    """Freeze the net, set eval mode and collect the facts. `meta`: the net is on the meta device."""
    exact = spec.family.exact_head(net)
    if exact is not None:
        compute_in_float32(net.get_submodule(exact))
    net.requires_grad_(False).eval()
    spec.family.set_apart(net, spec.section)
    if spec.family.looks_back(net):
        attend_per_document(net, spec.device, spec.dtype)
    elif (spec.family.labelled or spec.family.headless) and spec.family.reads_ids:
        skip_padding(net, [layer for _, layer in spec.family.layers(net)], spec.device)
    config = config_of(net)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # RWKV would divide its weights in place, including packed ones and mapped files
    _refuse_other_shapes(net, spec, new_modules)
    return LoadedModel(
        net=net,
        config=config,
        family=spec.family,
        dtype=spec.dtype,
        device=torch.device("meta") if meta else spec.device,
        fingerprint=spec.fingerprint,
        facts=_facts(net, spec),
        text=_text_facts(net, spec.family),
        generation_config=getattr(net, "generation_config", None),
        notes=[
            *spec.stored_notes(),
            *notes,
            *part_notes(net),
            *skipped_notes(net),
            *_new_notes(net, spec, new_modules),
            *statistics_notes(net),
        ],
        new_modules=new_modules,
    )


def _new_notes(net: nn.Module, spec: BaseSpec, new_modules: Sequence[str]) -> list[str]:
    """Notes about randomly initialised modules. A head for new labels is left out, because it has a separate note."""
    replaced = spec.family.head_name(net) if getattr(spec.section, "new_head", False) else None
    if not (names := [name for name in new_modules if name != replaced]):
        return []
    what = f"the base's files do not contain {', '.join(names)}"
    rows = "as the difference of two rows of the output projection" if getattr(spec.section, "head_rows", ()) else ""
    return [f"{what}; these modules are initialised {rows or 'at random'}, fully trained, and saved with the result"]


def _refuse_other_shapes(net: nn.Module, spec: BaseSpec, new_modules: Sequence[str]) -> None:
    """Raises: ModelError for a tensor of new modules that the files store with another shape: its trained values would
    be lost. The head may have another shape if the recipe has another number of labels than config.json."""
    if not isinstance(spec.section, HeadedModel):
        return
    relabelled = len(inspection.head_labels(spec.source, spec.family.name)) != len(spec.section.labels)
    replaced, files = spec.family.head_name(net) if relabelled else None, _files(spec.source)
    inside = tuple(f"{module}." for module in new_modules if module != replaced)
    for name, tensor in net.state_dict(keep_vars=True).items():
        stored = files.headers.get(name) if files is not None and name.startswith(inside) else None
        if stored is not None and stored.shape != tuple(tensor.shape):
            raise _wrong_shape(spec.source, name, stored.shape, tensor.shape)


def _facts(net: nn.Module, spec: BaseSpec) -> ModelFacts:
    section, family = spec.section, spec.family
    config = config_of(net) if family.ids is None else text_config(net)
    return ModelFacts(
        name_or_path=section.name_or_path,
        revision=spec.source.commit,
        family=family.name,
        model_type=str(config.model_type),
        dtype=str(spec.dtype).removeprefix("torch."),
        quantization=section.quantization,
        double_quantization=section.double_quantization and section.quantization in ("nf4", "fp4"),
        attention=str(config._attn_implementation),
        total_parameters=element_count(net) + sum(map(element_count, family.frozen_parts(net))),
        layers=len(family.layers(net)),
        hidden_size=family.hidden_size(net),
        fingerprint=spec.fingerprint,
    )


def _text_facts(net: nn.Module, family: Family) -> TextFacts | None:
    if family.ids is None:
        return None
    config, name = text_config(net), family.embedding_name(net)
    embedding = cast(nn.Embedding, net.get_submodule(name)) if name else None
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_target_positions", None))
    return TextFacts(
        vocabulary_size=int(embedding.num_embeddings) if embedding is not None else int(config.vocab_size),
        positions=positions if isinstance(positions, int) else None,
    )
