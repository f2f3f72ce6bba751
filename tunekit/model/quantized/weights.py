"""The interface to dense and packed matrices. A Weight reads and replaces a layer's matrix, so that other modules need
not know how the matrix is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.errors import ModelError
from tunekit.model.call import current_call
from tunekit.model.quantized import codec, fp8
from tunekit.model.uncalled import returns_several

OUTLIER_THRESHOLD = 6.0  # LLM.int8: inputs of this magnitude or more are multiplied in 16 bit

ROUNDS_INPUTS = ("int8", "fp8")


class UnpackedMatrices:
    """A cache of unpacked matrices. Use it only while no packed tensor changes, and do not modify its matrices."""

    def __init__(self) -> None:
        self._cache: dict[tuple[int, torch.dtype], Tensor] | None = None

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Context manager: unpack each matrix only once, and use it for all products in the block, also of several
        runs."""
        self._cache = {}
        try:
            yield
        finally:
            self._cache = None

    def of(self, layer: PackedLinear, dtype: torch.dtype) -> Tensor:
        """The unpacked matrix (O, I) of a layer. Copies of the layer in other nets share its packed tensors, so they
        also share the cached matrix."""
        if self._cache is None:
            return layer.dequantize(dtype)
        key = id(layer.get_buffer(layer.tensor_names[0])), dtype
        if key not in self._cache:
            self._cache[key] = layer.dequantize(dtype)
        return self._cache[key]


UNPACKED = UnpackedMatrices()


class NoMatrix:
    """Replaces `weight` in a packed layer, for models whose code reads `weight.dtype` (T5, Hunyuan's router)."""

    dtype = None


class PackedLinear(nn.Module):
    """Linear layer with a packed matrix: y = x W^T + b. W is unpacked from the buffers for every product.

    Shapes: x (..., I) -> y (..., O). The matrix is frozen; the bias is a parameter.
    The backward pass unpacks W again, so no dense W is saved for it.
    """

    weight = NoMatrix()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantization: str,
        double_quantization: bool,
        tensors: Tensors,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantization = quantization
        self.double_quantization = double_quantization and quantization in codec.FOUR_BIT
        self.tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    def tensors(self) -> Tensors:
        """The packed tensors by name."""
        return {name: self.get_buffer(name) for name in self.tensor_names}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W (O, I) in `dtype`; on the meta device a meta tensor."""
        return codec.unpack(self.tensors(), (self.out_features, self.in_features), self.quantization, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self.bias, self)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        double = ", double" if self.double_quantization else ""
        return f"{self.in_features}, {self.out_features}, {self.quantization}{double}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move the layer to a device, but never change the dtype of its tensors: the scales stay float32."""
        before = self.tensors()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class _PackedProduct(torch.autograd.Function):
    """Autograd function: y = x W^T + b, dx = g W, where g = dL/dy. W is unpacked in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        cast_bias = None if bias is None else bias.to(x.dtype)
        if layer.quantization == "int8":
            flat = x.reshape(-1, x.shape[-1])  # (N, I)
            product = codec.outlier_product(flat, **layer.tensors(), bias=cast_bias, threshold=OUTLIER_THRESHOLD)
            return product.reshape(*x.shape[:-1], layer.out_features)
        if layer.quantization == "fp8" and not x.is_meta:
            product = fp8.product(x.reshape(-1, x.shape[-1]), **layer.tensors())
            product = product if cast_bias is None else product + cast_bias
            return product.reshape(*x.shape[:-1], layer.out_features)
        return exact_product(layer, x, cast_bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients  # (..., O)
        of_x = gradient @ UNPACKED.of(ctx.layer, gradient.dtype) if ctx.needs_input_grad[0] else None  # (..., I)
        of_bias = None
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)  # (O,)
        return of_x, of_bias, None


def pack_linear(
    linear: nn.Module, quantization: str, double_quantization: bool, compute_dtype: torch.dtype
) -> nn.Module:
    """Pack the matrix of `linear` (nn.Linear or Conv1D) into a PackedLinear. The matrix is first rounded to
    `compute_dtype`.

    Raises: ModelError if the matrix is not finite.
    """
    weight = weight_of(linear)
    if weight is None or layer_kind(linear) not in ("linear", "conv1d"):
        raise ModelError(f"{type(linear).__name__} is not a linear layer", "only linear layers can be quantized")
    shape = weight.shape
    bias = getattr(linear, "bias", None)
    if next(linear.parameters()).is_meta:
        shapes = codec.packed_shapes(shape, quantization, double_quantization).items()
        tensors = {name: torch.empty(its, dtype=dtype, device="meta") for name, (its, dtype) in shapes}
    else:
        tensors = pack_matrix(weight.read(compute_dtype), quantization, double_quantization)
    frozen = None if bias is None else nn.Parameter(bias.detach().to(compute_dtype), requires_grad=False)
    return PackedLinear(shape[1], shape[0], quantization, double_quantization, tensors, frozen)


def kept_linear(linear: nn.Module, kind: str, packed: Tensor, compute_dtype: torch.dtype) -> PackedLinear:
    """Make a PackedLinear from the blocks (O, bytes) of a GGUF file and the bias of `linear`. `kind`: the type of the
    blocks, such as "q4_k"."""
    weight = weight_of(linear)
    assert weight is not None
    bias = None if weight.bias is None else nn.Parameter(weight.bias.detach().to(compute_dtype), requires_grad=False)
    return PackedLinear(weight.shape[1], weight.shape[0], kind, False, {"packed": packed}, bias)


def pack_matrix(matrix: Tensor, quantization: str, double_quantization: bool) -> Tensors:
    """Pack a matrix (O, I) of the base.

    Raises: ModelError if the matrix contains NaN or infinity. Only the scales are checked, which needs no second copy
    of the matrix.
    """
    tensors = codec.pack(matrix, quantization, double_quantization)
    scales = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    if not all(bool(torch.isfinite(scale).all()) for scale in scales):
        raise ModelError("a weight of the base contains NaN or infinity", "check the base's files")
    return tensors


def adopt_packed(net: nn.Module, dtype: torch.dtype) -> None:
    """Replace every 4-bit layer of bitsandbytes by a PackedLinear with the same tensors. Cast all other parameters to
    `dtype`, because transformers keeps the dtype of the files."""
    kind = codec.import_bitsandbytes().nn.Linear4bit
    for name, module in [(name, module) for name, module in net.named_modules() if isinstance(module, kind)]:
        parameter = module.weight
        tensors, quantization = codec.tensors_of_state(parameter.data, parameter.quant_state)
        bias = None if module.bias is None else nn.Parameter(module.bias.data, requires_grad=False)
        layer = PackedLinear(
            module.in_features, module.out_features, quantization, "nested_absmax" in tensors, tensors, bias
        )
        net.set_submodule(name, layer)
    float32_modules = [*(getattr(net, "_keep_in_fp32_modules_strict", None) or ())]
    float32_modules += (getattr(net, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, parameter in net.named_parameters():
        if parameter.is_floating_point() and not any(f".{part}." in f".{name}." for part in float32_modules):
            parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class Weight:
    """Reads and replaces the matrix of one module. `shape`: always (O, I), even if the matrix is packed or stored
    transposed; (vocabulary, D) for an embedding."""

    module: nn.Module
    kind: str  # dense, nf4, fp4, int8, int8_weight_only, fp8, or a type of GGUF blocks such as q4_k
    shape: tuple[int, int]
    transposed: bool = False  # stored as (I, O)

    @property
    def elements(self) -> int:
        """The number of elements of the matrix, packed or not."""
        return self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        if isinstance(self.module, PackedLinear):
            return self.module.get_buffer("packed").device
        return _dense(self.module).device

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of a dense matrix; None if it is packed."""
        return None if isinstance(self.module, PackedLinear) else _dense(self.module).dtype

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (O,), if it has one."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of the matrix (O, I) with the values that the forward uses."""
        if isinstance(self.module, PackedLinear):
            return self.module.dequantize(dtype)
        stored = _dense(self.module).detach()
        return (stored.t() if self.transposed else stored).to(dtype, copy=True).contiguous()

    def replace(self, matrix: Tensor) -> None:
        """Replace the module's matrix by `matrix` (O, I), stored in the same dtype or packing. Modules that were tied
        to it keep the old matrix."""
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"a matrix of shape {tuple(matrix.shape)} cannot replace a matrix of shape {self.shape}")
        if isinstance(self.module, PackedLinear):
            layer = self.module
            packed = codec.pack(matrix.to(self.device), layer.quantization, layer.double_quantization)
            for name, tensor in packed.items():
                setattr(layer, name, tensor)
            return
        old = _dense(self.module)
        stored = (matrix.t() if self.transposed else matrix).to(device=old.device, dtype=old.dtype, copy=True)
        self.module.weight = nn.Parameter(stored.contiguous(), requires_grad=old.requires_grad)


