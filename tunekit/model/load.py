"""A base from disk, frozen and ready: as it is, or packed; or the same modules without any weight.

Comes in: the model section and a device.  Goes out: `LoadedModel`.
Next: adapters/attach.py wraps its layers, objectives/ ask its family for hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tunekit.errors import ModelError
from tunekit.files.tensors import TensorEntry
from tunekit.model.attention.documents import attend_per_document
from tunekit.model.compute import resolve_attention, resolve_dtype
from tunekit.model.families import Family, make_family, text_config
from tunekit.model.quantized import codec
from tunekit.model.quantized.weights import adopt_packed, element_count
from tunekit.model.storage import inspection
from tunekit.model.storage.gguf import gguf_arguments, parsed_once
from tunekit.model.storage.kept import kept_base
from tunekit.model.storage.mapped import mapped_net
from tunekit.model.storage.packing import packed_base, quantize_layers
from tunekit.model.storage.reading import fill_net, load_generation_config, needs_copies, open_base, unfilled_net
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.sidecar import Sidecar
from tunekit.model.storage.source import ModelSource, find_source
from tunekit.model.transformers_guard import ModelErrors, no_fetched_code, quiet
from tunekit.recipe.model import ModelSection
from tunekit.records import ModelFacts, TextFacts

__all__ = ["LoadedModel", "base_fingerprint", "load_model", "make_meta_model", "resolve_dtype"]


@dataclass
class LoadedModel:
    """A base model, frozen and in eval mode. `fingerprint` is None for a model without weights."""

    net: nn.Module
    config: Any
    family: Family
    dtype: torch.dtype
    device: torch.device
    quantization: str
    double_quantization: bool
    name_or_path: str
    revision: str | None
    fingerprint: str | None
    facts: ModelFacts
    text: TextFacts
    generation_config: Any
    notes: list[str] = field(default_factory=list)
    sidecar: Sidecar | None = None  # the file that the weights are views into, on a CPU
    mapped: frozenset[int] = frozenset()  # of a streamed base: addresses of layers' weights that are views into files
    # of a model without weights: whether load_model will need one tensor at a time, to pack it or to copy it
    packed_while_read: bool = False
    copied_while_read: bool = False


def load_model(section: ModelSection, *, device: torch.device, streamed: bool = False) -> LoadedModel:
    """Load the base from safetensors or GGUF, pack it where the section asks for it, freeze it, move it to `device`.

    `streamed`: the layers stay on the host, as views into files; the rest goes to `device`.

    A folder stored in bitsandbytes' 4 bits is read as it is: it can be evaluated, though plan refuses to train on it.
    Raises: ModelError for anything that is not a complete model of a family that tunekit knows.
    """
    dtype = resolve_dtype(section, device)
    source = find_source(section, weights=True)
    if section.quantization == "none" and source.gguf_file is None:
        raw = inspection.read_config(source)
        if inspection.is_packed_by_bitsandbytes(raw):
            inspection.find_family(raw, section)
            return load_packed_folder(section, device)
    with parsed_once(section.name_or_path):
        config, family = _read_configuration(source, section)
        if source.gguf_file is None:
            read_headers(source.folder)
        attention = resolve_attention(section, config, device, family.auto_class())
        fingerprint = inspection.fingerprint(source)
        given = (source, section, config, family, dtype, attention)
        if streamed:
            return _load_streamed(*given, device, fingerprint)
        direct = _from_files(*given, device, fingerprint)
        net, notes, sidecar = direct or (*_read_weights(*given), None)
    if direct is None and section.quantization != "none":
        notes += quantize_layers(net, family, section, dtype, device)
    net = net.to(device)
    loaded = _finish(net, family, section, source, dtype, device, fingerprint, notes)
    loaded.sidecar = sidecar
    return loaded


def _load_streamed(
    source: ModelSource,
    section: ModelSection,
    config: Any,
    family: Family,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    fingerprint: str,
) -> LoadedModel:
    """The base with its layers in mapped files."""
    with ModelErrors(section), quiet(), no_fetched_code():
        net, notes, mapped = mapped_net(source, section, config, family, dtype, attention, fingerprint)
    stored = [tensor for _, layer in family.layers(net) for tensor in layer.state_dict(keep_vars=True).values()]
    inside = {id(tensor) for tensor in stored}
    for tensor in [*net.parameters(), *net.buffers()]:
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    loaded = _finish(net, family, section, source, dtype, device, fingerprint, notes)
    loaded.mapped = frozenset(tensor.data_ptr() for tensor in stored) if mapped else frozenset()
    return loaded


def make_meta_model(section: ModelSection, *, device: torch.device) -> LoadedModel:
    """The same modules on the meta device, made from the configuration alone; `device` is the one it is planned for.

    Raises: ModelError as load_model does, but for what only the weights show.
    """
    dtype = resolve_dtype(section, device)
    source = find_source(section, weights=False)
    config, family = _read_configuration(source, section)
    attention = resolve_attention(section, config, device, family.auto_class())
    with ModelErrors(section), quiet(), torch.device("meta"):
        net = family.auto_class().from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=section.trust_remote_code
        )
    notes: list[str] = []
    dense, alone = section.quantization == "none", _can_be_read_alone(net, source, section, dtype)
    headers = _headers(source)  # where there are none yet, suppose what most files are: not aligned
    copied = dense and alone and (not headers or needs_copies(headers, dtype, device))
    if not dense:
        notes += quantize_layers(net, family, section, dtype, torch.device("meta"))
    loaded = _finish(net, family, section, source, dtype, torch.device("meta"), None, notes, planned_for=device)
    loaded.packed_while_read, loaded.copied_while_read = alone and not dense, copied
    return loaded


def _headers(source: ModelSource) -> dict[str, TensorEntry]:
    """Of the files; none where they are not here yet."""
    try:
        return read_headers(source.folder)
    except ModelError:
        return {}


def _can_be_read_alone(net: nn.Module, source: ModelSource, section: ModelSection, dtype: torch.dtype) -> bool:
    """Whether _from_files will read it without transformers; supposed so where the files are not here yet."""
    if source.gguf_file is not None or section.trust_remote_code:
        return False
    try:
        return open_base(net, source.folder, dtype) is not None
    except ModelError:
        return True


def load_packed_folder(section: ModelSection, device: torch.device) -> LoadedModel:
    """A folder of ours whose weights are packed as bitsandbytes packs them, read by transformers."""
    dtype = resolve_dtype(section, device)
    source = find_source(section, weights=True)
    read_headers(source.folder)
    codec.import_bitsandbytes()
    family = make_family(inspection.find_family(inspection.read_config(source), section))
    attention = None if section.attention == "auto" else section.attention
    with ModelErrors(section), quiet():
        net = family.auto_class().from_pretrained(
            str(source.folder),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=section.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
        )
    adopt_packed(net)
    return _finish(net, family, section, source, dtype, device, None, [])


def base_fingerprint(section: ModelSection) -> str:
    """sha256 that tells one base from another; see inspection.fingerprint."""
    return inspection.fingerprint(find_source(section, weights=True))


def _read_configuration(source: ModelSource, section: ModelSection) -> tuple[Any, Family]:
    """The configuration object and the base's family, checked: architecture, stored quantization, remote code."""
    from transformers import AutoConfig

    family = make_family("causal")

    arguments: dict[str, Any] = {"trust_remote_code": section.trust_remote_code, "local_files_only": True}
    if source.gguf_file is not None:
        inspection.check_gguf(source)
        arguments["gguf_file"] = source.gguf_file
    else:
        raw = inspection.read_config(source)
        inspection.check_quantized(raw, section)
        family = make_family(inspection.find_family(raw, section))
    with ModelErrors(section), quiet():
        config = AutoConfig.from_pretrained(str(source.folder), **arguments)
    _check_known(config, family, section)
    config.use_cache = False
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights  # it would name another file than the one that was checked
    return config, family


