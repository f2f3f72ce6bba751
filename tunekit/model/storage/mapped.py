"""Loads a base for layer streaming. The weights stay in files: the net's parameters are views of a shared read-only
mapping."""

from dataclasses import replace

import torch
from torch import nn

from tunekit.errors import ModelError, ResourceError
from tunekit.model.base_spec import BaseSpec
from tunekit.model.families import Family
from tunekit.model.storage.packed_cache import cached_base
from tunekit.model.storage.packing import PackedBase, layout_of, packed_base
from tunekit.model.storage.reading import ALIGNMENT, BaseReader, open_net, place

HOW = "write memory.streaming: off"
KEY = "memory.streaming"


def mapped_net(spec: BaseSpec) -> tuple[nn.Module, list[str], bool]:
    """The net on the CPU, notes, and whether the weights are mapped. A small base is read into memory instead.

    Raises: ModelError for a base that only transformers can read; ResourceError if the file of converted weights cannot
    be written.
    """
    if not spec.read_by_us:
        what = "a base with remote code cannot be streamed: its tensors have other names than the net's"
        raise ModelError(what, HOW, key=KEY)
    opened = open_net(spec)
    if opened is None:
        what = f"{spec.section.name_or_path} stores its weights under other names or shapes than the net"
        raise ModelError(f"{what}, so it cannot be streamed", HOW, key=KEY)
    net, reader = opened
    if spec.is_dense and all(map(reader.is_mapped, reader.names)):
        _place_views(net, reader, spec.family)
        return net, [], True
    spec = replace(spec, device=torch.device("cpu"))
    if spec.is_dense:  # the files are not in the compute dtype
        base = PackedBase(net, reader, spec, layout=layout_of(net, spec.family, reader.new))
    else:
        base = packed_base(net, reader, spec)
    sidecar, notes = cached_base(base)
    if notes:
        what = f"a streamed base needs a file with its weights in the compute dtype, but {notes[0]}"
        raise ResourceError(what, f"free space in the cache folder (TUNEKIT_CACHE names another), or {HOW}")
    return net, base.notes, sidecar is not None


def _place_views(net: nn.Module, reader: BaseReader, family: Family) -> None:
    """Put views of the files into the net. A head that is not aligned to 64 bytes is copied, because products depend on
    alignment. Layers are copied later, when they are streamed, and other tensors are not multiplied."""
    head = tuple(f"{name}." for name in family.head_modules(net))
    for name in reader.names:
        view = reader.view(name)
        in_head = any(alias.startswith(head) for alias in reader.aliases(name))
        place(net, reader, name, reader.read(name) if in_head and view.data_ptr() % ALIGNMENT else view)
