"""A micro-batch that runs out of memory is split: the same tokens, the same gradient, the same run; told and kept."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.data_case import objective_of
from tests.support.loop_case import Case, make_case, make_rows
from tests.support.train_case import records, train_in_child, write_recipe
from tunekit.contracts import IGNORED, Batch, ModelOutput, StepBatches
from tunekit.data.batching.split import split_batch
from tunekit.data.batching.steps import collate
from tunekit.errors import ResourceError, exit_message, is_out_of_memory
from tunekit.evaluation.scores import summed_evaluation
from tunekit.memory.splitting import Splitting
from tunekit.recipe.training import TrainingSection
from tunekit.records import Reaction
from tunekit.training.begin import try_longest_batch
from tunekit.training.engine import StepResult

ROWS = make_rows(24, shortest=3, longest=20)
CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def batch_of(groups: list[tuple[int, ...]]) -> Batch:
    return collate(ROWS, groups, objective_of().rows)


def targets(batch: Batch) -> list[tuple[str, int, int]]:
    """Every supervised token: its row, its position there, and the token."""
    found = []
    positions, labels = batch.inputs["position_ids"], batch.targets["labels"]
    for line, (rows, length) in enumerate(zip(batch.sequences, batch.lengths, strict=True)):
        document = -1
        for at in range(length):
            position = int(positions[line, at])
            document += position == 0
            if labels[line, at] != IGNORED:
                found.append((rows[document].origin, position, int(labels[line, at])))
    return found


@pytest.mark.parametrize("groups", [[(0,), (5,), (2,)], [(0, 1), (2, 3, 4)], [(7, 1, 4, 9)], [(3, 3)]])
def test_halves_hold_every_target_once_and_in_order(groups: list[tuple[int, ...]]) -> None:
    batch = batch_of(groups)
    halves = split_batch(batch, objective_of().rows)
    assert halves is not None
    assert [target for half in halves for target in targets(half)] == targets(batch)
    assert sum(half.supervised for half in halves) == batch.supervised
    assert sum(half.tokens for half in halves) == batch.tokens
    assert [row.origin for half in halves for row in half.rows] == [row.origin for row in batch.rows]
    for half in halves:
        ids = half.inputs["input_ids"]
        assert ids.shape == (len(half.lengths), max(half.lengths)), "no padding that nobody needs"
        assert ids.numel() == half.padded < batch.padded


def test_packed_rows_are_split_in_their_middle() -> None:
    halves = split_batch(batch_of([(4, 4, 4, 4)]), objective_of().rows)
    assert halves is not None
    assert [len(half.rows) for half in halves] == [2, 2]


def test_a_single_document_is_not_split() -> None:
    assert split_batch(batch_of([(4,)]), objective_of().rows) is None


def test_the_allocators_own_errors_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(CUDA_ERROR)
    assert is_out_of_memory(RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "HIP error: out of memory\nHIP kernel errors might be ...",
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "GET was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
    ],
)
def test_errors_of_drivers_and_libraries_say_that_memory_ran_out(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert exit_message(RuntimeError(message))[1] == ResourceError.exit_code


def make_model(tiny_llama: Path, **changes: Any) -> Case:
    values: dict[str, Any] = {"learning_rate": 1e-2, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
    training = TrainingSection(**(values | {"epochs": None, "max_steps": 4, "warmup_ratio": None} | changes))
    return make_case(tiny_llama, ROWS, training=training)


@contextmanager
def failing(case: Case, *, tokens: int, where: str) -> Iterator[list[int]]:
    """Batches of so many padded tokens run out of memory: as the forward begins, or in the middle of the backward
    pass, when some gradients have been added to already. Yields the sizes of those that failed."""
    output, failed = case.model.output, []

    def run(inputs: dict[str, torch.Tensor]) -> ModelOutput:
        size = inputs["input_ids"].numel()
        if size < tokens:
            return output(inputs)
        failed.append(size)
        if where == "forward":
            raise CUDA_ERROR

        def begin(module: object, given: object, found: Any) -> None:
            (found[0] if isinstance(found, tuple) else found).register_hook(fail)

        def fail(gradient: torch.Tensor) -> None:  # once the layers behind have their gradients
            assert any(gradient.any() for gradient in case.optimizer.gradients())
            raise MemoryError

        handle = case.model.base.net.get_submodule("model.layers.0").register_forward_hook(begin)
        try:
            return output(inputs)
        finally:
            handle.remove()

    case.model.output = run  # type: ignore[method-assign]
    try:
        yield failed
    finally:
        del case.model.output


def gradient(case: Case, step: StepBatches, splitting: Splitting | None = None) -> tuple[torch.Tensor, StepResult]:
    case.optimizer.zero_gradients()
    with case.model.training_mode(True):
        result = case.step(step, micro_batches=len(step.batches), splitting=splitting)
    return torch.cat(case.optimizer.gradients()).clone(), result


@pytest.mark.sampled(1)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_a_split_batch_is_that_of_the_whole(tiny_llama: Path, where: str, packed: bool) -> None:
    case = make_model(tiny_llama)
    for parameter in case.adapter.trained().values():  # B = 0 would leave half of the gradient 0
        torch.nn.init.normal_(parameter.data, std=0.05)
    groups = [(0, 1), (2, 3), (4, 5, 6), (7,)] if packed else [(0,), (9,), (17,), (3,)]
    last = [(10, 11, 12, 13)] if packed else [(5,), (6,)]
    step = StepBatches(2, 0.0, (0, 1), (batch_of(groups), batch_of(last)))
    expected, whole = gradient(case, step)
    reactions: list[Reaction] = []
    splitting = Splitting(reactions.append)
    limit = 36 if packed else 30
    with failing(case, tokens=limit, where=where) as failed:
        found, split = gradient(case, step, splitting)
        assert failed, "something did run out of memory"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()) + 1e-8)
        assert float(split.total) == pytest.approx(float(whole.total), rel=1e-6)
        assert len(split.losses) == 2, "one for each micro-batch, whatever it was split into"
        assert {reaction.step for reaction in reactions} == {3}
        assert len(reactions) == len(failed)
        before = len(failed)
        again, _ = gradient(case, step, splitting)
        assert len(failed) == before, "what is as large is split before it fails"
        assert torch.equal(again, found)
    assert float(expected.abs().max()) > 0


def test_a_document_that_does_not_fit_alone_is_an_error_of_its_own(tiny_llama: Path) -> None:
    case = make_model(tiny_llama)
    step = StepBatches(0, 0.0, (0,), (batch_of([(17,), (9,)]),))
    with failing(case, tokens=15, where="forward"), pytest.raises(ResourceError) as caught:
        gradient(case, step, Splitting())
    assert caught.value.exit_code == 4
    assert "rows:18" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_one_of_memory(tiny_llama: Path) -> None:
    case = make_model(tiny_llama)

    def fail(inputs: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    case.model.output = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes"):
        gradient(case, StepBatches(0, 0.0, (0,), (batch_of([(0,), (1,)]),)), Splitting())


@pytest.mark.drawn
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_with_split_batches_is_the_plain_run(tiny_llama: Path, where: str) -> None:
    plain = make_model(tiny_llama)
    plain.run()
    case = make_model(tiny_llama)
    reactions: list[Reaction] = []
    case.parts.splitting = Splitting(reactions.append)
    with failing(case, tokens=30, where=where):
        case.run()
    assert reactions
    assert case.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, value in plain.adapter.trained().items():
        torch.testing.assert_close(case.adapter.trained()[name], value, rtol=1e-3, atol=1e-3)


def test_an_evaluation_batch_that_does_not_fit_is_split(tiny_llama: Path) -> None:
    case = make_model(tiny_llama)
    batches = [batch_of([(0,), (9,), (17,), (3,)]), batch_of([(1,), (2,)])]
    objective, devices = case.parts.objective, case.parts.devices
    whole = summed_evaluation(case.model, objective, batches, devices)
    split: list[str] = []
    with failing(case, tokens=30, where="forward"):
        found = summed_evaluation(case.model, objective, batches, devices, on_split=split.append)
    assert split[0] == "a batch of 4 x 20 tokens"
    assert found.values["loss"] == pytest.approx(whole.values["loss"], rel=1e-6)
    units, expected = found.values["units"], whole.values["units"]
    assert (units, found.tokens, found.rows) == (expected, whole.tokens, whole.rows)
    assert (units, found.tokens) == tuple(
        sum(getattr(batch, name) for batch in batches) for name in ("supervised", "tokens")
    )


def test_no_graph_of_a_micro_batch_lives_while_the_next_one_runs(tiny_llama: Path) -> None:
    """Its nodes are small objects between the freed blocks: the heap of a CPU run grew by a third."""
    case, lost = make_model(tiny_llama), []
    measure, output = case.parts.objective.loss.loss, case.model.output

    def loss(*given: Any) -> Any:
        found = measure(*given)
        lost.append(weakref.ref(found))
        return found

    def begin(inputs: dict[str, torch.Tensor]) -> Any:
        assert all(reference() is None for reference in lost)
        return output(inputs)

    object.__setattr__(case.parts.objective.loss, "loss", loss)
    case.model.output = begin  # type: ignore[method-assign]
    case.run()
    assert len(lost) == 8


def test_trying_the_longest_batch_changes_no_bit(tiny_llama: Path) -> None:
    results = []
    for tries in (False, True):
        case = make_model(tiny_llama)
        if tries:
            state = torch.random.get_rng_state()
            try_longest_batch(case.parts, batch_of([(17,)] * 4))
            assert torch.equal(torch.random.get_rng_state(), state)
            assert all(not gradient.any() for gradient in case.optimizer.gradients())
        case.run()
        results.append((case.losses, {name: value.clone() for name, value in case.adapter.trained().items()}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def fail_large(tokens: int) -> Callable[[], None]:
    """Makes every training forward of so many padded tokens run out of memory, in the process that calls it."""

    def install() -> None:
        from tunekit.tuned.model import TunedModel

        output = TunedModel.output

        def run(self: TunedModel, inputs: dict[str, torch.Tensor]) -> ModelOutput:
            if torch.is_grad_enabled() and inputs["input_ids"].numel() >= tokens:
                raise CUDA_ERROR
            return output(self, inputs)

        TunedModel.output = run  # type: ignore[method-assign]

    return install


@pytest.mark.drawn
def test_a_whole_run_tells_and_keeps_what_was_split(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama, adapter={"dropout": 0.0}, training={"epochs": 1.0})
    for name, before in (("plain", lambda: None), ("split", fail_large(100))):
        ended = train_in_child(recipe, tmp_path / name, before=before)
        assert ended.code == 0, ended.output
    assert "ran out of memory" in ended.output
    losses = {
        name: [entry["loss"] for entry in records(tmp_path / name) if "loss" in entry] for name in ("plain", "split")
    }
    assert losses["split"] == pytest.approx(losses["plain"], rel=1e-5)
    report = json.loads((tmp_path / "split" / "report.json").read_text())
    assert report["reactions"]
    assert all("ran out of memory" in reaction["probe"] and reaction["step"] >= 1 for reaction in report["reactions"])
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["reactions"] == []


def test_one_row_too_large_ends_the_run_with_code_4(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", tiny_llama)
    ended = train_in_child(recipe, tmp_path / "run", before=fail_large(1))
    assert ended.code == 4
    assert "single document" in ended.output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 4
