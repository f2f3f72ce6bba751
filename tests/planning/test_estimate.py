"""The predicted peak: what is followed, what a simulation and a real run agree on, what a process really takes."""

from __future__ import annotations

import importlib.util
import math
import sys
import tracemalloc
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from tests.conftest import write_tiny_llama
from tests.support.data_case import objective_of
from tests.support.loop_case import make_case, make_rows
from tests.support.pair_case import parts_of
from tests.support.steps import run_step
from tunekit.adapters.attach import attach_adapter
from tunekit.contracts import StepBatches
from tunekit.data.batching.steps import BatchSettings, StoredSteps, collate
from tunekit.evaluation.probes import logprob_difference, packing_leak
from tunekit.machine.devices import deterministic_kernels
from tunekit.machine.memory import _group_available
from tunekit.model.load import load_model, make_meta_model
from tunekit.model.quantized.four_bit import WORKING_BYTES
from tunekit.model.storage.mapped_files import CHUNK_BYTES
from tunekit.planning import ranks
from tunekit.planning.execution import SearchSpace, fastest, relative_time
from tunekit.planning.forecast import (
    COMPILED_BYTES,
    KEPT_SHARE,
    MOST_KEPT_BYTES,
    PROCESS_BYTES,
    TOKEN_BYTES,
    Forecast,
    StoredBase,
    largest_batch,
    load_bytes,
    peak_bytes,
    untouched_bytes,
)
from tunekit.planning.simulated import tracker
from tunekit.planning.simulated.kernels import backward_buffers, workspace_bytes
from tunekit.planning.simulated.tracker import Simulation, StorageTracker
from tunekit.planning.simulation import SimulatedRun, make_tracked_optimizer
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.kto import KtoSettings
from tunekit.recipe.training import TrainingSection
from tunekit.records import ExecutionSettings, PeakBytes
from tunekit.train import train_verb
from tunekit.training import begin
from tunekit.training.optimizers import FlatGroup, Optimizer
from tunekit.tuned.model import ModelRun
from tunekit.tuned.network import prepare_network

CPU = torch.device("cpu")


def test_views_count_once_and_freed_storages_not_at_all() -> None:
    tracker = StorageTracker(CPU)
    tracker.start()
    with tracker:
        first = torch.zeros(1000)
        view = first[10:20].reshape(2, 5)
        first.add_(1)
        assert tracker.total == 4000
        del first
        assert tracker.total == 4000, "a view keeps its storage"
        del view
        assert tracker.total == 0
        grown = torch.empty(10)
        grown.resize_(100)
        assert tracker.total == 400
    assert tracker.peak_total == 4000


def test_parts_follow_where_a_tensor_was_made() -> None:
    tracker = StorageTracker(CPU)
    weight = torch.zeros(50)
    tracker.adopt([weight, weight[:10]], "weights")
    with tracker, tracker.counting_as("logits"):
        logits = torch.zeros(25)
    tracker.move([weight], "adapter")
    assert tracker.live == {"weights": 0, "adapter": 200, "logits": 100}
    assert logits.shape == (25,)


def test_on_a_gpu_every_block_is_rounded_up() -> None:
    tracker = StorageTracker(torch.device("cuda"))
    with tracker:
        tensors = [torch.zeros(1, device="meta"), torch.zeros(129, device="meta")]
    assert tracker.total == 512 + 1024
    assert len(tensors) == 2


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("wide"), layers=3, hidden=128)


def real_step(run: SimulatedRun, section: ModelSection, batch: Any) -> Simulation:
    """The same step as SimulatedRun.training_step with values, followed by the same tracker."""
    base = load_model(section, device=CPU)
    head = base.family.head_name(base.net)
    tuned = prepare_network(base, run.execution, partial(attach_adapter, base.net, run.adapter, seed=0, head_name=head))
    assert tuned.adapter is not None
    tracker = StorageTracker(CPU)
    with tracker:
        tracker.adopt(tuned.adapter.state().values(), "adapter")
        tracker.adopt([*base.net.parameters(), *base.net.buffers()], "weights")
        optimizer = make_tracked_optimizer(tracker, tuned, run.training)
        tracker.start()
        with tuned.training_mode(True):
            units = run.objective.loss.units(batch)
            run_step(tuned, run.objective, StepBatches(0, 0.0, (0,), (batch,)), units)
        optimizer.gradient_norm()
    return tracker.result()


