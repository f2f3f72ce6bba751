"""The kernels in C against torch's operations: bits where no sum is touched, rounding where one is; when plan chooses
them, and what happens without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.test_joined_lora import adapted, gradients
from tests.model.test_causal_attention import LENGTHS, make_inputs, reference, values_and_gradients
from tests.support.train_case import write_recipe
from tunekit.adapters.kernels.lora_products import Gated
from tunekit.adapters.kernels.native import NativeGated, NativeNorm, use_native
from tunekit.adapters.kernels.norms import LightNorm, computes_rms_norm
from tunekit.errors import ModelError
from tunekit.model.attention.cpu_kernel import attend_causally
from tunekit.model.attention.documents import NATIVE, attend_per_document
from tunekit.model.native import library
from tunekit.model.native.attention import attend_natively
from tunekit.model.native.library import NoKernels, load_kernels
from tunekit.planning import compiling
from tunekit.planning.compiling import planned_kernels
from tunekit.planning.plan import make_plan
from tunekit.recipe.load import load_recipe

CPU = torch.device("cpu")


def reason_against() -> str:
    try:
        load_kernels()
    except NoKernels as error:
        return str(error)
    return ""


needs_kernels = pytest.mark.skipif(bool(reason_against()), reason=f"no kernels in C: {reason_against()}")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).to(torch.bfloat16)


@needs_kernels
def test_a_norm_rounds_as_torchs_operations_do() -> None:
    net, _ = adapted("llama", dtype=torch.bfloat16)
    module = next(module for module in net.modules() if computes_rms_norm(module))
    module.weight.data = numbers(module.weight.numel(), seed=1)
    found = []
    for norm in (LightNorm(module), NativeNorm(module)):
        x = numbers(2, 51, module.weight.numel()).requires_grad_()
        y = norm(x)
        found.append((y.detach(), *torch.autograd.grad(y, x, numbers(*y.shape, seed=2))))
    for light, native in zip(*found, strict=True):
        assert (light != native).float().mean() < 2e-3, "only the order of the sums differs"
        torch.testing.assert_close(native, light, rtol=1e-2, atol=1e-3)
    assert not NativeNorm(module)(x.detach()).requires_grad


@needs_kernels
def test_swiglu_has_torchs_bits() -> None:
    gate, up, above = (numbers(3, 77, 40, seed=seed) for seed in range(3))
    gate.view(-1)[:4] = torch.tensor([0.0, -120.0, 100.0, -86.5], dtype=torch.bfloat16)
    plain, native = (kind(None, nn.functional.silu, None) for kind in (Gated, NativeGated))  # type: ignore[arg-type]
    assert torch.equal(native.hidden(gate, up), plain.hidden(gate, up))
    seen: list[Tensor] = []

    def through_down(hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen.append(hidden)
        return above.clone(), []

    of_plain, of_native = (kind.backward(gate, up, through_down)[:2] for kind in (plain, native))
    assert torch.equal(*seen)
    for expected, found in zip(of_plain, of_native, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-30)
        assert (found != expected).float().mean() < 1e-3, "the last bit of an exponential"


@needs_kernels
@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 64), (4, 4, 32), (3, 1, 96)])
def test_attention_rounds_as_much_as_products_do(heads: int, groups: int, size: int) -> None:
    inputs = make_inputs(torch.bfloat16, heads, groups, size, size)
    exact = values_and_gradients(reference, [tensor.double() for tensor in inputs], 0.2)
    products = values_and_gradients(attend_causally, inputs, LENGTHS, 0.2)
    native = values_and_gradients(attend_natively, inputs, LENGTHS, 0.2)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    for found, other, expected in zip(native, products, exact, strict=True):
        assert (found.double() - expected).norm() <= 1.05 * (other.double() - expected).norm()
    assert all(map(torch.equal, values_and_gradients(attend_natively, strided, LENGTHS, 0.2), native))


@needs_kernels
def test_attention_with_shared_prefixes() -> None:
    """The second document has 70 keys of another document before its 33 own keys."""
    query = make_inputs(torch.bfloat16, 4, 2, 32, 32)[0][:, :103]
    key, value = (tensor[:, :173] for tensor in make_inputs(torch.bfloat16, 4, 2, 32, 32)[1:])
    lengths = (70, 33), 0.2, (70, 103)
    for found, other in zip(
        values_and_gradients(attend_natively, [query, key, value], *lengths),
        values_and_gradients(attend_causally, [query, key, value], *lengths),
        strict=True,
    ):
        torch.testing.assert_close(found, other, rtol=2**-6, atol=1e-2)


@needs_kernels
def test_other_tensors_go_to_torchs_operations() -> None:
    for inputs in (make_inputs(torch.float32, 6, 2, 64, 64), make_inputs(torch.bfloat16, 6, 2)):
        both = (values_and_gradients(attend, inputs, LENGTHS, 0.2) for attend in (attend_natively, attend_causally))
        assert all(map(torch.equal, *both)), "float32, and heads of 16 numbers"


def native_net(**settings: Any) -> tuple[Any, Any]:
    net, attached = adapted("llama", dtype=torch.bfloat16, config={"head_dim": 32}, **settings)
    attend_per_document(net, CPU, torch.bfloat16)
    return net, attached


@needs_kernels
@pytest.mark.parametrize("checkpointed", [0, 3])
def test_a_network_computes_with_them(checkpointed: int, threads: Callable[[int], None]) -> None:
    plain = gradients(*native_net())
    results = []
    for count in (1, 2):
        threads(count)
        net, attached = native_net()
        use_native(net)
        assert net.config._attn_implementation == NATIVE
        assert sum(isinstance(module.__dict__.get("forward"), NativeNorm) for module in net.modules()) == 7
        results.append(gradients(net, attached, checkpointed))
    hidden, found = results[0]
    torch.testing.assert_close(hidden, plain[0], rtol=0.05, atol=0.05)
    for name, gradient in plain[1].items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm(), name
        assert torch.equal(found[name], results[1][1][name]), "the number of threads changes no bit"


@needs_kernels
def test_plan_chooses_them_in_bfloat16_on_a_cpu(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)

    def chosen(*overrides: str) -> tuple[str, list[str]]:
        plan, _ = make_plan(load_recipe(recipe, list(overrides)), device=CPU)
        return plan.choice.kernels, [note for note in plan.notes if "kernels in C" in note]

    kernels, (note,) = chosen("model.dtype=bfloat16")
    assert (kernels, "yes, bfloat16" in note) == ("native", True)
    assert chosen("model.dtype=float32") == ("none", [])
    assert chosen("model.dtype=bfloat16", "training.kernels=none") == ("none", [])


def test_without_a_compiler_torchs_operations_remain(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    load_kernels.cache_clear()
    try:
        recipe = write_recipe(tmp_path, tiny_llama)
        plan, _ = make_plan(load_recipe(recipe, ["model.dtype=bfloat16"]), device=CPU)
        assert plan.choice.kernels == "none"
        assert any("kernels in C: no, there is no C compiler" in note for note in plan.notes)
        with pytest.raises(ModelError, match="this run computes with kernels in C, but there is no C compiler"):
            use_native(nn.Module())
    finally:
        load_kernels.cache_clear()


@needs_kernels
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.c"
    source.write_text('#error "the processor has no AVX-512"\n')
    monkeypatch.setattr(library, "SOURCE", source)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    load_kernels.cache_clear()
    try:
        with pytest.raises(NoKernels, match="the processor has no AVX-512"):
            load_kernels()
        assert not list((tmp_path / "cache" / "kernels").iterdir())
    finally:
        load_kernels.cache_clear()


def test_only_what_can_use_them_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "load_kernels", lambda: None)
    net, _ = native_net()
    assert planned_kernels("auto", net, CPU, torch.bfloat16)[0] == "native"
    assert planned_kernels("auto", net, torch.device("cuda"), torch.bfloat16) == ("none", "")
    assert planned_kernels("auto", net, CPU, torch.float32) == ("none", "")
    encoder, _ = adapted("gpt2", target_modules=["c_fc"])
    assert planned_kernels("auto", encoder, CPU, torch.bfloat16) == ("none", "")
