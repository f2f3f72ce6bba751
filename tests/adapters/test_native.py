"""The kernels in C against torch's operations: bits where no sum is touched, rounding where one is; when plan chooses
them, and what happens without a compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.adapters.test_joined_lora import adapted, gradients
from tests.architectures.tiny import tiny_config
from tests.model.test_causal_attention import LENGTHS, make_inputs, reference, values_and_gradients
from tests.support.plans import make_plan
from tests.support.train_case import write_recipe
from tunekit.adapters.kernels.lora_products import Gated
from tunekit.adapters.kernels.native import NativeGated, NativeNorm, use_native
from tunekit.adapters.kernels.norms import LightNorm, computes_rms_norm
from tunekit.errors import ModelError
from tunekit.model.attention.cpu_kernel import attend_causally
from tunekit.model.attention.documents import NATIVE, attend_per_document, known_documents
from tunekit.model.attention.segments import find_segments
from tunekit.model.call import Call, calling
from tunekit.model.native import library
from tunekit.model.native.attention import attend_natively
from tunekit.model.native.library import NoKernels, load_kernels
from tunekit.planning import kernels
from tunekit.planning.kernels import planned_kernels
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
def test_a_norm_with_a_weight_of_each_head_and_a_whole_epsilon() -> None:
    """The kernel has one weight per number of a row, and takes epsilon as a float."""
    net, _ = adapted("llama", dtype=torch.bfloat16)
    module = next(module for module in net.modules() if computes_rms_norm(module))
    module.weight.data, module.variance_epsilon = numbers(2, 32, seed=1), 1
    x = numbers(3, 2, 32)
    assert torch.equal(NativeNorm(module)(x), type(module).forward(module, x))
    module.weight.data = numbers(32, seed=1)
    torch.testing.assert_close(NativeNorm(module)(x), type(module).forward(module, x), rtol=2**-7, atol=1e-3)


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


FAMILIES = ["qwen3", "granite", "gemma", "glm4", "mistral"]


@needs_kernels
@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_round_as_much_as_with_torchs_operations(model_type: str) -> None:
    """Norms of queries and keys, a scale of attention, norms with an offset or after a layer, and a window that
    is shorter than some documents: the distance from float64 is that of torch's operations in bfloat16."""
    values = [values_of(model_type, dtype, native) for dtype, native in MODES]
    for exact, plain, native in zip(*values, strict=True):
        assert (native - exact).norm() <= 1.1 * (plain - exact).norm()


MODES = [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)]


def values_of(model_type: str, dtype: torch.dtype, native: bool) -> tuple[Tensor, Tensor]:
    """Logits of documents in one row, and the gradient of the embeddings."""
    config = tiny_config(model_type)
    config.hidden_size, config.head_dim = 128, 32
    torch.manual_seed(0)
    net: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.add_(torch.randn(weight.shape), alpha=0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    net = net.to(torch.bfloat16).to(dtype)
    attend_per_document(net, CPU, dtype)
    if native:
        use_native(net)
        assert net.config._attn_implementation == NATIVE
    positions = torch.cat([torch.arange(length) for length in (1, 70, 33, 2, 100)])[None]
    ids = torch.randint(5, 260, positions.shape, generator=torch.Generator().manual_seed(1))
    inputs = net.get_input_embeddings()(ids).detach().requires_grad_()
    with calling(Call(segments=find_segments(positions))), known_documents():
        logits = net(inputs_embeds=inputs, position_ids=positions, use_cache=False).logits.double()
    logits.square().sum().backward()
    return logits.detach(), inputs.grad.double()


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
        assert any("SwiGLU and attention: no, there is no C compiler" in note for note in plan.notes)
        with pytest.raises(ModelError, match="this run computes with kernels in C, but there is no C compiler"):
            use_native(nn.Module())
    finally:
        load_kernels.cache_clear()


@pytest.mark.drawn
@needs_kernels
def test_a_cache_that_does_not_serve_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(cache: Path) -> Path:
        monkeypatch.setenv("TUNEKIT_CACHE", str(cache))
        load_kernels.cache_clear()
        return Path(load_kernels()._name)

    try:
        good = loaded(tmp_path / "good")
        assert good == loaded(tmp_path / "good")
        assert [*(tmp_path / "good" / "kernels").iterdir()] == [good]
        (tmp_path / "damaged" / "kernels").mkdir(parents=True)
        (tmp_path / "damaged" / "kernels" / good.name).touch()  # as after a loss of power
        assert tmp_path not in loaded(tmp_path / "damaged").parents
        assert tmp_path not in loaded(good).parents, "a file, in which no folder can be made"
        if os.getuid() == 0:
            shutil.copytree(tmp_path / "good", tmp_path / "foreign")
            os.chown(tmp_path / "foreign" / "kernels" / good.name, 4711, -1)
            assert tmp_path not in loaded(tmp_path / "foreign").parents, "another user's"
    finally:
        load_kernels.cache_clear()


def test_a_resumed_run_keeps_its_kernels(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They round differently: what another machine would choose must not matter."""
    loaded = load_recipe(write_recipe(tmp_path, tiny_llama, training={"kernels": "auto"}))
    chosen = make_plan(loaded, device=CPU)[0].choice
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    for name in ("none", "native"):
        previous = replace(chosen, kernels=name)
        plan, _ = make_plan(loaded, device=CPU, previous=previous)
        assert plan.choice.kernels == name
        told = "so that all ranks, and a run that is resumed, round the same"
        assert any(told in note for note in plan.notes) is (name == "native")

    def absent() -> None:
        raise NoKernels("there is no C compiler")

    monkeypatch.setattr(kernels, "load_kernels", absent)
    plan, _ = make_plan(loaded, device=CPU, previous=previous)
    assert ["there is no C compiler" in refusal.message for refusal in plan.refusals] == [True]


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
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    net, _ = native_net()
    assert planned_kernels("auto", net, CPU, torch.bfloat16)[0] == "native"
    assert planned_kernels("auto", net, torch.device("cuda"), torch.bfloat16) == ("none", "")
    assert planned_kernels("auto", net, CPU, torch.float32) == ("none", "")
    encoder, _ = adapted("gpt2", target_modules=["c_fc"])
    assert planned_kernels("auto", encoder, CPU, torch.bfloat16) == ("none", "")