@pytest.mark.parametrize(
    ("dtype", "packed", "checkpointed", "attention", "dropout"),
    [
        ("float32", False, 0, "auto", 0.0),
        ("float32", True, 0, "auto", 0.0),
        ("float32", True, 2, "eager", 0.1),
        ("bfloat16", False, 3, "auto", 0.1),
        ("bfloat16", True, 1, "auto", 0.0),
    ],
)
def test_a_simulated_step_needs_what_a_real_one_needs(
    wide_llama: Path, dtype: Any, packed: bool, checkpointed: int, attention: Any, dropout: float
) -> None:
    section = ModelSection(name_or_path=str(wide_llama), dtype=dtype, attention=attention)
    run = SimulatedRun(
        make_meta_model(section, device=CPU),
        LoraSettings(r=8, dropout=dropout),
        objective_of(),
        TrainingSection(),
        ExecutionSettings(checkpointed_layers=checkpointed),
        CPU,
    )
    rows = make_rows(8, shortest=100, longest=120)
    groups = [(0, 1, 2), (3, 4)] if packed else [(0,), (1,), (2,)]
    batch = collate(rows, groups, objective_of().rows)
    simulated, real = run.training_step(batch), real_step(run, section, batch)
    # ids and positions exist on the host before a real step, and are placed on the device inside a simulated one
    placed = 3 * batch.padded * 8
    assert abs(simulated.total - real.total) <= placed
    for part in ("weights", "adapter", "optimizer"):
        assert simulated.peak[part] == real.peak[part]


