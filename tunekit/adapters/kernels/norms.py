"""Root-mean-square norms that save their input in its own dtype for the backward pass instead of a float32 copy.

Forward values equal the values of the module's own code, bit for bit.

  y = w * n,  n = x r,  r = (mean(x^2) + e)^(-1/2);   with g = w * dL/dy:  dL/dx = r (g - n mean(g n))

The computation is in float32, as in transformers. If the weight is trained, or no gradient is needed, the module's own
code runs. Modules that compute this are recognised by their code.
"""

from functools import cache

import torch
from torch import Tensor, nn

from tunekit.adapters.kernels.gated import forward_code
from tunekit.model.autograd import Context

BODY = """\
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)"""


def lighten_norms(net: nn.Module) -> None:
    """Replace the forward of all norms that `computes_rms_norm` recognises."""
    for module in net.modules():
        if computes_rms_norm(module):
            module.forward = LightNorm(module)


def computes_rms_norm(module: nn.Module) -> bool:
    """Whether the module's class computes exactly BODY, as Llama's norm does."""
    return isinstance(getattr(module, "weight", None), nn.Parameter) and _computes_body(type(module))  # type: ignore[arg-type]


@cache
def _computes_body(kind: type[nn.Module]) -> bool:
    return forward_code(kind) == (["self", "hidden_states"], BODY)


class LightNorm:
    """A replacement for the forward of a norm."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight: Tensor = self.norm.weight  # type: ignore[assignment]  # a plain tensor within functional_call
        if weight.requires_grad or not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return type(self.norm).forward(self.norm, hidden_states)
        return _LightNorm.apply(hidden_states, weight, self.norm.variance_epsilon)  # type: ignore[no-untyped-call]


class _LightNorm(torch.autograd.Function):
    """The norm as an autograd function that saves x and r (..., 1)."""

    @staticmethod
    def forward(ctx: Context[None], x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x32 = x.to(torch.float32)
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + epsilon)  # (..., 1)
        ctx.save_for_backward(x, scale, weight)
        return weight * (x32 * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Context[None], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normal = x.to(torch.float32) * scale  # (..., D)
        gradient = (gradients[0] * weight).to(x.dtype).to(torch.float32)
        shared = (gradient * normal).mean(-1, keepdim=True)  # (..., 1)
        return normal.mul_(shared).neg_().add_(gradient).mul_(scale).to(x.dtype), None, None
