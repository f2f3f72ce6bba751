"""liger-kernel's switch, with a double of its functions: they are called, they get what they need, results stay."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.test_joined_lora import adapted, gradients
from tests.model.test_families import make_net
from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.adapters.kernels.liger import liger_places, use_liger
from tunekit.planning import kernels
from tunekit.planning.kernels import kernel_problems
from tunekit.recipe.load import load_recipe


class _RmsNorm(torch.autograd.Function):
    """What LigerRMSNormFunction computes with casting mode llama."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
        assert (offset, mode, in_place) == (0.0, "llama", False)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _RmsNorm.compute(x, weight, eps)

    @staticmethod
    def compute(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            y = _RmsNorm.compute(source, weight, ctx.eps)
        return torch.autograd.grad(y, source, gradients[0])[0], None, None, None, None, None


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A module of the same names whose functions note that they were called."""
    called: list[str] = []

    def swiglu_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        called.append("swiglu_forward")
        return gate, up, torch.nn.functional.silu(gate) * up

    def swiglu_backward(gate: Tensor, up: Tensor, of_hidden: Tensor) -> tuple[Tensor, Tensor]:
        called.append("swiglu_backward")
        sigmoid = torch.sigmoid(gate)
        of_gate, of_up = of_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), of_hidden * gate * sigmoid
        gate.data.copy_(of_gate)  # as the kernel does
        up.data.copy_(of_up)
        return gate, up

    class Counted(_RmsNorm):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            called.append("norm")
            return _RmsNorm.forward(ctx, *inputs)

    modules = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.ops")}
    modules["liger_kernel.ops.swiglu"] = swiglu = ModuleType("swiglu")
    modules["liger_kernel.ops.rms_norm"] = norm = ModuleType("rms_norm")
    swiglu.swiglu_forward, swiglu.swiglu_backward = swiglu_forward, swiglu_backward  # type: ignore[attr-defined]
    norm.LigerRMSNormFunction = Counted  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return called


@pytest.mark.parametrize("checkpointed", [0, 3])
def test_the_kernels_compute_norms_and_swiglu(liger: list[str], checkpointed: int) -> None:
    plain = gradients(*adapted("llama"))
    net, attached = adapted("llama")
    use_liger(net)
    hidden, found = gradients(net, attached, checkpointed)
    torch.testing.assert_close(hidden, plain[0], rtol=1e-5, atol=1e-5)
    for name, gradient in plain[1].items():
        assert (found[name] - gradient).norm() <= 3e-6 * gradient.norm(), name
    assert liger.count("swiglu_backward") == 3
    assert liger.count("norm") == 7 + (6 if checkpointed else 0)


def test_only_what_they_equal_is_given_to_them() -> None:
    norms, mlps = liger_places(adapted("llama")[0])
    assert (len(norms), len(mlps)) == (7, 3)
    assert liger_places(adapted("gemma")[0]) == ([], []), "1 + weight, and GELU"
    assert len(liger_places(make_net("qwen3"))[0]) == 7 + 2 * 3
    assert liger_places(make_net("gpt2")) == ([], [])


def test_plan_refuses_them_where_they_cannot_run(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, training={"kernels": "liger"})
    plan, _ = make_plan(load_recipe(recipe), device=torch.device("cpu"))
    assert [refusal.key for refusal in plan.refusals] == ["training.kernels"]
    assert any("liger-kernel computes 5 norms" in note for note in plan.notes)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    (problem,) = kernel_problems("liger", torch.device("cuda"))
    assert "pip install liger-kernel" in problem.how
    assert not list(kernel_problems("none", torch.device("cpu")))
