"""Loads a base for layer streaming. The weights remain in files: the net's parameters are views of read-only memory
mappings, which several processes can share."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from tunekit.errors import ModelError, ResourceError
from tunekit.model.base_spec import BaseSpec
from tunekit.model.storage.packed_cache import cached_base
from tunekit.model.storage.packing import PackedBase, layout_of, packed_base, parts_outside
from tunekit.model.storage.reading import ALIGNMENT, BaseReader, open_net, place

STREAMING, SHARDING = "memory.streaming", "memory.sharding"


def mapped_net(spec: BaseSpec, *, sharded: bool = False) -> tuple[nn.Module, list[str], bool]:
    """Load a net on the CPU with mapped weights. Returns the net, notes, and whether the weights are mapped: a small
    base is read into memory instead.

    `sharded`: every tensor stays a view, because no rank keeps a whole tensor.
    Raises: ModelError for a base that only transformers can read; ResourceError if the cache file with the converted
    weights cannot be written.
    """
    key, in_parts = (SHARDING, "sharded") if sharded else (STREAMING, "streamed")
    how = f"write {key}: off"
    if not spec.read_by_us:
        what = (
            f"a base with remote code cannot be {in_parts}: tensors in its files may have other names than in the net"
        )
        raise ModelError(what, how, key=key)
    opened = open_net(spec)
    if opened is None:
        what = f"the weights of {spec.section.name_or_path} have other names or shapes than the net's parameters"
        raise ModelError(f"{what}, so the base cannot be {in_parts}", how, key=key)
    net, reader = opened
    if spec.is_dense and all(map(reader.is_mapped, reader.names)):
        multiplied = (*spec.family.head_modules(net), *parts_outside(net, spec.family))
        _place_views(net, reader, () if sharded else multiplied)
        return net, [], True
    spec = replace(spec, device=torch.device("cpu"))
    if spec.is_dense:  # the files are not in the compute dtype
        base = PackedBase(net, reader, spec, layout=layout_of(net, spec.family, reader.new))
    else:
        base = packed_base(net, reader, spec)
    sidecar, notes = cached_base(base)
    if notes:
        what = f"{key} needs a cache file with the weights in the compute dtype, but {notes[0]}"
        raise ResourceError(what, f"free disk space in the cache folder, set TUNEKIT_CACHE to another folder, or {how}")
    return net, base.notes, sidecar is not None


def _place_views(net: nn.Module, reader: BaseReader, copied: Sequence[str]) -> None:
    """Put views of the files into the net. A matrix in the `copied` modules (the head, and parts that read images) is
    copied if it is not aligned to 64 bytes, because alignment changes the last bit of products. Layers are copied
    later, when they are streamed. Other tensors are not multiplied."""
    head = tuple(f"{name}." for name in copied)
    for name in reader.names:
        view = reader.view(name)
        in_head = any(alias.startswith(head) for alias in reader.aliases(name))
        place(net, reader, name, reader.read(name) if in_head and view.data_ptr() % ALIGNMENT else view)
