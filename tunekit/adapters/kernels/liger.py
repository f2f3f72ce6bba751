"""Makes norms and gated products use liger-kernel. On the meta device, where its kernels cannot run, substitutes save
tensors of the same size for the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tunekit.adapters.kernels.joined_lora import GatedMlp
from tunekit.adapters.kernels.lora_products import Gated
from tunekit.adapters.kernels.norms import computes_rms_norm
from tunekit.model.autograd import Context


@dataclass(frozen=True, eq=False)
class LigerGated(Gated):
    """SwiGLU by liger-kernel, with one kernel for forward and one for backward. The gradients overwrite the outputs of
    `gate` and `up`."""

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        if gate.is_meta:
            return torch.empty_like(gate)
        from liger_kernel.ops.swiglu import swiglu_forward

        return swiglu_forward(gate, up)[2]

    def backward(
        self, gate: Tensor, up: Tensor, through_down: Callable[[Tensor], tuple[Tensor, list[Tensor]]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        of_hidden, of_down = through_down(self.hidden(gate, up))
        if gate.is_meta:
            return gate, up, of_down
        from liger_kernel.ops.swiglu import swiglu_backward

        of_gate, of_up = swiglu_backward(gate, up, of_hidden)
        return of_gate, of_up, of_down


def liger_places(net: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that liger's kernels can replace: norms with Llama's code, and fused MLPs with SiLU."""
    norms = [module for module in net.modules() if computes_rms_norm(module)]
    fused = [module for module in net.modules() if isinstance(module.__dict__.get("forward"), GatedMlp)]
    return norms, [mlp for mlp in fused if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")]


def use_liger(net: nn.Module) -> None:
    """Make norms and fused MLPs use liger's kernels, on a GPU. The adapter must already be attached."""
    norms, mlps = liger_places(net)
    for norm in norms:
        norm.forward = partial(_liger_norm, norm)
    for mlp in mlps:
        fused = mlp.forward
        assert isinstance(fused, GatedMlp)
        fused.gated = LigerGated(fused.gated.inner, fused.gated.activation, fused.gated.down)


def _liger_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if x.is_meta:
        return _SimulatedNorm.apply(x)  # type: ignore[no-untyped-call]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # The gradient does not overwrite dy, because a residual may need it.
    return LigerRMSNormFunction.apply(x, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


class _SimulatedNorm(torch.autograd.Function):
    """A substitute for liger's norm on the meta device, which saves x (..., D) and one float32 number per row."""

    @staticmethod
    def forward(ctx: Context[None], x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Context[None], *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])
