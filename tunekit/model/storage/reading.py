"""Reads the tensors of a base one at a time, directly from its safetensors or GGUF files, by their names in the net.

transformers' from_pretrained needs the whole base in memory at once. This module gives the same values, bit for bit.
If that is not certain (unknown tensors, remote code), `open_base` returns None, and from_pretrained is used.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from tunekit.contracts import Tensors
from tunekit.errors import ModelError, listed
from tunekit.files.tensors import TensorEntry
from tunekit.model.base_spec import BaseSpec
from tunekit.model.parts import parts_apart
from tunekit.model.pretrained import AutoClass, as_pretrained, config_of
from tunekit.model.storage.converted import StoredPieces
from tunekit.model.storage.gguf import GgufFiles, gguf_files
from tunekit.model.storage.mapped_files import CHUNK_BYTES, MappedFiles
from tunekit.model.storage.quantized_files import AGAIN, QuantizedFiles
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.source import ModelSource

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
        self._unknown: list[str] = []  # stored names that the net lacks
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
        stored in pieces or quantized comes as one part."""
        stored = self._stored.get(self._groups[name])
        if stored is None or not isinstance(self.files, MappedFiles) or not self.files.mapped:
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
        self._unknown = [] if self._head or parts_apart(net) else stored_names.unknown(net)
        return not stored_names.ambiguous and covered == set(self.names) and not self._unknown

    def obstacle(self) -> str:
        """Why `_find` failed."""
        absent = [name for name in self.names if name not in self._stored and name not in self._pieces]
        if absent:
            return f"they lack {listed(absent, 2)}, or have another shape for it"
        if self._unknown:
            return f"the model has no tensor {listed(self._unknown, 2)}"
        return "they store a tensor twice, under two names of the model"

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


def needs_copies(files: MappedFiles, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tensor must be copied from its mapped file: it is quantized, its dtype is not the compute dtype, or, on
    a CPU, it is not aligned to 64 bytes. Alignment changes the last bit of products of single rows."""
    return not files.mapped or any(
        (header.dtype.is_floating_point and header.dtype != dtype)
        or (device.type == "cpu" and header.offset_bytes % ALIGNMENT != 0)
        for header in files.headers.values()
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
        files: MappedFiles | GgufFiles | None = open_weights(source.folder)
    else:
        files = gguf_files(source, net)
    reader = None if files is None else BaseReader(net, files, groups, head)
    if reader is None or reader._find(net):
        return reader
    if isinstance(files, QuantizedFiles):  # transformers would read other numbers
        raise ModelError(f"the files do not fit config.json: {reader.obstacle()}", AGAIN, file=str(source.folder))
    return None


def open_net(spec: BaseSpec) -> tuple[nn.Module, BaseReader] | None:
    """The net of `unfilled_net`, and its reader from `open_base`; None if there is no reader."""
    folder = spec.source.folder
    net = unfilled_net(spec.family.auto_class(), spec.config, spec.dtype, spec.attention)
    exact = spec.family.exact_head(net)
    if exact is not None:
        net.get_submodule(exact).float()
    spec.family.leave_out(net, spec.section)
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
        before = getattr(module, attribute, None)
        if isinstance(before, nn.Parameter):
            setattr(module, attribute, holder.setdefault("parameter", nn.Parameter(tensor, requires_grad=False)))
        elif isinstance(before, Tensor):  # else a layer that is packed now
            setattr(module, attribute, tensor)


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