def _check_known(config: Any, family: Family, section: ModelSection) -> None:
    """Refuse a configuration for which transformers has no model of this family."""
    if type(config) in family.auto_class()._model_mapping or section.trust_remote_code:
        return
    raise ModelError(
        f"{section.name_or_path} ({config.model_type}) is no {family.text} that transformers knows",
        "choose another base, or a newer transformers",
        key="model.name_or_path",
    )


def _read_weights(
    source: ModelSource, section: ModelSection, config: Any, family: Family, dtype: torch.dtype, attention: str
) -> tuple[nn.Module, list[str]]:
    """The net on the CPU in `dtype`. Weights that the checkpoint lacks would be random, so they are refused."""
    arguments = gguf_arguments(source) if source.gguf_file else {"use_safetensors": True}
    with ModelErrors(section), quiet(), no_fetched_code(gguf=source.gguf_file is not None):
        net, loading = family.auto_class().from_pretrained(
            str(source.folder),
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=section.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(
            f"{section.name_or_path} lacks weights that its configuration asks for ({shown})",
            "they would be random; give a complete model",
            key="model.name_or_path",
        )
    unused = sorted(loading["unexpected_keys"])
    return net, [f"{len(unused)} tensors of the base are not used by the model, {unused[0]} for one"] if unused else []


def _from_files(
    source: ModelSource,
    section: ModelSection,
    config: Any,
    family: Family,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    fingerprint: str,
) -> tuple[nn.Module, list[str], Sidecar | None] | None:
    """The net read tensor by tensor, packed or in copies, or mapped as it was packed before; None where only
    transformers can read it, and where transformers maps files that can be used as they are."""
    if source.gguf_file is not None or section.trust_remote_code:
        return None
    dense = section.quantization == "none"
    if dense and not needs_copies(read_headers(source.folder), dtype, device):
        return None
    with ModelErrors(section), quiet(), no_fetched_code():
        net = unfilled_net(family.auto_class(), config, dtype, attention)
        reader = open_base(net, source.folder, dtype)
        if reader is None:
            return None
        load_generation_config(net, source.folder)
    net.config.name_or_path = str(source.folder)
    if dense:
        fill_net(net, reader)
        return net, [], None
    packed = packed_base(net, reader, family, section, dtype, device)
    sidecar, notes = kept_base(packed, source, fingerprint)
    return net, [*packed.notes, *notes], sidecar


def _finish(
    net: nn.Module,
    family: Family,
    section: ModelSection,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    fingerprint: str | None,
    notes: list[str],
    *,
    planned_for: torch.device | None = None,
) -> LoadedModel:
    """Freeze, set eval mode and collect the facts. `planned_for`: the device of a net that lies on meta."""
    net.requires_grad_(False)
    net.eval()
    if family.name == "causal":
        attend_per_document(net, planned_for or device, dtype)
    config: Any = net.config
    config.use_cache = False
    facts = _facts(net, family, section, source, dtype, fingerprint)
    quantization = section.quantization
    return LoadedModel(
        net=net,
        config=config,
        family=family,
        dtype=dtype,
        device=device,
        quantization=quantization,
        double_quantization=facts.double_quantization,
        name_or_path=section.name_or_path,
        revision=source.commit,
        fingerprint=fingerprint,
        facts=facts,
        text=_text_facts(net, family),
        generation_config=getattr(net, "generation_config", None),
        notes=notes,
    )


def _facts(
    net: nn.Module,
    family: Family,
    section: ModelSection,
    source: ModelSource,
    dtype: torch.dtype,
    fingerprint: str | None,
) -> ModelFacts:
    config = text_config(net)
    return ModelFacts(
        name_or_path=section.name_or_path,
        revision=source.commit,
        family=family.name,
        model_type=str(config.model_type),
        dtype=str(dtype).removeprefix("torch."),
        quantization=section.quantization,
        double_quantization=section.double_quantization and section.quantization in ("nf4", "fp4"),
        attention=str(config._attn_implementation),
        total_parameters=element_count(net),
        layers=len(family.layers(net)),
        hidden_size=int(config.hidden_size),
        fingerprint=fingerprint,
    )


def _text_facts(net: nn.Module, family: Family) -> TextFacts:
    config, name = text_config(net), family.embedding_name(net)
    embedding: Any = net.get_submodule(name) if name else None
    positions = getattr(config, "max_position_embeddings", None)
    return TextFacts(
        vocabulary_size=int(embedding.num_embeddings) if embedding is not None else int(config.vocab_size),
        positions=positions if isinstance(positions, int) else None,
    )
