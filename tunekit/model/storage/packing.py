"""Packs (quantizes) a base while it is loaded, one tensor at a time, and defines the order of its tensors in the cache
file."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.errors import ModelError, listed
from tunekit.machine.malloc import trim_heap
from tunekit.model.base_spec import BaseSpec
from tunekit.model.families import Family
from tunekit.model.families.structure import base_name
from tunekit.model.parts import is_composite, outer_parts
from tunekit.model.quantized.weights import PackedLinear, layer_kind, pack_linear, pack_matrix, packed_layers
from tunekit.model.storage.gguf import FileBlocks
from tunekit.model.storage.reading import BaseReader, place
from tunekit.model.storage.sidecar import Sidecar, StoredTensor
from tunekit.model.uncalled import uncalled_layers
from tunekit.recipe.model import ModelSection


def quantize_layers(net: nn.Module, spec: BaseSpec, device: torch.device, new_modules: Sequence[str] = ()) -> list[str]:
    """Quantize every linear layer except the head. This is done one layer at a time, so that only one layer is in
    memory twice. Returns notes."""
    section, dense_layers = spec.section, list[str]()
    file_blocks = FileBlocks(spec.source, net) if section.quantization == "kept" else None
    for name in packable_layers(net, spec.family, new_modules):
        dense = net.get_submodule(name)
        packed: nn.Module | None
        if file_blocks is None:
            packed = pack_linear(dense, section.quantization, section.double_quantization, spec.dtype)
        else:
            packed = file_blocks.layer(name, dense, spec.dtype)
        if packed is None:
            dense_layers.append(name)
        else:
            net.set_submodule(name, packed.to(device))
        del dense
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()  # a view would keep the whole file mapped
    gc.collect()
    trim_heap()
    if not packed_layers(net):
        what = (
            "the file has no blocks that tunekit can read"
            if file_blocks
            else "the model has no linear layer to quantize"
        )
        raise ModelError(what, "write quantization: none", key="model.quantization")
    notes = [f"{len(dense_layers)} layers stay dense ({listed(dense_layers, 2)}): the file has no blocks for them"]
    return [*(notes if dense_layers else []), *_left_dense(net, section, parts_outside(net, spec.family))]


def packable_layers(net: nn.Module, family: Family, new_modules: Sequence[str] = ()) -> list[str]:
    """Names of the layers to quantize: all linear layers except layers of the head, layers in new modules (which are
    trained), layers outside of a composite model's language model, layers whose matrix the model's code uses without
    calling the layer, and layers that transformers keeps in float32. It never packs these, such as T5's `wo`, whose
    products overflow in float16."""
    outside = parts_outside(net, family)
    head = tuple(f"{name}." for name in (*family.head_modules(net), *new_modules, *outside))
    modules = dict(net.named_modules())
    uncalled, exact = uncalled_layers(modules), getattr(net, "_keep_in_fp32_modules", None) or ()
    names = [name for name, module in modules.items() if layer_kind(module) in ("linear", "conv1d")]
    names = [name for name in names if not any(f".{part}." in f".{name}." for part in exact)]
    return [name for name in names if name not in uncalled and not f"{name}.".startswith(head)]


def parts_outside(net: nn.Module, family: Family) -> list[str]:
    """The parts of a composite model outside its language model, which stay dense."""
    return outer_parts(net, base_name(net), family.head_name(net)) if is_composite(net) else []


def _left_dense(net: nn.Module, section: ModelSection, outside: Sequence[str]) -> list[str]:
    """Notes about large weights that stay dense: fused experts, which are not linear layers. Convolutions are small and
    get no note."""
    kernels = {id(module.weight) for module in net.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    parts = tuple(f"{name}." for name in outside)
    named = [(name, tensor) for name, tensor in net.named_parameters() if not name.startswith(parts)]
    fused = [tensor for _, tensor in named if tensor.dim() >= 3 and id(tensor) not in kernels]
    if not fused:
        return []
    count = sum(parameter.numel() for parameter in fused)
    return [f"{count} parameters of fused experts are not quantized: {section.quantization} packs only linear layers"]


@dataclass
class PackedBase:
    """A base that will be packed. Its parameters are on the meta device until `fill` or `map` is called.

    `layout`: the order of all tensors in the cache file: first the tensors outside the layers, then layer by layer.
    """

    net: nn.Module
    reader: BaseReader
    spec: BaseSpec
    notes: list[str] = field(default_factory=list)
    layout: list[StoredTensor] = field(default_factory=list)
    transposed: frozenset[str] = frozenset()  # packed layers that store (I, O)

    def iterate_tensors(self, *, in_parts: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors in the order of `layout`. Each tensor is read and packed only when it is requested.

        `in_parts`: a tensor that is not packed comes as several consecutive parts (elements,).
        """
        layers = packed_layers(self.net)
        packed: Tensors = {}
        for entry in self.layout:
            module_name, _, tensor_name = entry.name.rpartition(".")
            layer = layers.get(module_name)
            if layer is None or tensor_name not in layer.tensor_names:
                read = (entry.name, entry.dtype)
                parts = self.reader.parts(*read) if in_parts else [self.reader.read(*read)]
                yield from ((entry.name, part) for part in parts)
                continue
            if tensor_name not in packed:
                packed = self._pack(module_name, layer.out_features, layer.in_features)
            yield entry.name, packed.pop(tensor_name)

    def _pack(self, name: str, out_features: int, in_features: int) -> Tensors:
        """Read and pack the matrix of one layer. Returns its packed tensors."""
        section = self.spec.section
        if section.quantization == "kept":
            return {"packed": self.reader.blocks(f"{name}.weight").to(self.spec.device)}
        matrix = torch.empty(out_features, in_features, dtype=self.spec.dtype)
        self.reader.read_into(f"{name}.weight", matrix.t() if name in self.transposed else matrix)
        packed = pack_matrix(matrix, section.quantization, section.double_quantization)
        return {own: tensor.to(self.spec.device) for own, tensor in packed.items()}

    def fill(self) -> None:
        """Load every tensor into memory."""
        for name, tensor in self.iterate_tensors():
            self._put(name, tensor)

    def map(self, sidecar: Sidecar) -> None:
        """Make every tensor a view of the cache file."""
        for name in sidecar.names:
            self._put(name, sidecar.view(name))

    def _put(self, name: str, tensor: Tensor) -> None:
        module_name, _, tensor_name = name.rpartition(".")
        module = self.net.get_submodule(module_name)
        if isinstance(module, PackedLinear) and tensor_name in module.tensor_names:
            setattr(module, tensor_name, tensor)
        else:
            place(self.net, self.reader, name, tensor)


