"""Makes norms, gated products and attention use compiled kernels, for bfloat16 tensors on a CPU. All other tensors,
such as tensors on the meta device, use torch's operations.

Results differ from torch's operations only in the order of the sums in norms and attention, and in the last bit of
exponentials.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunekit.adapters.kernels.liger import liger_places
from tunekit.adapters.kernels.lora_products import Gated
from tunekit.adapters.kernels.norms import LightNorm
from tunekit.errors import ModelError
from tunekit.model.attention.documents import NATIVE, PRODUCTS
from tunekit.model.autograd import Context
from tunekit.model.native.library import NoKernels, load_kernels
from tunekit.model.pretrained import config_of


def has_native_places(net: nn.Module) -> bool:
    """Whether the network has a module that the kernels can replace: a norm with Llama's code, or attention over packed
    documents."""
    return bool(liger_places(net)[0]) or str(config_of(net)._attn_implementation) == PRODUCTS


def use_native(net: nn.Module) -> None:
    """Make norms, fused MLPs with SiLU, and attention over packed documents use the compiled kernels. The adapter must
    already be attached.

    Raises: ModelError if the run was planned with these kernels, but this machine cannot compile them.
    """
    try:
        load_kernels()
    except NoKernels as error:
        how = "install a C compiler, or start the run again with training.kernels: none"
        raise ModelError(f"this run computes with kernels in C, but {error}", how, key="training.kernels") from error
    norms, mlps = liger_places(net)
    for norm in norms:
        norm.forward = NativeNorm(norm)
    for mlp in mlps:
        fused = mlp.__dict__["forward"]
        fused.gated = NativeGated(fused.gated.inner, fused.gated.activation, fused.gated.down)
    if str(config_of(net)._attn_implementation) == PRODUCTS:
        config_of(net)._attn_implementation = NATIVE


def _fits(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)


def _run(kernel: str, *values: Tensor | float) -> None:
    """Call a compiled kernel. Tensors are passed as addresses, integers as C's `long`; the last argument is the number
    of threads."""
    arguments: list[object] = []
    for value in values:
        if isinstance(value, Tensor):
            arguments.append(ctypes.c_void_p(value.data_ptr()))
        else:
            arguments.append(ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value))
    load_kernels()[kernel](*arguments, torch.get_num_threads())


class NativeNorm(LightNorm):
    """A root-mean-square norm by two kernels."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight: Tensor = self.norm.weight  # type: ignore[assignment]  # a plain tensor within functional_call
        # another shape would be broadcast
        fits = _fits(hidden_states, weight) and weight.shape == hidden_states.shape[-1:]
        if weight.requires_grad or not fits:
            return super().__call__(hidden_states)
        epsilon = float(self.norm.variance_epsilon)  # type: ignore[arg-type]
        return _NativeNorm.apply(hidden_states, weight, epsilon)  # type: ignore[no-untyped-call]


class _NativeNorm(torch.autograd.Function):
    """The norm as an autograd function. For the backward pass it saves x and r (..., 1), like _LightNorm."""

    @staticmethod
    def forward(ctx: Context[None], x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, width = x.contiguous(), x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        _run("norm_forward", scale.numel(), width, x, weight, epsilon, y, scale)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Context[None], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        of_x = torch.empty_like(x)
        _run("norm_backward", scale.numel(), x.shape[-1], x, weight, scale, gradients[0].contiguous(), of_x)
        return of_x, None, None


@dataclass(frozen=True, eq=False)
class NativeGated(Gated):
    """SwiGLU with one kernel for forward and one for backward. The gradient of `up` is written over the gradient of
    act(gate) * up."""

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        if not _fits(gate, up):
            return super().hidden(gate, up)
        hidden = torch.empty_like(gate)
        _run("gated_forward", gate.numel(), gate, up, hidden)
        return hidden

    def backward(
        self, gate: Tensor, up: Tensor, through_down: Callable[[Tensor], tuple[Tensor, list[Tensor]]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        if not _fits(gate, up):
            return super().backward(gate, up, through_down)
        of_hidden, of_down = through_down(self.hidden(gate, up))
        of_gate = torch.empty_like(gate)
        _run("gated_backward", gate.numel(), gate, up, of_hidden, of_gate)
        return of_gate, of_hidden, of_down
