"""Reads the tensors of a base one at a time, directly from its safetensors or GGUF files, by their names in the net.

transformers' from_pretrained needs the whole base in memory at once. This module gives the same values, bit for bit.
If that is not certain (unknown tensors, remote code), `open_base` returns None, and from_pretrained is used.
"""

from __future__ import annotations

import copy
import math
import mmap
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from tunekit.contracts import Tensors
from tunekit.files.tensors import TensorEntry, fill_from_file
from tunekit.files.untrusted import MODEL_FILE
from tunekit.model.base_spec import BaseSpec
from tunekit.model.parts import unloaded_parts
from tunekit.model.pretrained import AutoClass, as_pretrained, config_of
from tunekit.model.storage.converted import StoredPieces
from tunekit.model.storage.gguf import GgufFiles, gguf_files
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.source import ModelSource

CHUNK_BYTES = 4 * 2**20  # size of one read, in addition to the target tensor
ALIGNMENT = 64  # alignment of a tensor's first byte, as in torch's own allocations
# Buffers that are now computed but were once stored: if the net has them, transformers ignores the stored ones.
COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


def unfilled_net(auto_class: AutoClass, config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    """Make a net from its configuration, with parameters on the meta device, and with the same buffers as a net of
    from_pretrained.

    Tied parameters are one object. `auto_class`: transformers' class for the family. `config` is not modified.
    """
    with _meta_parameters():
        net = auto_class.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
        keep_float32(net, dtype)
    return net.eval()


def keep_float32(net: nn.Module, dtype: torch.dtype) -> bool:
    """Give the parameters and buffers that the model's code wants in float32, such as a router of experts, this dtype,
    as from_pretrained does. Returns whether there are any."""
    patterns = list(as_pretrained(net)._get_dtype_plan(dtype)) if hasattr(net, "_get_dtype_plan") else []
    if not patterns:
        return False
    wanted = build_glob_alternation(patterns)[0]
    tensors = [tensor for name, tensor in net.state_dict(keep_vars=True).items() if wanted.search(name)]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    return bool(tensors)


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Context manager: every parameter that a module registers moves to the meta device."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter  # keep the object, so that tied parameters stay one
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class MappedFiles:
    """Tensors of a folder's safetensors files, as views of shared read-only mappings or as copies."""

    mapped = True

    def __init__(self, folder: Path, headers: dict[str, TensorEntry]) -> None:
        self.folder, self.headers = folder, headers
        self._maps: dict[str, mmap.mmap] = {}

    def view(self, name: str) -> Tensor:
        """The tensor as a view of its file. Never write to this view: that would crash the process."""
        header = self.headers[name]
        count = math.prod(header.shape)
        if not count:
            return torch.empty(header.shape, dtype=header.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mapping is read-only, which is intended
            mapping, offset = self._map(header.file), header.offset_bytes
            return torch.frombuffer(mapping, dtype=header.dtype, count=count, offset=offset).reshape(header.shape)

    def read_into(self, name: str, target: Tensor, skipped: int = 0) -> None:
        """Copy the stored tensor into `target` (same shape, any strides and dtype). The file is read in small chunks.

        `skipped`: elements of the stored tensor that come before those of `target`.
        """
        header = self.headers[name]
        path = self.folder / header.file
        item_bytes = header.dtype.itemsize
        start = header.offset_bytes + skipped * item_bytes
        with path.open("rb", buffering=0) as file:
            direct = target.dtype == header.dtype and target.is_contiguous() and target.device.type == "cpu"
            if direct:
                fill_from_file(file.fileno(), start, target, path, MODEL_FILE)
                return
            rows = target.view(-1) if target.is_contiguous() else target
            row_elements = math.prod(rows.shape[1:])
            step = max(1, CHUNK_BYTES // max(1, row_elements * item_bytes))
            for first in range(0, rows.shape[0], step):
                part = rows[first : first + step]
                stored = torch.empty(part.shape, dtype=header.dtype)
                offset = start + first * row_elements * item_bytes
                fill_from_file(file.fileno(), offset, stored, path, MODEL_FILE)
                part.copy_(stored)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self.folder / file).open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


class BaseReader:
    """Reads a base's tensors by the names of the net's parameters and persistent buffers. `open_base` makes readers.

    `names`: one name for each tensor, in the net's order. If a tensor is tied, methods also accept its other names.
    """

    def __init__(
        self, net: nn.Module, files: MappedFiles | GgufFiles, groups: dict[str, str], head: Sequence[str] = ()
    ) -> None:
        self.files, self._groups, self._head = files, groups, tuple(f"{name}." for name in head)
        self._tensors: Tensors = dict(net.state_dict(keep_vars=True))
        self.names = tuple(name for name in self._tensors if groups[name] == name)
        self.new: frozenset[str] = frozenset()  # names of the head's tensors that no file contains
        self.new_modules: tuple[str, ...] = ()  # the head's modules that contain these
        self._stored: dict[str, str] = {}  # name -> its name in the files
        self._pieces: dict[str, dict[str, str]] = {}  # name -> piece's name as converted -> its name in the files
        self._joined: dict[str, StoredPieces] = {}

    def aliases(self, name: str) -> list[str]:
        """All names of the tensor in the net."""
        return [other for other, group in self._groups.items() if group == self._groups[name]]

    def shape(self, name: str) -> torch.Size:
        """Shape in the net."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the net: the compute dtype, unless the model's own code sets a different dtype."""
        return self._tensors[name].dtype

    def is_mapped(self, name: str) -> bool:
        """Whether the net can use the file directly: the file contains the tensor in one piece and in the net's
        dtype."""
        name = self._groups[name]
        stored = self._stored.get(name)
        return self.files.mapped and stored is not None and self.files.headers[stored].dtype == self.dtype(name)

    def view(self, name: str) -> Tensor:
        """The tensor in its stored dtype, as a view of a shared read-only mapping. Never write to this view.

        A tensor that the files store in pieces is copied instead.
        """
        name = self._groups[name]
        if name in self._stored:
            return self.files.view(self._stored[name])
        dtypes = {self.files.headers[stored].dtype for stored in self._pieces[name].values()}
        return self.read(name, dtypes.pop() if len(dtypes) == 1 else torch.float32)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous copy in `dtype` (None: the net's dtype), read without mapping the file."""
        target = torch.empty(self.shape(name), dtype=dtype or self.dtype(name))
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy the tensor into `target`, which has the same shape, and any strides and floating-point dtype."""
        name = self._groups[name]
        if name in self._stored:
            self.files.read_into(self._stored[name], target)
            return
        for piece, part in (self._joined[name].views(target) or {}).items():
            self.files.read_into(self._pieces[name][piece], part)

    def parts(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The elements of the tensor in order, as copies (elements,) of at most CHUNK_BYTES each. A tensor that is
        stored in pieces, or in GGUF blocks, comes as one part."""
        stored = self._stored.get(self._groups[name])
        if stored is None or not isinstance(self.files, MappedFiles):
            yield self.read(name, dtype).view(-1)
            return
        count, step = self.shape(name).numel(), CHUNK_BYTES // dtype.itemsize
        for first in range(0, max(count, 1), step):
            part = torch.empty(min(step, count - first), dtype=dtype)
            self.files.read_into(stored, part, first)
            yield part

    def blocks(self, name: str) -> Tensor:
        """The quantized blocks of a matrix in a GGUF file, (O, bytes) uint8."""
        assert isinstance(self.files, GgufFiles)
        return self.files.blocks(self._stored[self._groups[name]])

    def _find(self, net: nn.Module) -> bool:
        """Find the stored tensor for every name. Returns whether the files contain exactly the tensors of the net, in
        the same shapes."""
        stored_names = _StoredNames(net, self.files.headers)
        tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in self._tensors.items()}
        as_stored = {id(tensor): name for name, tensor in revert_weight_conversion(net, tensors).items()}
        for name, tensor in tensors.items():
            stored = as_stored.get(id(tensor))
            if stored is None:
                self._find_pieces(net, name, stored_names)
            elif (file_name := stored_names.take(stored, tuple(tensor.shape))) is not None:
                group = self._groups[name]
                if group in self._stored and not torch.equal(self.files.view(file_name), self.view(group)):
                    return False  # transformers does not tie tensors that the files store with different numbers
                self._stored.setdefault(group, file_name)
        covered = self._stored.keys() | self._pieces.keys()
        if self._head:  # the files may lack the head, or contain another one
            self.new = frozenset(name for name in set(self.names) - covered if name.startswith(self._head))
            self.names = tuple(name for name in self.names if name not in self.new)
            self.new_modules = _modules_of(self._head, self.new)
        unknown = [] if self._head or unloaded_parts(net) else stored_names.unknown(net)
        return not stored_names.ambiguous and covered == set(self.names) and not unknown

    def _find_pieces(self, net: nn.Module, name: str, stored_names: _StoredNames) -> None:
        """Find the pieces of a parameter that the files store in several pieces. Nothing is recorded if a piece is
        missing."""
        pieces = StoredPieces(net, name, stored_names.all_forms)
        parts = pieces.views(torch.empty(pieces.shape, device="meta")) if pieces.names else None
        if parts is None:
            return
        file_names = {piece: stored_names.take(piece, tuple(part.shape)) for piece, part in parts.items()}
        if all(file_names.values()):
            self._pieces[name] = {piece: str(stored) for piece, stored in file_names.items()}
            self._joined[name] = pieces


class _StoredNames:
    """Finds stored tensors by their names in the net. The stored names may have or lack the base model's prefix."""

    def __init__(self, net: nn.Module, headers: dict[str, TensorEntry]) -> None:
        self._headers, self._prefix = headers, str(getattr(net, "base_model_prefix", ""))
        self._left = set(headers)
        self.ambiguous = False
        forms = [self._forms(name) for name in headers]
        self.all_forms = frozenset(form for name_forms in forms for form in name_forms)

    def _forms(self, name: str) -> list[str]:
        """Three forms of a name: unchanged, with the prefix, and without it."""
        if not self._prefix:
            return [name]
        return [name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]

    def take(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The stored name of the tensor with this name and shape, which then counts as used; None if there is none."""
        names = {form for form in self._forms(name) if form in self._headers}
        self.ambiguous |= len(names) > 1
        match = next((form for form in names if self._headers[form].shape == shape), None)
        self._left.discard(match or "")
        return match

    def unknown(self, net: nn.Module) -> list[str]:
        """Stored tensors that the net lacks and that transformers would not silently ignore."""
        skipped = list(getattr(net, "_keys_to_ignore_on_load_unexpected", None) or ())
        buffers = [name for name, _ in net.named_buffers()]
        skipped += [pattern for ending, pattern in COMPUTED.items() if any(name.endswith(ending) for name in buffers)]
        return sorted(name for name in self._left if not any(re.search(pattern, name) for pattern in skipped))


def _modules_of(heads: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those modules that contain one of the tensors `names`. `heads`: the names of the modules, each with a final
    dot."""
    return tuple(head.removesuffix(".") for head in heads if any(name.startswith(head) for name in names))


def missing_modules(net: nn.Module, headers: dict[str, TensorEntry], modules: Iterable[str]) -> tuple[str, ...]:
    """Those `modules` for which a tensor is missing in the files, or has a different shape there than in the net."""
    stored, tensors = _StoredNames(net, headers), net.state_dict(keep_vars=True)
    absent = [name for name, tensor in tensors.items() if stored.take(name, tuple(tensor.shape)) is None]
    return _modules_of([f"{name}." for name in modules], absent)


def needs_copies(headers: Mapping[str, TensorEntry], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tensor must be copied from its mapped file: its dtype is not the compute dtype, or, on a CPU, it is not
    aligned to 64 bytes. Alignment changes the last bit of products of single rows."""
    return any(
        (header.dtype.is_floating_point and header.dtype != dtype)
        or (device.type == "cpu" and header.offset_bytes % ALIGNMENT != 0)
        for header in headers.values()
    )


def open_base(net: nn.Module, source: ModelSource, dtype: torch.dtype, head: Sequence[str] = ()) -> BaseReader | None:
    """Make a reader that can fill a net of `unfilled_net` from the base in `source`. None if the values might differ
    from the values that from_pretrained reads.

    `head`: names of the head's modules, which the files may lack.
    Raises: ModelError for damaged or missing files.
    """
    if source.gguf_file is not None and keep_float32(net, dtype):
        return None
    if not type(net).__module__.startswith("transformers."):
        return None
    first: dict[int, str] = {}
    groups = {name: first.setdefault(id(tensor), name) for name, tensor in net.state_dict(keep_vars=True).items()}
    if source.gguf_file is None:
        files: MappedFiles | GgufFiles | None = MappedFiles(source.folder, read_headers(source.folder))
    else:
        files = gguf_files(source, net)
    reader = None if files is None else BaseReader(net, files, groups, head)
    return reader if reader is not None and reader._find(net) else None


def open_net(spec: BaseSpec) -> tuple[nn.Module, BaseReader] | None:
    """The net of `unfilled_net`, and its reader from `open_base`; None if there is no reader."""
    folder = spec.source.folder
    net = unfilled_net(spec.family.auto_class(), spec.config, spec.dtype, spec.attention)
    exact = spec.family.exact_head(net)
    if exact is not None:
        net.get_submodule(exact).float()
    spec.family.leave_out(net)
    reader = open_base(net, spec.source, spec.dtype, spec.family.new_head(spec.section, net))
    if reader is None:
        return None
    load_generation_config(net, folder)
    config_of(net).name_or_path = str(folder)
    return net, reader


def place(net: nn.Module, reader: BaseReader, name: str, tensor: Tensor) -> None:
    """Put `tensor` into the net as the tensor `name`, also under the names of modules that are tied to it. Parameters
    are frozen."""
    holder: dict[str, nn.Parameter] = {}
    for alias in reader.aliases(name):
        path, _, attribute = alias.rpartition(".")
        module = net.get_submodule(path)
        if attribute in module._parameters:
            module._parameters[attribute] = holder.setdefault("parameter", nn.Parameter(tensor, requires_grad=False))
        elif attribute in module._buffers:  # else a layer that is packed now
            module._buffers[attribute] = tensor


def fill_net(net: nn.Module, reader: BaseReader) -> None:
    """Fill every parameter and persistent buffer with a copy of the stored values, aligned to 64 bytes."""
    for name in reader.names:
        place(net, reader, name, reader.read(name))


def load_generation_config(net: nn.Module, folder: Path) -> None:
    """Give the net the generation settings that from_pretrained would use. They come from generation_config.json, or
    else from config.json, or else (for a GGUF file) from the net's configuration."""
    from transformers import GenerationConfig

    pretrained = as_pretrained(net)
    if not pretrained.can_generate():
        return
    try:
        pretrained.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except OSError:
        with suppress(OSError, TypeError):  # no such file
            pretrained.generation_config = GenerationConfig.from_pretrained(
                str(folder), config_file_name="config.json", _from_model_config=True, local_files_only=True
            )