def packed_base(net: nn.Module, reader: BaseReader, spec: BaseSpec) -> PackedBase:
    """Prepare a net on the meta device for packing. Later, `reader` reads the tensors, which are then packed and moved
    to the base's device."""
    kinds = {
        name: layer_kind(net.get_submodule(name)) for name in packable_layers(net, spec.family, reader.new_modules)
    }
    notes = quantize_layers(net, spec, torch.device("meta"), reader.new_modules)
    transposed = frozenset(name for name, kind in kinds.items() if kind == "conv1d")
    return PackedBase(net, reader, spec, notes, layout_of(net, spec.family, reader.new), transposed)


def layout_of(net: nn.Module, family: Family, new: frozenset[str]) -> list[StoredTensor]:
    """The order of all parameters and persistent buffers in the cache file: first the tensors outside the layers, then
    layer by layer. `new`: names to leave out, because no file contains them."""
    layers = {name: index for index, (name, _) in enumerate(family.layers(net))}
    tensors: dict[int, StoredTensor] = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        layer = next((entry for entry in layers if name.startswith(f"{entry}.")), "")
        if name not in new:
            tensors.setdefault(id(tensor), StoredTensor(name, tuple(tensor.shape), tensor.dtype, layer))
    return sorted(tensors.values(), key=lambda entry: layers.get(entry.layer, -1))