def layouts(output: object, inputs: object) -> list[object]:
    """Of each tensor: shape, strides, type, bytes of its storage, and whether that is one of an input's."""
    held = {leaf.untyped_storage()._cdata for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
    return [
        (each.shape, each.stride(), each.dtype, each.untyped_storage().nbytes(), each.untyped_storage()._cdata in held)
        for each in tree_leaves(output)
        if isinstance(each, torch.Tensor)
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8_weight_only"])
@pytest.mark.parametrize("streaming", ["off", "host"])
def test_a_remembered_output_is_what_torch_makes(
    quantization: Any, streaming: Any, wide_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered, meta_output = [], tracker.meta_output

    def checked(func: Any, args: Any, kwargs: Any) -> object:
        before = len(tracker._layouts)
        output = meta_output(func, args, kwargs)
        remembered.append(len(tracker._layouts) == before)
        assert layouts(output, (args, kwargs)) == layouts(func(*args, **kwargs), (args, kwargs)), func
        return output

    monkeypatch.setattr("tunekit.planning.simulated.tracker.meta_output", checked)
    section = ModelSection(name_or_path=str(wide_llama), dtype="float32", quantization=quantization)
    run = SimulatedRun(
        make_meta_model(section, device=CPU),
        LoraSettings(r=8, dropout=0.1),
        objective_of(),
        TrainingSection(),
        ExecutionSettings(streaming=streaming),
        CPU,
    )
    batch = collate(make_rows(2), [(0, 1)], objective_of().rows)
    run.training_step(batch)  # in which bitsandbytes makes a table that it keeps
    steps = [run.training_step(batch) for _ in range(2)]
    assert steps[0] == steps[1]
    last = remembered[-len(remembered) // 3 :]
    assert sum(last) > 0.99 * len(last)


def test_an_output_that_shares_a_storage_is_not_remembered() -> None:
    x = torch.ones(4, 6, device="meta")
    for operation, more in ((torch.ops.aten._unsafe_view.default, ([24],)), (torch.ops.aten.view.default, ([6, 4],))):
        for _ in range(2):
            made: Any = tracker.meta_output(operation, (x, *more), {})
            assert made.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert tracker.meta_output(torch.ops.aten.add_.Tensor, (x, 1), {}) is x
    assert tracker.meta_output(torch.ops.aten.add_.Tensor, (x, 1), {}) is x
    for value, dtype in ((1, torch.int64), (True, torch.int64), (1.0, torch.float32)):
        whole: Any = tracker.meta_output(torch.ops.aten.mul.Tensor, (x.long(), value), {})
        assert whole.dtype == dtype


@pytest.mark.drawn
def test_packed_weights_and_8_bit_moments_count_as_stored(wide_llama: Path) -> None:
    batch = collate(make_rows(2), [(0,), (1,)], objective_of().rows)
    peaks = {}
    for quantization in ("none", "int8_weight_only", "nf4"):
        section = ModelSection(name_or_path=str(wide_llama), dtype="float32", quantization=quantization)
        for optimizer in ("adamw", "adamw_8bit", "paged_adamw") if quantization == "none" else ("adamw",):
            training = TrainingSection(optimizer=optimizer)
            base = make_meta_model(section, device=CPU)
            run = SimulatedRun(base, LoraSettings(r=64), objective_of(), training, ExecutionSettings(), CPU)
            peaks[quantization, optimizer] = run.training_step(batch).peak
    weights = {name: peaks[name, "adamw"]["weights"] for name in ("none", "int8_weight_only", "nf4")}
    assert weights["nf4"] < weights["int8_weight_only"] < weights["none"]
    adapter = peaks["none", "adamw"]["adapter"]
    assert peaks["none", "adamw"]["optimizer"] == 3 * adapter, "a gradient and two moments in float32"
    assert peaks["none", "paged_adamw"]["optimizer"] == 3 * adapter
    updated = peaks["none", "adamw_8bit"]["optimizer"] - 5 * adapter  # without what an update makes on a CPU
    assert adapter < updated < 1.7 * adapter, "two moments of one byte"


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw"])
def test_bitsandbytes_update_holds_the_blocks_that_are_counted(name: Any) -> None:
    kernels = importlib.import_module("bitsandbytes.backends.cpu.ops")
    parameter = torch.nn.Parameter(torch.randn(2**16))
    optimizer = Optimizer(TrainingSection(optimizer=name), [FlatGroup({"w": parameter}, 1.0, True)])
    flat, gradient = optimizer.groups[0].data, optimizer.gradients()[0]
    gradient.normal_()
    state = optimizer.native.state[flat]
    shared = {"beta1": 0.9, "beta2": 0.999, "beta3": 0.0, "alpha": 0.0, "eps": 1e-8, "step": 1, "lr": 1e-3}
    shared |= {"weight_decay": 0.01, "gnorm_scale": 1.0}
    tracker = StorageTracker(CPU)
    tracker.adopt([flat, gradient, *(value for value in state.values() if isinstance(value, torch.Tensor))], "held")
    tracker.start()
    held = tracker.total
    with torch.no_grad(), tracker:
        given = ("adam", gradient, flat, state["state1"], state["state2"])
        if name == "adamw_8bit":
            maps = {key: state[key] for key in ("qmap1", "qmap2", "absmax1", "absmax2")}
            kernels._optimizer_update_8bit_blockwise_cpu(*given, **shared, **maps)
        else:
            kernels._optimizer_update_32bit_cpu(*given, unorm_vec=None, max_unorm=0.0, param_norm=0.0, **shared)
    assert tracker.peak_total - held == sum(optimizer.update_blocks(CPU))
    assert Optimizer(TrainingSection(), [FlatGroup({"w": parameter}, 1.0, True)]).update_blocks(CPU) == []


def test_recomputing_more_layers_never_needs_more(wide_llama: Path) -> None:
    run = SimulatedRun(
        make_meta_model(ModelSection(name_or_path=str(wide_llama), dtype="float32"), device=CPU),
        LoraSettings(),
        objective_of(),
        TrainingSection(),
        ExecutionSettings(),
        CPU,
    )
    batch = collate(make_rows(4, shortest=200, longest=220), [(0,), (1,)], objective_of().rows)
    totals = [
        replace(run, execution=ExecutionSettings(checkpointed_layers=n)).training_step(batch).total for n in range(4)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[3] < totals[0]
    assert run.evaluation(batch).total < totals[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("micro_batches", [2, 5, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_micro_batch_of_a_streamed_pass_counts(wide_llama: Path, device: str, micro_batches: int) -> None:
    """A few are simulated; all of them would need as much."""
    section = ModelSection(name_or_path=str(wide_llama), dtype="float32", attention="eager")
    run = SimulatedRun(
        make_meta_model(section, device=torch.device(device)),
        LoraSettings(),
        objective_of(),
        TrainingSection(),
        ExecutionSettings(streaming="host", activation_offload=True),
        torch.device(device),
    )
    batch = collate(make_rows(2, shortest=100, longest=120), [(0,), (1,)], objective_of().rows)
    foreseen, simulated = run.training_step(batch, micro_batches), run._step(batch, micro_batches)
    assert (foreseen.total, foreseen.offloaded) == (simulated.total, simulated.offloaded)
    assert foreseen.total == sum(foreseen.peak.values())


def test_a_simulation_leaves_the_random_state_alone(wide_llama: Path) -> None:
    run = SimulatedRun(
        make_meta_model(ModelSection(name_or_path=str(wide_llama)), device=CPU),
        LoraSettings(),
        objective_of(),
        TrainingSection(),
        ExecutionSettings(),
        CPU,
    )
    before = torch.random.get_rng_state()
    run.training_step(collate(make_rows(2), [(0,)], objective_of().rows))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_largest_batch_is_one_that_the_run_makes() -> None:
    rows = make_rows(20, shortest=5, longest=24)
    settings = BatchSettings(
        micro_batch_size=2, micro_batch_tokens=None, gradient_accumulation_steps=2, max_length=32, packing=True,
        shuffle=True, seed=3, epochs=2.0, max_steps=None,
    )  # fmt: skip
    steps = StoredSteps(rows, objective_of().rows, settings)
    sizes = [batch.padded for step in steps.after(0) for batch in step.batches]
    largest = largest_batch(steps, rows, objective_of().rows, settings)
    assert largest.inputs["input_ids"].numel() == largest.padded == max(sizes)


def test_cublas_keeps_a_workspace_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert workspace_bytes(gpu) == 2 * 32 * 2**20
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # torch's own choice before Hopper
    assert workspace_bytes(gpu) == 2 * 8_519_680
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for capability, mib in (((8, 0), 8.125), ((9, 0), 32)):
        monkeypatch.setattr("tunekit.planning.simulated.kernels.capability", lambda device, found=capability: found)
        assert workspace_bytes(gpu) == 2 * mib * 2**20
    assert workspace_bytes(torch.device("xpu")) == workspace_bytes(CPU) == 0


def test_flash_attention_s_backward_pass_takes_memory_of_its_own() -> None:
    """The queries' gradient and a row's sum in float32, rounded up; keys and values for each head that shares them."""
    gpu, name = torch.device("cuda"), "aten::_scaled_dot_product_flash_attention_backward"
    q, k = torch.empty(2, 8, 130, 40, dtype=torch.bfloat16), torch.empty(2, 4, 130, 40, dtype=torch.bfloat16)
    rows = 2 * 256 * 8
    assert backward_buffers(name, (q, q, k, k), gpu) == [rows * 64 * 4, rows * 4, 2 * 2 * 130 * 8 * 40 * 2]
    packed, starts = torch.empty(260, 8, 64, dtype=torch.bfloat16), torch.tensor([0, 130, 260])
    found = backward_buffers("torch_attn::_varlen_attn_backward", (*[packed] * 6, starts), gpu)
    assert found == [(260 + 2 * 128) * 8 * 64 * 4, (260 + 2 * 128) * 8 * 4, 0]
    assert backward_buffers(name, (q, q, k, k), CPU) == backward_buffers("aten::mm", (q, q), gpu) == []
    with deterministic_kernels(True):  # one sum for each share of the units
        assert backward_buffers(name, (q, q, k, k), gpu)[0] == 9 * rows * 64 * 4


def test_the_peak_of_a_run_is_the_highest_of_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Simulation({"weights": 600, "activations": 400}, 1000)
    evaluation = Simulation({"weights": 600, "logits": 900}, 1500)
    gpu = torch.device("cuda")
    beside = workspace_bytes(gpu)
    assert peak_bytes(step, None, None, gpu, torch.float32).total == 1000 + beside, (
        "of a GPU live bytes and cuBLAS's are predicted"
    )
    both = peak_bytes(step, evaluation, None, gpu, torch.float32, cache_bytes=100)
    assert (both.total, both.logits, both.activations) == (1600 + beside, 900, 0)
    assert peak_bytes(step, None, None, gpu, torch.float32, load_bytes=10**9).total == 1000 + beside, (
        "loading is the host's"
    )
    metal = torch.device("mps")
    assert peak_bytes(step, None, None, metal, torch.float32, load_bytes=10**9).total == 10**9, (
        "which is its own memory"
    )
    assert peak_bytes(step, None, None, CPU, torch.float32, load_bytes=10**9).total == 10**9 + PROCESS_BYTES
    assert peak_bytes(step, None, None, CPU, torch.float32).total == 1000 + KEPT_SHARE * 400 + PROCESS_BYTES, (
        "weights leave no freed blocks"
    )
    huge = replace(step, total=10**11)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    compiled = (
        peak_bytes(step, None, None, CPU, torch.bfloat16).total - peak_bytes(step, None, None, CPU, torch.float32).total
    )
    assert compiled == COMPILED_BYTES
    assert peak_bytes(huge, None, None, CPU, torch.float32).total == 10**11 + MOST_KEPT_BYTES + PROCESS_BYTES


def stub_base(dtype: torch.dtype = torch.float32, *, packs: bool = False, copies: bool = False) -> Any:
    """A base of 100 numbers with a matrix of 8 x 8, and a vocabulary of 3000."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(4, 7, device="meta", dtype=dtype)).to(dtype)
    net.config = SimpleNamespace(vocab_size=3000)  # type: ignore[assignment]
    facts = SimpleNamespace(total_parameters=sum(each.numel() for each in net.parameters()))
    return SimpleNamespace(net=net, facts=facts, dtype=dtype, packed_while_read=packs, copied_while_read=copies)


def test_loading_counts_the_mapped_file_and_what_is_made_of_it() -> None:
    stored, loaded, largest = StoredBase(440, frozenset([torch.float32, torch.int64])), 4 * 107, 4 * 64

    def peak(base: Any, stored: StoredBase = stored, streamed: bool = False, cached: bool = False) -> int:
        return load_bytes(base, stored, streamed=streamed, cached=cached)

    assert peak(stub_base()) == loaded
    assert peak(stub_base(torch.bfloat16)) == 440 + loaded // 2
    assert peak(stub_base(), StoredBase(50, gguf=True)) == 50 + loaded + 2 * largest + 3000 * TOKEN_BYTES
    assert peak(stub_base(copies=True)) == loaded + CHUNK_BYTES
    assert peak(stub_base(packs=True)) == loaded + largest + WORKING_BYTES, "one matrix beside the packed base"
    assert peak(stub_base(packs=True), cached=True) == largest + WORKING_BYTES
    assert peak(stub_base(), streamed=True) == 0
    for streamed in ({"packs": True}, {"copies": True}):  # the largest tensor is copied in one piece
        assert peak(stub_base(**streamed), streamed=True) == largest
        assert peak(stub_base(**streamed), StoredBase(1, gguf=True), streamed=True) == largest + 3000 * TOKEN_BYTES


def test_loading_counts_the_parsed_vocabulary_of_a_gguf_file(tmp_path: Path) -> None:
    """gguf holds each text as arrays of its own, so a vocabulary takes more memory than a small model."""
    import gguf

    count, path = 3000, tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{number}" for number in range(count)])
    writer.add_token_types([1] * count)
    writer.add_token_merges([f"to ken{number}" for number in range(count)])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    tracemalloc.start()
    reader = gguf.GGUFReader(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.fields
    assert count * TOKEN_BYTES == pytest.approx(held, rel=0.15)


@dataclass
class NoRun:
    """What a forecast asks of a run whose parts are not simulated."""

    base: Any
    execution: ExecutionSettings | None = None
    device: torch.device = CPU
    companions: dict[str, Any] = field(default_factory=dict)


def test_answers_keys_and_values_and_an_initialisation_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An initialisation is freed before the optimizer's state is made."""
    monkeypatch.setattr("tunekit.planning.forecast.peak_bytes", lambda *_, **__: PeakBytes(50, 5, 20, 10, 15, 100))
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    base: Any = SimpleNamespace(
        net=SimpleNamespace(config=config), facts=SimpleNamespace(layers=3), dtype=torch.float16
    )
    batch, nothing = cast(Any, SimpleNamespace(sequences=range(5))), cast(Any, None)
    for start, total in ((0, 100), (20, 100), (30, 110)):
        forecast = Forecast(
            cast(Any, NoRun(base)), nothing, 0, nothing, nothing, batch, answer_tokens=7, initialisation_bytes=start
        )
        vars(forecast).update(dict.fromkeys(("_step", "_evaluation", "_rehearsal", "_load_bytes"), lambda _: None))
        assert forecast.peak(ExecutionSettings()).total == total
    assert forecast._cache_bytes == 2 * 3 * 5 * 7 * (2 * 8) * 2  # of both, layers, rows, tokens, width, bytes


def test_an_embedding_that_is_mapped_counts_the_rows_that_are_read() -> None:
    """Each with the 2 MiB that the kernel maps at once, of a file in its cache."""
    row_bytes, rows = 4096, 10_000
    assert untouched_bytes([0, 1, 2], row_bytes, rows * row_bytes) == rows * row_bytes - 2 * 2**20
    assert untouched_bytes(range(10_000), row_bytes, rows * row_bytes) == 0


def test_probes_look_up_no_row_that_the_run_does_not(tiny_llama: Path) -> None:
    case = make_case(tiny_llama, make_rows(4), training=TrainingSection(max_steps=1, epochs=None))
    looked_up: set[int] = set()
    embedding: Any = case.model.base.net.get_submodule("model.embed_tokens")
    embedding.register_forward_pre_hook(lambda _, inputs: looked_up.update(inputs[0].flatten().tolist()))
    known = torch.tensor([[5, 9, 11], [5, 200, 0]])
    assert packing_leak(case.model, known) < 1e-5
    assert logprob_difference(case.model, {"input_ids": known}) < 1e-5
    assert len(looked_up) > 2
    assert looked_up <= set(known.flatten().tolist())


@pytest.mark.parametrize(
    ("setting", "available", "expected"),
    [
        (True, 10**9, 8),
        (False, 1000, 0),
        (3, 700, 3),
        (3, 699, None),
        (100, 200, 8),
        ("auto", math.inf, 0),
        ("auto", 1000, 0),
        ("auto", 700, 3),
        ("auto", 699, 4),
        ("auto", 300, 7),
        ("auto", 200, None),  # never the last layer
    ],
)
def test_the_fewest_layers_that_fit_are_recomputed(setting: Any, available: float, expected: int | None) -> None:
    space = SearchSpace([(1, 1)], [64], setting, layers=8)
    time = partial(relative_time, device="cpu", layers=8, row_tokens=10, step_tokens=10, head_share=0.1)
    asked: list[int] = []

    def excess(choice: ExecutionSettings) -> float:
        asked.append(choice.checkpointed_layers)
        return 1000 - 100 * choice.checkpointed_layers - available

    found = fastest(space, time, excess)
    assert (None if found is None else found.checkpointed_layers) == expected
    assert len(set(asked)) <= 5, "each is a simulation"


SECOND = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 400\nfile 300\nshmem 100"}
FIRST = {
    "memory.limit_in_bytes": "1000",
    "memory.usage_in_bytes": "700",
    "memory.stat": "cache 1\ntotal_cache 300\ntotal_shmem 100",
}


@pytest.mark.parametrize(
    ("groups", "place", "files", "expected"),
    [
        ("0::/", "", {**SECOND, "memory.max": "max"}, None),
        ("0::/", "", SECOND, 500),
        ("0::/docker/1a2b", "", SECOND, 500),  # a container's own group is the root of the mount
        ("0::/system.slice/job_7/step_0", "system.slice/job_7", SECOND, 500),  # of SLURM
        ("2:cpu:/\n1:memory:/slurm/job_7\n0::/", "memory/slurm/job_7", FIRST, 500),
        ("2:cpu:/slurm/job_7", "memory/slurm/job_7", FIRST, None),
        ("0::/", "", {}, None),
    ],
)
def test_free_memory_is_within_the_limits_of_all_control_groups(
    tmp_path: Path, groups: str, place: str, files: dict[str, str], expected: int | None
) -> None:
    (tmp_path / "groups").write_text(groups + "\n")
    (folder := tmp_path / "mounts" / place).mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    assert _group_available(tmp_path / "groups", tmp_path / "mounts") == expected
    assert _group_available(tmp_path / "none", tmp_path / "mounts") is None


def load_bench() -> ModuleType:
    path = Path(__file__).resolve().parent.parent.parent / "scripts" / "bench" / "estimate.py"
    spec = importlib.util.spec_from_file_location("bench_estimate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
@pytest.mark.parametrize(("adapter", "quantization"), [("lora", "none"), ("lora", "nf4"), ("full", "none")])
def test_a_fresh_process_grows_as_predicted(adapter: str, quantization: str, tmp_path: Path) -> None:
    """Over as many steps as a heap needs to settle.

    Libraries and compiled kernels beside the tensors take 45 to 100 MB, by the processor. A run of a tiny base has them
    too, so that the difference of the two runs holds tensors and freed blocks alone.
    """
    bench = load_bench()
    recipe = {
        "model": {"name_or_path": "replaced", "dtype": "float32", "quantization": quantization},
        "data": {"train": "rows.jsonl", "max_length": 256, "packing": False},
        "adapter": {"method": adapter},
        "training": {"max_steps": bench.STEPS, "micro_batch_size": 2, "gradient_accumulation_steps": 1},
        "output": {"dir": "run"},
    }
    sizes = {
        "large": {"family": "llama", "layers": 12, "hidden": 768},
        "tiny": {"family": "llama", "layers": 2, "hidden": 64, "vocabulary": 512},
    }
    rows = [bench.make_row(name, recipe, model, {"count": 6, "tokens": 256}, tmp_path) for name, model in sizes.items()]
    large, tiny = (bench.judge(row, tmp_path) for row in rows)
    assert tiny["measured"] < tiny["predicted"], "the constant is enough for what the process itself takes"
    predicted, measured = (large[name] - tiny[name] for name in ("predicted", "measured"))
    assert measured > 250e6
    assert -0.05 < predicted / measured - 1 < 0.15, (large, tiny)


def test_a_run_measures_its_memory_from_after_planning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planning imports the libraries: they are no part of what is compared with the prediction."""
    order: list[str] = []

    def noted(module: Any, name: str) -> Any:
        original = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            result = original(*given, **named)
            order.append(name)
            return result

        return call

    for module, name in ((ranks, "plan_together"), (ranks, "resident_bytes"), (begin, "load_model")):
        monkeypatch.setattr(module, name, noted(module, name))
    recipe = Path(__file__).parent.parent.parent / "recipes" / "smoke.yaml"
    train_verb(load_recipe(recipe, [f"output.dir={tmp_path / 'run'}"]), False, True)
    assert order == ["plan_together", "resident_bytes", "load_model"]


def test_kto_s_mismatched_rows_are_simulated_as_long_as_they_get(wide_llama: Path) -> None:
    """The longest prompt with the longest answer, each of a different row: longer than every row of the files."""
    kind = objective_of(KtoSettings()).rows
    sizes = [(200, 8), (8, 200)] * 3  # of prompt and answer
    rows = [kind.make_row(answered(*each, number), f"d:{number}", number) for number, each in enumerate(sizes)]
    objective = objective_of(KtoSettings()).learn([rows])  # type: ignore[list-item]
    batches = [kind.collate([[rows[at]], [rows[at + 2]]]) for at in (0, 1)]
    model = ModelSection(name_or_path=str(wide_llama), dtype="float32", attention="eager")
    choice = ExecutionSettings(checkpointed_layers=3)
    meta = make_meta_model(model, device=CPU)
    run = SimulatedRun(meta, LoraSettings(r=8), objective, TrainingSection(), choice, CPU)
    base = load_model(model, device=CPU)
    tuned = prepare_network(base, choice, partial(attach_adapter, base.net, run.adapter, seed=0, head_name="lm_head"))
    tracker = StorageTracker(CPU)
    with tracker:
        tracker.adopt([*base.net.parameters(), *base.net.buffers()], "weights")
        tracker.start()
        objective.prepare_step(ModelRun(tuned, kind), StepBatches(0, 0.0, (0, 1), tuple(batches)))
    assert tracker.peak_total < run.evaluation(batches[0]).total < 1.2 * tracker.peak_total
    assert tracker.peak_total < run.training_step(batches[0]).total < 1.2 * tracker.peak_total


def answered(prompt: int, answer: int, number: int) -> dict[str, Any]:
    """Parts of a row of kto."""
    trained = np.arange(prompt + answer) >= prompt
    return parts_of(("completion", trained.astype(np.int32) + 1, trained), label=np.array([number % 3 > 0]))
