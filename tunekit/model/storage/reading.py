"""A base read by the names of its net, one tensor at a time, straight from the safetensors files.

transformers' from_pretrained holds a whole base at once. What is read here is bit for bit what it would give: where
that is not certain (renamed or unknown tensors, code of the model's own), `open_base` gives None and it stays in use.
"""

from __future__ import annotations

import copy
import math
import mmap
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from tunekit.contracts import Tensors
from tunekit.files.tensors import TensorEntry, fill_from_file
from tunekit.files.untrusted import MODEL_FILE
from tunekit.model.base_spec import BaseSpec
from tunekit.model.pretrained import AutoClass, as_pretrained, config_of
from tunekit.model.storage.converted import StoredPieces
from tunekit.model.storage.shards import read_headers

CHUNK_BYTES = 4 * 2**20  # of a file, held beside the tensor that is read
ALIGNMENT = 64  # of a tensor's first byte, as torch's own are
# Once stored, now computed buffers: where the net has such, transformers skips what the files hold of them.
COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


def unfilled_net(auto_class: AutoClass, config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    """The net of a configuration with its parameters on the meta device and its buffers as from_pretrained makes them.

    Tied parameters are one object.  `auto_class`: transformers' class for the family.  `config` is left as it is.
    """
    with _meta_parameters():
        net = auto_class.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    return net.eval()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Every parameter that a module registers inside the block moves to the meta device at once."""

    def without_values(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter  # the object itself: tied parameters stay one
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_values)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class MappedFiles:
    """Tensors of a folder's safetensors files: views into shared read-only mappings, or read without mapping a page."""

    def __init__(self, folder: Path, headers: dict[str, TensorEntry]) -> None:
        self.folder, self.headers = folder, headers
        self._maps: dict[str, mmap.mmap] = {}

    def view(self, name: str) -> Tensor:
        """The stored tensor as it lies in the file. Nothing may write into it: that would end the process."""
        header = self.headers[name]
        count = math.prod(header.shape)
        if not count:
            return torch.empty(header.shape, dtype=header.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mapping cannot be written to, which is intended
            mapping, offset = self._map(header.file), header.offset_bytes
            return torch.frombuffer(mapping, dtype=header.dtype, count=count, offset=offset).reshape(header.shape)

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy the stored tensor into `target` (same shape, any strides and dtype), a piece of the file at a time."""
        header = self.headers[name]
        path = self.folder / header.file
        item_bytes = header.dtype.itemsize
        with path.open("rb", buffering=0) as file:
            direct = target.dtype == header.dtype and target.is_contiguous() and target.device.type == "cpu"
            if direct:
                fill_from_file(file.fileno(), header.offset_bytes, target, path, MODEL_FILE)
                return
            rows = target.view(-1) if target.is_contiguous() else target
            row_elements = math.prod(rows.shape[1:])
            step = max(1, CHUNK_BYTES // max(1, row_elements * item_bytes))
            for first in range(0, rows.shape[0], step):
                part = rows[first : first + step]
                stored = torch.empty(part.shape, dtype=header.dtype)
                offset = header.offset_bytes + first * row_elements * item_bytes
                fill_from_file(file.fileno(), offset, stored, path, MODEL_FILE)
                part.copy_(stored)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self.folder / file).open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


class BaseReader:
    """A base by the names of its net's parameters and persistent buffers.

    `names`: each tensor once, in the net's order; of tied ones the first name.  Every method takes those names and
    the others of a tied tensor.  Made by `open_base`.
    """

    def __init__(self, net: nn.Module, files: MappedFiles, groups: dict[str, str], head: Sequence[str] = ()) -> None:
        self.files, self._groups, self._head = files, groups, tuple(f"{name}." for name in head)
        self._tensors: Tensors = dict(net.state_dict(keep_vars=True))
        self.names = tuple(name for name in self._tensors if groups[name] == name)
        self.new: frozenset[str] = frozenset()  # of a head, names that no file holds
        self.new_modules: tuple[str, ...] = ()  # of a head, the modules that have these
        self._stored: dict[str, str] = {}  # name -> its name in the files
        self._pieces: dict[str, dict[str, str]] = {}  # name -> piece's name as converted -> its name in the files
        self._joined: dict[str, StoredPieces] = {}

    def aliases(self, name: str) -> list[str]:
        """Every name of the tensor in the net."""
        return [other for other, group in self._groups.items() if group == self._groups[name]]

    def shape(self, name: str) -> torch.Size:
        """Shape in the net."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the net: the computation's, but for what the model itself keeps in another."""
        return self._tensors[name].dtype

    def is_mapped(self, name: str) -> bool:
        """Whether `view` gives the file itself: the tensor is stored as one, in the dtype that the net has."""
        name = self._groups[name]
        return name in self._stored and self.files.headers[self._stored[name]].dtype == self.dtype(name)

    def view(self, name: str) -> Tensor:
        """The tensor in its stored dtype, as it lies in a shared read-only mapping of its file: never write into it.

        Of a tensor that is stored in pieces, a copy joined of them.
        """
        name = self._groups[name]
        if name in self._stored:
            return self.files.view(self._stored[name])
        dtypes = {self.files.headers[stored].dtype for stored in self._pieces[name].values()}
        return self.read(name, dtypes.pop() if len(dtypes) == 1 else torch.float32)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of its own in `dtype` (None: the net's), contiguous; no page of the file is mapped for it."""
        target = torch.empty(self.shape(name), dtype=dtype or self.dtype(name))
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy the tensor into `target`, of its shape but any strides and floating dtype."""
        name = self._groups[name]
        if name in self._stored:
            self.files.read_into(self._stored[name], target)
            return
        for piece, part in (self._joined[name].places(target) or {}).items():
            self.files.read_into(self._pieces[name][piece], part)

    def _find(self, net: nn.Module) -> bool:
        """Match names with the files; whether each tensor of the net is there, in its shape, and nothing else."""
        found = _StoredNames(net, self.files.headers)
        whole = {name: torch.empty(tensor.shape, device="meta") for name, tensor in self._tensors.items()}
        as_stored = {id(tensor): name for name, tensor in revert_weight_conversion(net, whole).items()}
        for name, tensor in whole.items():
            stored = as_stored.get(id(tensor))
            if stored is None:
                self._find_pieces(net, name, found)
            elif (inside := found.take(stored, tuple(tensor.shape))) is not None:
                group = self._groups[name]
                if group in self._stored and not torch.equal(self.files.view(inside), self.view(group)):
                    return False  # transformers does not tie what the files hold twice with other numbers
                self._stored.setdefault(group, inside)
        covered = self._stored.keys() | self._pieces.keys()
        if self._head:  # which the files need not hold, and may hold another one in its place
            self.new = frozenset(name for name in set(self.names) - covered if name.startswith(self._head))
            self.names = tuple(name for name in self.names if name not in self.new)
            self.new_modules = _with_any(self._head, self.new)
        unknown = [] if self._head else found.unknown(net)
        return not found.ambiguous and covered == set(self.names) and not unknown

    def _find_pieces(self, net: nn.Module, name: str, found: _StoredNames) -> None:
        """Note a parameter that the files hold in pieces."""
        pieces = StoredPieces(net, name, found.every_form)
        parts = pieces.places(torch.empty(pieces.shape, device="meta")) if pieces.names else None
        if parts is None:
            return
        inside = {piece: found.take(piece, tuple(part.shape)) for piece, part in parts.items()}
        if all(inside.values()):
            self._pieces[name] = {piece: str(stored) for piece, stored in inside.items()}
            self._joined[name] = pieces


class _StoredNames:
    """The files' names, which may leave out the base model's prefix or have it where the net does not."""

    def __init__(self, net: nn.Module, headers: dict[str, TensorEntry]) -> None:
        self._headers, self._prefix = headers, str(getattr(net, "base_model_prefix", ""))
        self._left = set(headers)
        self.ambiguous = False
        forms = [self._forms(name) for name in headers]
        self.every_form = frozenset(form for each in forms for form in each)

    def _forms(self, name: str) -> list[str]:
        """The name itself, with the prefix, and without it."""
        if not self._prefix:
            return [name]
        return [name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]

    def take(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The one stored tensor of this name and shape; None where there is none."""
        names = {form for form in self._forms(name) if form in self._headers}
        self.ambiguous |= len(names) > 1
        found = next((form for form in names if self._headers[form].shape == shape), None)
        self._left.discard(found or "")
        return found

    def unknown(self, net: nn.Module) -> list[str]:
        """Stored tensors that the net does not have, and that transformers would not pass over in silence."""
        skipped = list(getattr(net, "_keys_to_ignore_on_load_unexpected", None) or ())
        buffers = [name for name, _ in net.named_buffers()]
        skipped += [pattern for ending, pattern in COMPUTED.items() if any(name.endswith(ending) for name in buffers)]
        return sorted(name for name in self._left if not any(re.search(pattern, name) for pattern in skipped))


def _with_any(heads: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules, each with a dot at its end, in which one of these tensors is."""
    return tuple(head.removesuffix(".") for head in heads if any(name.startswith(head) for name in names))


def missing_modules(net: nn.Module, headers: dict[str, TensorEntry], modules: Iterable[str]) -> tuple[str, ...]:
    """Those of the modules of which the files hold no tensor, or not all of them in the net's shapes."""
    stored, tensors = _StoredNames(net, headers), net.state_dict(keep_vars=True)
    absent = [name for name, tensor in tensors.items() if stored.take(name, tuple(tensor.shape)) is None]
    return _with_any([f"{name}." for name in modules], absent)


def needs_copies(headers: Mapping[str, TensorEntry], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some tensor cannot be used as it lies in its mapped file: it has another dtype than the computation, or,
    on a CPU, does not begin at a multiple of 64 bytes: products of single rows depend on that in their last bit."""
    return any(
        (header.dtype.is_floating_point and header.dtype != dtype)
        or (device.type == "cpu" and header.offset_bytes % ALIGNMENT != 0)
        for header in headers.values()
    )


def open_base(net: nn.Module, folder: Path, dtype: torch.dtype, head: Sequence[str] = ()) -> BaseReader | None:
    """A reader of the base in `folder` for a net of `unfilled_net`; None where it might not equal from_pretrained.

    `head`: names of the modules of a head that the files need not hold.

    Raises: ModelError for files that are damaged or missing.
    """
    strict, kept = (getattr(net, name, None) for name in ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"))
    if (strict and dtype != torch.float32) or (kept and dtype == torch.float16):
        return None
    if not type(net).__module__.startswith("transformers."):
        return None
    first: dict[int, str] = {}
    groups = {name: first.setdefault(id(tensor), name) for name, tensor in net.state_dict(keep_vars=True).items()}
    reader = BaseReader(net, MappedFiles(folder, read_headers(folder)), groups, head)
    return reader if reader._find(net) else None


def open_net(spec: BaseSpec) -> tuple[nn.Module, BaseReader] | None:
    """The net of `unfilled_net`, and the reader that `open_base` gives for it; None where that gives none."""
    folder = spec.source.folder
    net = unfilled_net(spec.family.auto_class(), spec.config, spec.dtype, spec.attention)
    reader = open_base(net, folder, spec.dtype, spec.family.new_head(spec.section, net))
    if reader is None:
        return None
    load_generation_config(net, folder)
    config_of(net).name_or_path = str(folder)
    return net, reader


def place(net: nn.Module, reader: BaseReader, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the net has `name`, under all its names; parameters become frozen ones."""
    holder: dict[str, nn.Parameter] = {}
    for alias in reader.aliases(name):
        path, _, own = alias.rpartition(".")
        module = net.get_submodule(path)
        if own in module._parameters:
            module._parameters[own] = holder.setdefault("parameter", nn.Parameter(tensor, requires_grad=False))
        elif own in module._buffers:  # else a layer that is packed now
            module._buffers[own] = tensor


def fill_net(net: nn.Module, reader: BaseReader) -> None:
    """Give every parameter and persistent buffer its values: copies of their own, each at a multiple of 64 bytes."""
    for name in reader.names:
        place(net, reader, name, reader.read(name))


def load_generation_config(net: nn.Module, folder: Path) -> None:
    """The generation settings that from_pretrained finds: generation_config.json, else what config.json says."""
    from transformers import GenerationConfig

    own = as_pretrained(net)
    if not own.can_generate():
        return
    try:
        own.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except OSError:
        own.generation_config = GenerationConfig.from_pretrained(
            str(folder), config_file_name="config.json", _from_model_config=True, local_files_only=True
        )
