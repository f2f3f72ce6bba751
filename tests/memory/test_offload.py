"""Inputs of recomputed layers that wait on the host: order of copies, safety of buffers, no bit of difference."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import write_tiny_llama
from tests.support.loop_case import Case, assert_same_bits, make_case, make_rows
from tunekit.data.batching.steps import evaluation_batches
from tunekit.errors import NumericsError, ResourceError
from tunekit.evaluation.evaluator import Evaluation
from tunekit.evaluation.scores import summed_evaluation
from tunekit.memory.copies import Copier, StreamCopier
from tunekit.memory.offload import BoundaryStore, make_store, prepare_layers
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.training import TrainingSection

CPU = torch.device("cpu")
LAYERS = 5


class TriedCopies(Copier):
    """Copies that are as late as they may be, or as early, into memory that holds no number before."""

    def __init__(self, late: bool, waits: bool = True) -> None:
        super().__init__(CPU)
        self.late, self.waits = late, waits
        self.queue: list[Callable[[], Any]] = []  # asked for and not made: in order, as on a stream
        self.asked = 0
        self.events: list[str] = []
        self.slots: set[int] = set()  # addresses

    def memory(self, size_bytes: int, *, on_host: bool) -> Tensor:
        memory = super().memory(size_bytes, on_host=on_host).fill_(0xFF)  # NaN in every floating dtype
        (self.slots.add if on_host else self.slots.discard)(memory.data_ptr())
        return memory

    def start(self, copies: Any, after: Any) -> int:
        ((target, _),) = copies
        self.events.append("out" if target.data_ptr() in self.slots else "back")
        return self._ask(lambda: Copier.start(self, copies, after))

    def wait(self, copy: int) -> None:
        if self.waits:
            while self.queue and self.asked - len(self.queue) < copy:
                self.queue.pop(0)()

    def _ask(self, copy: Callable[[], Any]) -> int:
        self.asked += 1
        self.queue.append(copy)
        if not self.late:
            self.wait(self.asked)
        return self.asked


class PoisonedStore(BoundaryStore):
    """Memory is overwritten once it is released."""

    def drop(self, key: Hashable) -> None:
        entry = self._entries.get(key)
        super().drop(key)
        if not isinstance(entry, Tensor | None):
            entry.slot.fill_(0xFF)

    def _release(self, buffer: Any) -> None:
        super()._release(buffer)
        buffer.memory.fill_(0xFF)


def store_with(copier: Copier) -> BoundaryStore:
    return PoisonedStore(copier, min_bytes=0, min_tokens=0)


def values(number: int, size: int = 6) -> Tensor:
    return torch.full((2, size), float(number))


@pytest.mark.parametrize("late", [False, True])
def test_what_is_put_comes_back_in_any_order(late: bool) -> None:
    store = store_with(TriedCopies(late))
    for number in range(6):
        store.put(("a", number), values(number, 3 + number))
    for number in (5, 4, 0, 3, 3, 1, 2):
        assert torch.equal(store.take(("a", number)), values(number, 3 + number))
        store.prefetch(("a", number - 1))
        store.prefetch(("a", number - 2))
    with pytest.raises(KeyError):
        store.take(("b", 0))
    with pytest.raises(ValueError, match="already"):
        store.put(("a", 1), values(1))
    store.clear()
    assert (len(store), store.host_bytes) == (0, 0)


@pytest.mark.parametrize("late", [False, True])
def test_a_taken_tensor_stays_until_the_next_is_taken(late: bool) -> None:
    store = store_with(TriedCopies(late))
    for number in range(4):
        store.put(number, values(number))
    for number in (3, 2, 1, 0):
        taken = store.take(number)
        for other in range(4):
            store.prefetch(other)
        assert torch.equal(taken, values(number)), "a buffer was filled while it was in use"


def test_a_missing_wait_is_found() -> None:
    store = store_with(TriedCopies(late=True, waits=False))
    store.put(0, values(0))
    assert store.take(0).isnan().all()


def test_slots_are_used_again_and_small_tensors_stay() -> None:
    copies = TriedCopies(late=False)
    store = BoundaryStore(copies, min_bytes=40, min_tokens=2)
    for _ in range(3):
        for number in range(4):
            store.put(number, values(number, 10))
        assert store.host_bytes == 4 * 128, "80 bytes in slots of 128"
        for number in range(4):
            store.drop(number)
    assert copies.events == ["out"] * 12
    small, few, gaps = values(1, 4), torch.zeros(1, 100), torch.zeros(100, 2).t()
    for number, tensor in enumerate((small, few, gaps)):
        store.put(number, tensor)
        assert store.take(number).data_ptr() == tensor.data_ptr()
    nowhere = BoundaryStore(None, 0, 0)
    nowhere.put(0, values(0))
    assert torch.equal(nowhere.take(0), values(0))
    assert nowhere.host_bytes == 0


def test_what_leaves_is_held_two_deep_and_then_waited_for() -> None:
    """Its memory is free for others as soon as two more have left, or something is wanted back."""
    waited: list[int] = []

    class Counted(Copier):
        def start(self, copies: Any, after: Any) -> int:
            super().start(copies, after)
            return len(waited) + 100

        def wait(self, copy: int) -> None:
            waited.append(copy)

    store = BoundaryStore(Counted(torch.device("cpu")), 0, 0)
    kept = [torch.full((4, 4), float(number)) for number in range(4)]
    for number, tensor in enumerate(kept):
        store.put(number, tensor)
        assert len(waited) == max(0, number - 1)
    assert torch.equal(store.take(3), kept[3])
    assert len(waited) == 5  # both that were leaving, and the one that came back


def test_tensors_stay_once_the_host_has_no_more_memory_to_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports this as the GPU's out-of-memory error, after which smaller micro-batches would be tried."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    copier = object.__new__(StreamCopier)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ResourceError, match=r"1.0 KiB of the host's memory cannot be pinned.*memory\.streaming"):
        copier.memory(1024, on_host=True)
    store = BoundaryStore(copier, 0, 0)
    tensor = values(3)
    store.put(0, tensor)
    assert store.take(0).data_ptr() == tensor.data_ptr()
    assert (store.offloads, store.host_bytes) == (False, 0)


def test_auto_leaves_a_cpu_alone() -> None:
    assert not make_store("auto", CPU).offloads
    assert not make_store(False, torch.device("cuda"), simulated=True).offloads
    on_cpu, on_gpu = make_store(True, CPU), make_store("auto", torch.device("cuda"), simulated=True)
    assert on_cpu.offloads
    assert on_gpu.offloads
    assert (on_cpu.min_bytes, on_gpu.min_bytes, on_gpu.min_tokens) == (0, 2 * 2**20, 512)


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("deep"), layers=LAYERS, hidden=32)


def start(folder: Path, store: BoundaryStore | None, checkpointed: int, **changes: Any) -> Case:
    section = TrainingSection(
        learning_rate=1e-2, micro_batch_size=2, gradient_accumulation_steps=3, epochs=None, max_steps=3,
        warmup_ratio=None,
    )  # fmt: skip
    given: dict[str, Any] = {"adapter": LoraSettings(r=4, dropout=0.2), "packing": True} | changes
    return make_case(folder, make_rows(17), training=section, checkpointed=checkpointed, store=store, **given)


def run_step(case: Case) -> None:
    """Forward and backward of the first step."""
    step = next(iter(case.steps.after(0)))
    with case.model.training_mode(True):
        case.step(step)


@pytest.fixture(scope="module")
def plain(deep_llama: Path) -> dict[str, Tensor]:
    case = start(deep_llama, None, 0)
    case.run()
    return case.state()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("checkpointed", [2, 4, LAYERS])
def test_a_run_is_the_same_bit_for_bit(
    deep_llama: Path, plain: dict[str, Tensor], checkpointed: int, late: bool
) -> None:
    copies = TriedCopies(late)
    store = store_with(copies)
    case = start(deep_llama, store, checkpointed)
    case.run()
    assert_same_bits(case.state(), plain)
    micro_batches = sum(len(step.batches) for step in case.steps.after(0))
    moved = micro_batches * (checkpointed - 1)  # all but the last recomputed layer
    assert copies.events.count("out") == moved
    assert copies.events.count("back") == moved, "each comes back once"
    assert len(store) == 0, "nothing is left when a step is over"


def test_a_tensor_is_on_its_way_while_the_layer_above_runs(deep_llama: Path) -> None:
    """The copy of layer i - 1 is asked for before layer i is recomputed."""
    copies = TriedCopies(late=True)
    store, order = store_with(copies), copies.events
    case = start(deep_llama, store, LAYERS)
    for number, (_, layer) in enumerate(case.model.base.family.layers(case.model.base.net)):
        layer.self_attn.register_forward_pre_hook(lambda *_, name=str(number): order.append(name))  # type: ignore[misc]
    run_step(case)
    assert order[:18] == [
        *("out", "0", "out", "1", "out", "2", "out", "3", "4"),
        *("back", "4", "back", "3", "back", "2", "back", "1", "0"),
    ]


def test_a_run_without_waits_goes_wrong(deep_llama: Path, plain: dict[str, Tensor]) -> None:
    case = start(deep_llama, store_with(TriedCopies(late=True, waits=False)), LAYERS)
    with pytest.raises(NumericsError, match="not finite"):
        case.run()


def test_evaluation_in_between_touches_nothing(deep_llama: Path, plain: dict[str, Tensor]) -> None:
    copies = TriedCopies(late=True)
    case = start(deep_llama, store_with(copies), LAYERS)
    batches = list(evaluation_batches(make_rows(4), case.parts.objective.rows, batch_size=2))
    losses: list[float] = []

    def evaluate() -> Evaluation:
        before = len(copies.events)
        sums = summed_evaluation(case.model, case.parts.objective, batches, case.parts.devices)
        losses.append(sums.values["loss"])
        assert len(copies.events) == before
        return Evaluation(sums, {"loss": losses[-1]})

    case.evaluate_with(evaluate)
    case.parts.training = case.training.model_copy(update={"eval_steps": 1})
    case.run()
    assert len(losses) >= 3
    assert_same_bits(case.state(), plain)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_after_a_failed_step_the_next_one_is_right(deep_llama: Path, when: str) -> None:
    """Nothing that the failed step had put away is left, although torch may hold on to its graph."""
    copies = TriedCopies(late=True)
    store = store_with(copies)
    case = start(deep_llama, store, LAYERS)
    calls = {"forward": 0}
    layer = case.model.base.family.layers(case.model.base.net)[3 if when == "forward" else 1][1]

    def fail(*_: Any) -> None:
        calls["forward"] += 1
        if calls["forward"] == (1 if when == "forward" else 2):
            raise MemoryError("no room")

    hook = layer.self_attn.register_forward_pre_hook(fail)  # type: ignore[union-attr, operator]
    with pytest.raises(MemoryError):
        run_step(case)
    assert copies.events.count("out") == LAYERS - 1
    hook.remove()
    assert (len(store), store.host_bytes) == (0, 0)
    case.optimizer.zero_gradients()
    run_step(case)
    other = start(deep_llama, None, 0)
    run_step(other)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(case.optimizer.gradients(), other.optimizer.gradients(), strict=True)
    )
    assert len(store) == 0


def test_without_copies_a_failed_step_keeps_no_input_either(deep_llama: Path) -> None:
    store = BoundaryStore(None)
    case = start(deep_llama, store, LAYERS)
    kept: list[int] = []
    layer = case.model.base.family.layers(case.model.base.net)[1][1]

    def fail(*_: Any) -> None:
        kept.append(len(store))
        if len(kept) == 2:
            raise MemoryError("no room")

    layer.self_attn.register_forward_pre_hook(fail)  # type: ignore[union-attr, operator]
    with pytest.raises(MemoryError):
        run_step(case)
    assert kept == [2, 2]
    assert len(store) == 0


def test_two_forwards_may_be_alive_at_once(deep_llama: Path) -> None:
    """As where a loss takes two of them: backward goes through one and then the other."""
    gradients = []
    for store in (None, store_with(TriedCopies(late=True))):
        case = start(deep_llama, store, LAYERS, adapter=LoraSettings(r=4))
        batch = next(iter(case.steps.after(0))).batches[0]
        inputs = batch.inputs
        with case.model.training_mode(True):
            first, second = case.model.hidden(inputs), case.model.hidden(inputs)
            (first.square().sum() + second.sum()).backward()  # type: ignore[no-untyped-call]
        gradients.append(case.optimizer.gradients()[0].clone())
        assert store is None or len(store) == 0
    assert torch.equal(*gradients)


def test_a_layer_may_run_more_than_once_in_a_forward() -> None:
    gradients = []
    for store in (None, store_with(TriedCopies(late=True))):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4) for _ in range(3)]
        prepare_layers(layers, 0 if store is None else 3, store)
        x = torch.ones(2, 3, 4)
        for number in (0, 1, 1, 0, 0, 2, 1):
            x = layers[number](x).tanh()
        x.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([layer.weight.grad for layer in layers])
        assert store is None or len(store) == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_streams_bring_back_every_bit() -> None:
    device = torch.device("cuda")
    store = store_with(StreamCopier(device))
    kept = [torch.randn(512, 4096, device=device) for _ in range(6)]
    for number, tensor in enumerate(kept):
        store.put(number, tensor)
    for number in reversed(range(6)):
        taken = store.take(number)
        store.prefetch(number - 1)
        busy = torch.randn(2048, 2048, device=device)
        for _ in range(20):
            busy = busy @ busy / 50
        assert torch.equal(taken, kept[number])
    store.clear()
