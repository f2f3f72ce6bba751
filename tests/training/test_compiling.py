"""Compiled decoder layers: when plan chooses them, and that they compute what plain ones compute."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loop_case import Case, make_case, make_rows
from tests.support.train_case import write_recipe
from tests.training.test_loop import assert_same_bits, training, weights
from tunekit.model.native.library import NoKernels
from tunekit.planning import compiling as planned
from tunekit.planning.compiling import compile_problems, planned_compile
from tunekit.planning.plan import make_plan
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.tuned.network import MAX_VARIANTS, compile_layers, wrap_forwards

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)")


@pytest.mark.parametrize(
    ("setting", "device", "steps", "triton", "expected"),
    [
        ("auto", CPU, 10_000, True, False),
        ("auto", CUDA, 499, True, False),
        ("auto", CUDA, 500, True, True),
        ("auto", CUDA, 500, False, False),
        (True, CPU, 1, False, True),
        (False, CUDA, 10_000, True, False),
    ],
)
def test_auto_compiles_where_it_pays(
    setting: Any, device: Any, steps: int, triton: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "find_spec", lambda name: triton or None)
    assert planned_compile(setting, device, steps)[0] is expected


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "find_spec", lambda name: None)
    monkeypatch.setattr(planned.shutil, "which", lambda name: None)
    assert [problem.key for problem in compile_problems(True, True, CUDA, True)] == ["training.compile"] * 2
    (problem,) = compile_problems(True, True, CPU, False)
    assert "C++ compiler" in problem.what
    assert not list(compile_problems(True, False, CPU, True))


def test_a_resumed_run_keeps_what_auto_meant(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled layers and kernels in C round differently: what another machine would choose must not matter."""
    loaded = load_recipe(write_recipe(tmp_path, tiny_llama, training={"compile": "auto", "kernels": "auto"}))
    chosen = make_plan(loaded, device=CPU)[0].choice
    for compiled, kernels in ((False, "none"), (True, "native")):
        previous = replace(chosen, compiled=compiled, kernels=kernels)
        monkeypatch.setattr(planned, "load_kernels", lambda: None)
        plan, _ = make_plan(loaded, device=CPU, previous=previous)
        assert (plan.choice.compiled, plan.choice.kernels) == (compiled, kernels)
        assert (
            sum("so that all ranks, and a run that is resumed, round the same" in note for note in plan.notes)
            == 1 + compiled
        )

    def absent() -> None:
        raise NoKernels("there is no C compiler")

    monkeypatch.setattr(planned, "load_kernels", absent)
    monkeypatch.setattr(planned.shutil, "which", lambda name: None)
    plan, _ = make_plan(loaded, device=CPU, previous=previous)
    texts = {refusal.key: refusal.message for refusal in plan.refusals}
    assert "there is no C compiler" in texts["training.kernels"]
    assert "or start a new run" in texts["training.compile"]


def test_auto_compiles_no_streamed_layers(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "find_spec", lambda name: True)
    for name in ("available_bytes", "total_bytes"):
        monkeypatch.setattr(f"tunekit.planning.resources.{name}", lambda device: 2**33)
    loaded = load_recipe(write_recipe(tmp_path, tiny_llama, training={"compile": "auto", "epochs": 300.0}))
    for tier in ("off", "disk"):
        memory = loaded.recipe.memory.model_copy(update={"streaming": tier})
        recipe = loaded.recipe.model_copy(update={"memory": memory})
        plan, _ = make_plan(replace(loaded, recipe=recipe), device=CUDA)
        assert plan.choice.compiled is (tier == "off")
        (note,) = (note for note in plan.notes if note.startswith("decoder layers compiled"))
        assert ("not always on the device" in note) is (tier == "disk")


def test_plan_says_what_it_chose(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, training={"compile": "auto"})
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert plan.choice.compiled is False
    assert "decoder layers compiled: no, compiled layers are not faster on a CPU" in plan.notes
    plan, _ = make_plan(load_recipe(recipe, ["training.compile=false"]), device=CPU)
    assert not [note for note in plan.notes if "compiled" in note]
    prefix = write_recipe(tmp_path / "prefix", tiny_llama, training={"compile": True})
    text = prefix.read_text().replace('"method": "lora", "r": 4, "dropout": 0.1', '"method": "prompt"')
    prefix.write_text(text)
    plan, _ = make_plan(load_recipe(prefix), device=CPU)
    assert [refusal.key for refusal in plan.refusals] == ["training.compile"]


def compiled_case(folder: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Case:
    """A case whose layers are prepared in train.py's order."""
    from tests.support import loop_case

    forwards: list[Any] = []
    prepare = loop_case.prepare_layers

    def prepared(layers: Any, count: int, store: Any = None) -> None:
        forwards.extend(wrap_forwards(layers) if compiled else [])
        prepare(layers, count, store)

    with monkeypatch.context() as patch:
        patch.setattr(loop_case, "prepare_layers", prepared)
        case = make_case(folder, make_rows(23), **settings)
    compile_layers(forwards)
    return case


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("adapter", "packing", "checkpointed", "quantization"),
    [
        (LoraSettings(r=4), True, 1, "none"),
        (LoraSettings(r=4, dropout=0.2), False, 2, "none"),
        (LoraSettings(r=4), True, 0, "int8_weight_only"),
        (DoraSettings(r=4), True, 1, "none"),
    ],
)
def test_compiled_layers_give_the_same_curve(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: Any,
    packing: bool,
    checkpointed: int,
    quantization: Any,
) -> None:
    model = ModelSection(name_or_path=str(tiny_llama), dtype="float32", quantization=quantization)
    settings = {"adapter": adapter, "packing": packing, "checkpointed": checkpointed, "model": model}
    plain = compiled_case(tiny_llama, False, monkeypatch, training=training(), **settings)
    plain.run()
    torch._dynamo.reset()
    before, limit = torch._dynamo.utils.counters["stats"]["unique_graphs"], torch._dynamo.config.recompile_limit
    limits: list[int] = []
    case = compiled_case(tiny_llama, True, monkeypatch, training=training(), **settings)
    attention = case.model.base.family.layers(case.model.base.net)[0][1].self_attn
    attention.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        torch.compiler.disable(lambda *_: limits.append(torch._dynamo.config.recompile_limit))  # type: ignore[no-untyped-call]
    )
    case.run()
    assert set(limits) == {MAX_VARIANTS}
    assert torch._dynamo.config.recompile_limit == limit, "left as it was found"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert 0 < graphs <= 60, "compiled once, for all layers"
    assert case.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, ours in weights(case).items():
        reference = weights(plain)[name]
        assert (ours - reference).norm() <= 1e-4 * reference.norm(), name


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_resumes_bit_for_bit(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"training": training(max_steps=5), "adapter": LoraSettings(r=4), "checkpointed": 1}
    whole = compiled_case(tiny_llama, True, monkeypatch, **settings)
    whole.run()
    first = compiled_case(tiny_llama, True, monkeypatch, **settings)
    second = compiled_case(tiny_llama, True, monkeypatch, **settings)
    torch._dynamo.reset()  # as in a new process, whose first batch is another
    second.run_after_a_stop(first, 3)
    assert_same_bits(weights(second), weights(whole))