def multiplies_exactly(module: nn.Module) -> bool:
    """Whether the module computes exactly x W^T + b, with the W of `product_matrix`. False for subclasses of nn.Linear,
    whose forward may differ, and for LLM.int8 and fp8, which round x."""
    return type(module) is nn.Linear or (isinstance(module, PackedLinear) and module.quantization not in ROUNDS_INPUTS)


def product_matrix(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The matrix W (O, I) for a product in `dtype`, of a module that multiplies exactly (see `multiplies_exactly`). A
    dense matrix is returned as stored, a packed matrix as an unpacked copy."""
    return UNPACKED.of(module, dtype) if isinstance(module, PackedLinear) else _dense(module).detach()


def exact_product(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) -> x W^T + b (..., O), for a module that multiplies exactly. `bias` has the dtype of x."""
    if isinstance(module, PackedLinear) and current_call().fuses:
        shape = module.out_features, module.in_features
        fused = codec.fused_product(x, module.tensors(), shape, module.quantization, bias)
        if fused is not None:
            return fused
    return F.linear(x, product_matrix(module, x.dtype), bias)


def _dense(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a layer: linear, conv1d or embedding; None for any other module."""
    kind: type = type(module)
    if isinstance(module, PackedLinear | nn.Linear):
        return None if returns_several(kind) else "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # Recognised by name, without importing transformers.
    return "conv1d" if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") else None


def weight_of(module: nn.Module) -> Weight | None:
    """The Weight of `module`'s matrix; None if an adapter or a merge cannot use the matrix."""
    if isinstance(module, PackedLinear):
        return Weight(module, module.quantization, (module.out_features, module.in_features))
    kind = layer_kind(module)
    if kind is None:
        return None
    rows, columns = _dense(module).shape
    if kind == "conv1d":
        return Weight(module, "dense", (columns, rows), transposed=True)
    return Weight(module, "dense", (rows, columns))


def packed_layers(net: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, PackedLinear)}


def stored_bytes(net: nn.Module) -> int:
    """Stored bytes of all parameters and buffers. Tied tensors count once."""
    tensors = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def element_count(net: nn.Module) -> int:
    """The number of parameters of the model. Tied tensors count once. A packed matrix counts like its dense form."""
    dense = sum(parameter.numel() for parameter in net.parameters())
    return dense + sum(layer.in_features * layer.out_features for layer in packed_layers(net).values())
