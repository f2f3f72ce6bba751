"""The loop's promises: steps, recomputation, non-finite numbers, evaluation without effect, resume, early stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.support.data_case import objective_of
from tests.support.loop_case import Case, ListedRows, assert_same_bits, make_case, make_rows
from tunekit.contracts import StepBatches
from tunekit.data.batching.steps import StoredSteps, collate, evaluation_batches
from tunekit.errors import DataError, InputError, NumericsError, Stopped
from tunekit.evaluation.evaluator import Evaluation
from tunekit.evaluation.scores import EvaluationStopped, EvaluationSums, summed_evaluation
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.training import TrainingSection
from tunekit.records import EvaluationRecord, StepRecord
from tunekit.training.engine import StepResult, StepWork
from tunekit.training.run import Run
from tunekit.training.state import LoopState, checkpoint_facts, checkpoint_tensors, restore
from tunekit.training.step_numbers import StepNumbers


def training(**changes: Any) -> TrainingSection:
    values: dict[str, Any] = {
        "learning_rate": 1e-2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": None,
        "max_steps": 6,
        "warmup_ratio": None,
    }
    return TrainingSection(**(values | changes))


def weights(case: Case) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in case.adapter.trained().items()}


def test_the_last_partial_window_is_stepped_with_its_own_count(tiny_llama: Path) -> None:
    rows = make_rows(23)
    case = make_case(tiny_llama, rows, training=training(gradient_accumulation_steps=5, epochs=1.0, max_steps=None))
    state = case.run()
    steps = [record for record in case.records if isinstance(record, StepRecord)]
    assert [record.step for record in steps] == [1, 2, 3]
    assert state.step == case.steps.count == 3
    assert sum(record.tokens for record in steps) == int(rows.lengths.sum())
    assert sum(record.supervised_tokens for record in steps) == int(rows.supervised.sum())
    assert steps[2].tokens < steps[0].tokens
    assert steps[2].epoch == 1.0
    assert case.saved == [3]


def test_the_gradients_are_those_of_all_ranks(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second rank that has the same gradients."""
    norms = []
    for times in (1, 2):
        case = make_case(tiny_llama, make_rows(8), training=training(max_steps=1))
        doubled = lambda tensors, times=times: [tensor.mul_(times) for tensor in tensors]  # noqa: E731
        monkeypatch.setattr(case.parts.devices, "sum_in_place", doubled)
        case.run()
        norms.append(case.records[0].grad_norm)
    assert norms[1] == pytest.approx(2 * norms[0])


@pytest.mark.drawn
def test_checkpointed_layers_change_no_bit_with_dropout(tiny_llama: Path) -> None:
    rows = make_rows(23)
    adapter = LoraSettings(r=4, dropout=0.3)
    results = []
    for checkpointed in (0, 1, 2):
        case = make_case(tiny_llama, rows, training=training(), adapter=adapter, checkpointed=checkpointed)
        case.run()
        results.append((case.losses, weights(case)))
    plain = make_case(tiny_llama, rows, training=training(), adapter=LoraSettings(r=4))
    plain.run()
    assert plain.losses != results[0][0]  # dropout was really on
    for losses, own in results[1:]:
        assert losses == results[0][0]
        assert_same_bits(own, results[0][1])


@pytest.mark.drawn
def test_micro_batch_size_is_only_a_memory_knob(tiny_llama: Path) -> None:
    rows = make_rows(40)
    curves = []
    for size, accumulation in ((1, 8), (2, 4), (8, 1)):
        section = training(micro_batch_size=size, gradient_accumulation_steps=accumulation)
        case = make_case(tiny_llama, rows, training=section)
        case.run()
        curves.append(case.losses)
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_the_loss_is_exact_over_batches_cut_by_tokens(tiny_llama: Path) -> None:
    """Batches of 1 to 20 rows: each step's loss is that of its rows one by one, and so are the next."""
    rows = make_rows(40)
    section = training(micro_batch_size=None, micro_batch_tokens=60, gradient_accumulation_steps=3, max_steps=3)
    case, alone = make_case(tiny_llama, rows, training=section), make_case(tiny_llama, rows, training=section)
    counts = {len(batch.lengths) for step in case.steps.after(0) for batch in step.batches}
    assert len(counts) > 2, "they are uneven"
    case.run()
    alone.parts.steps = OneByOne(alone.steps, rows)
    alone.run()
    assert alone.losses == pytest.approx(case.losses, rel=1e-5)


class OneByOne:
    """The same steps, every row a micro-batch of its own."""

    def __init__(self, steps: StoredSteps, rows: ListedRows) -> None:
        self.count, self._steps, self._rows = steps.count, steps, rows

    def after(self, first_step: int) -> Iterator[StepBatches]:
        for step in self._steps.after(first_step):
            numbers = [row.number for batch in step.batches for row in batch.rows]
            batches = tuple(collate(self._rows, [(number,)], objective_of().rows) for number in numbers)
            yield StepBatches(step.step, step.epoch, tuple(range(len(batches))), batches)


def test_resume_between_any_two_steps_changes_no_bit(tiny_llama: Path) -> None:
    rows, section, adapter = make_rows(23), training(max_steps=5), LoraSettings(r=4, dropout=0.2)
    whole = make_case(tiny_llama, rows, training=section, adapter=adapter)
    whole.run()
    for stop in (1, 3):
        first = make_case(tiny_llama, rows, training=section, adapter=adapter)
        first.parts.session.stop_signal = lambda step, first=first, stop=stop: 15 if len(first.losses) >= stop else 0
        state = LoopState()
        with pytest.raises(Stopped) as caught:
            first.run(state)
        assert caught.value.exit_code == 143
        assert first.saved == [stop]
        tensors = {name: value.clone() for name, value in checkpoint_tensors(first.optimizer, first.adapter).items()}
        facts = checkpoint_facts(first.optimizer, state, {})
        second = make_case(tiny_llama, rows, training=section, adapter=adapter)
        second.run(restore(tensors, facts, second.optimizer, second.adapter))
        assert first.losses + second.losses == whole.losses
        assert_same_bits(weights(second), weights(whole))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_train_and_resume_bit_for_bit(tiny_llama: Path, optimizer: str) -> None:
    rows, section = make_rows(12), training(max_steps=4, optimizer=optimizer)
    whole = make_case(tiny_llama, rows, training=section)
    whole.run()
    first = make_case(tiny_llama, rows, training=section)
    first.parts.session.stop_signal = lambda step: 15 if len(first.losses) >= 2 else 0
    state = LoopState()
    with pytest.raises(Stopped):
        first.run(state)
    tensors = {name: value.clone() for name, value in checkpoint_tensors(first.optimizer, first.adapter).items()}
    second = make_case(tiny_llama, rows, training=section)
    facts = checkpoint_facts(first.optimizer, state, {})
    second.run(restore(tensors, facts, second.optimizer, second.adapter))
    assert_same_bits(weights(second), weights(whole))
    plain = make_case(tiny_llama, rows, training=training(max_steps=4))
    plain.run()
    assert whole.losses == pytest.approx(plain.losses, rel=1e-3 if optimizer.endswith("8bit") else 1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_rows(tiny_llama: Path) -> None:
    case = make_case(tiny_llama, make_rows(8), training=training(learning_rate=1e-3, max_steps=4))
    embedding = case.model.base.net.get_input_embeddings().weight
    bad_id = int(case.steps._rows[5].parts["ids"][0])
    with torch.no_grad():
        embedding[bad_id] = float("nan")
    guilty = [row.origin for row in case.steps._rows.rows if bad_id in row.parts["ids"].tolist()]
    snapshots = [weights(case)]
    case.parts.record = lambda record: (case.records.append(record), snapshots.append(weights(case)))
    with pytest.raises(NumericsError) as caught:
        case.run()
    assert_same_bits(weights(case), snapshots[-1])
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert f"step {len(case.losses) + 1}: the loss is not finite" in message
    assert any(origin in message for origin in guilty)
    assert all(math.isfinite(loss) for loss in case.losses)
    assert case.saved == []


def test_an_infinite_learning_rate_ends_in_a_message_not_in_nan_weights(tiny_llama: Path) -> None:
    case = make_case(tiny_llama, make_rows(23), training=training(learning_rate=1e30, scheduler="constant"))
    with pytest.raises(NumericsError, match=r"step 2: the (loss|gradient) is not finite"):
        case.run()


def test_evaluation_changes_nothing(tiny_llama: Path) -> None:
    rows, adapter = make_rows(23), LoraSettings(r=4, dropout=0.3)
    plain = make_case(tiny_llama, rows, training=training(), adapter=adapter)
    plain.run()
    case = make_case(tiny_llama, rows, training=training(eval_steps=1), adapter=adapter)
    modes = dict[str, Any](inside=set())

    def evaluate() -> Evaluation:
        torch.rand(3)  # a metric that draws numbers
        net = case.model.base.net
        hook = net.get_input_embeddings().register_forward_hook(lambda *_: modes["inside"].add(net.training))
        batches = evaluation_batches(rows, case.parts.objective.rows, batch_size=4)
        sums = summed_evaluation(case.model, case.parts.objective, batches, case.parts.devices)
        hook.remove()
        modes["after"] = net.training
        return Evaluation(sums, sums.metrics(case.parts.objective.loss.metrics))

    case.evaluate_with(evaluate)
    case.run()
    assert case.losses == plain.losses
    assert_same_bits(weights(case), weights(plain))
    assert modes == {"inside": {False}, "after": True}
    assert len([record for record in case.records if isinstance(record, EvaluationRecord)]) == 7


def test_evaluation_does_not_depend_on_the_batch_size(tiny_llama: Path) -> None:
    rows = make_rows(23)
    case = make_case(tiny_llama, rows, training=training(max_steps=2))
    case.run()
    found = []
    for size in (1, 4, 23):
        batches = evaluation_batches(rows, case.parts.objective.rows, batch_size=size)
        found.append(summed_evaluation(case.model, case.parts.objective, batches, case.parts.devices))
    for sums in found:
        assert sums.metrics(["loss"])["loss"] == pytest.approx(found[0].metrics(["loss"])["loss"], rel=1e-6)
        assert sums.values["units"] == int(rows.supervised.sum())
        assert (sums.tokens, sums.rows) == (int(rows.lengths.sum()), 23)
        assert sums.values["correct"] == found[0].values["correct"]
        assert sum(sums.row_losses.values()) == pytest.approx(sums.values["loss"])
        assert [sums.row_losses[number] for number in range(23)] == pytest.approx(
            [found[0].row_losses[number] for number in range(23)], rel=1e-5
        )


def test_patience_stops_and_best_is_saved(tiny_llama: Path) -> None:
    """The evaluation before training is only compared with, however good it was."""
    case = make_case(tiny_llama, make_rows(23), training=training(max_steps=6, eval_steps=1))
    values = iter([0.5, 3.0, float("nan"), 2.0, 2.5, 2.0, 1.0])
    case.evaluate_with(lambda: Evaluation(EvaluationSums({}, 0, 0), {"loss": next(values)}))
    case.parts.evaluation = EvaluationSection(best="eval.loss", patience=2)
    kept: list[int] = []
    case.parts.keep_rows = lambda found: kept.append(case.parts.state.step)
    state = case.run()
    assert kept == [0, 1, 3]  # those of the best weights so far, which would be exported
    assert (state.step, state.best_step, state.best_value, state.stopped_early) == (5, 3, 2.0, True)
    assert case.saved == [1, 3, 5]


def test_an_evaluation_that_is_repeated_after_a_stop_is_saved(tiny_llama: Path) -> None:
    """The checkpoint of the stop has the values of the evaluation before it, and the best one must have its own."""
    rows, section = make_rows(23), training(max_steps=4, eval_steps=2)

    def case_of(stops: bool) -> tuple[Case, dict[int, dict[str, Any]]]:
        case, saved = make_case(tiny_llama, rows, training=section), dict[int, dict[str, Any]]()

        def evaluate() -> Evaluation:
            step = case.parts.state.step
            if stops and step == 2:
                case.parts.session.stop_signal = lambda step: 15
                raise EvaluationStopped
            return Evaluation(EvaluationSums({}, 0, 0), {"loss": abs(step - 2.0)}, facts={"step": step})

        def save() -> None:
            state = case.parts.state
            saved[state.step] = {"best": state.best_step, "facts": state.measured_facts}

        case.evaluate_with(evaluate)
        case.parts.save = save
        case.parts.evaluation = EvaluationSection(best="eval.loss")
        return case, saved

    (whole, expected), (first, stopped), (second, found) = map(case_of, (False, True, False))
    whole.run()
    second.run_after_a_stop(first, 99)
    assert stopped == {2: {"best": None, "facts": {"step": 0}}}
    assert found == expected == {2: {"best": 2, "facts": {"step": 2}}, 4: {"best": 2, "facts": {"step": 4}}}


def test_the_metrics_are_those_of_the_metrics_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunekit.evaluation.scores import EvaluationSums
    from tunekit.metrics import token_accuracy

    sums = EvaluationSums({"loss": 6.0, "correct": 1.0, "units": 4.0}, tokens=9, rows=1)
    assert sums.metrics(objective_of().loss.metrics) == {"loss": 1.5, "perplexity": pytest.approx(math.exp(1.5))}
    monkeypatch.setattr(token_accuracy, "from_sums", lambda sums: 0.125)
    assert sums.metrics(["token_accuracy"]) == {"token_accuracy": 0.125}


def test_an_evaluation_that_is_not_finite_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    from tunekit.artifacts.metrics_log import append_line, read_metrics, record_line

    log = tmp_path / "metrics.jsonl"
    append_line(log, record_line(EvaluationRecord(3, {"loss": math.nan, "perplexity": math.inf, "exact_match": 0.5})))
    assert read_metrics(log) == [{"step": 3, "eval": {"exact_match": 0.5}}]


def test_a_step_that_overflowed_is_recorded(tmp_path: Path) -> None:
    from tunekit.artifacts.metrics_log import append_line, read_metrics, record_line

    log = tmp_path / "metrics.jsonl"
    append_line(log, record_line(StepRecord(1, 0.1, 2.5, 1e-3, math.inf, 9, 4, 0.5, 18.0, 7)))
    assert [(record["loss"], record["grad_norm"]) for record in read_metrics(log)] == [(2.5, None)]


@pytest.fixture
def read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device."""
    monkeypatch.setattr("tunekit.training.run.Run.reads_later", True)


class ReadsForbidden(TorchDispatchMode):
    """Any read of a device's value would have to wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step waits for a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (2, 5), (100, 5)])
def test_numbers_read_one_step_later_are_the_same(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, every: int, steps: int
) -> None:
    rows, section = make_rows(23), training(max_steps=steps, save_steps=every)
    plain = make_case(tiny_llama, rows, training=section)
    plain.run()
    monkeypatch.setattr("tunekit.training.run.Run.reads_later", True)
    case = make_case(tiny_llama, rows, training=section)
    known: list[int] = []
    case.parts.save = lambda: (case.saved.append(case.parts.state.step), known.append(len(case.losses)))
    case.around_steps(lambda run, work: (time.sleep(0.02), run())[1])
    state = case.run()
    assert case.losses == plain.losses
    assert_same_bits(weights(case), weights(plain))
    assert case.saved == plain.saved == known, "a checkpoint waits for the numbers of its step"
    assert state.past_losses == plain.losses
    records = [record for record in case.records if isinstance(record, StepRecord)]
    assert [record.step for record in records] == list(range(1, steps + 1))
    assert all(record.seconds > 0.02 for record in records), "also before a pause, where two steps are read at once"


@pytest.mark.usefixtures("read_later")
def test_no_step_reads_a_value(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tiny_llama, make_rows(23), training=training(max_steps=4))
    order: list[str] = []
    plain = {name: getattr(Run, name) for name in ("begin_step", "finish_step", "_count_units", "settle")}
    read = StepNumbers.read

    def begin(self: Run, step: StepBatches) -> StepWork:
        order.append("step")
        with ReadsForbidden():
            return plain["begin_step"](self, step)

    def finish(self: Run, work: StepWork, result: StepResult) -> None:
        with ReadsForbidden():
            plain["finish_step"](self, work, result)

    def forbidden(run: Callable[[], StepResult], work: StepWork) -> StepResult:
        with ReadsForbidden():
            return run()

    case.around_steps(forbidden)
    monkeypatch.setattr(Run, "begin_step", begin)
    monkeypatch.setattr(Run, "finish_step", finish)
    for name in ("_count_units", "settle"):
        monkeypatch.setattr(Run, name, lambda self, *values, name=name: unwatched(plain[name], self, *values))
    monkeypatch.setattr(StepNumbers, "read", lambda self: (order.append("read"), read(self))[1])
    case.run()
    assert order == ["step", "step", "read", "step", "read", "step", "read", "read"]


def unwatched(plain: Any, *values: Any) -> Any:
    """Counts of tokens are the host's own, and numbers of an earlier step have arrived."""
    with _disable_current_modes():
        return plain(*values)


@pytest.mark.usefixtures("read_later")
def test_an_error_that_is_read_later_names_its_own_step_and_no_checkpoint_holds_it(tiny_llama: Path) -> None:
    case = make_case(tiny_llama, make_rows(23), training=training(max_steps=6, save_steps=2))
    poisoned, step = 3, list(case.steps.after(0))[2]
    seen: dict[int, Any] = {}

    def poison(run: Callable[[], StepResult], work: StepWork) -> StepResult:
        seen[work.batches.step + 1] = weights(case)
        result = run()
        if work.batches.step + 1 == poisoned:
            result.losses[1].fill_(float("nan"))
            result.total *= float("nan")
        return result

    case.around_steps(poison)
    with pytest.raises(NumericsError) as caught:
        case.run()
    assert "step 3: the loss is not finite" in str(caught.value)
    assert all(row.origin in str(caught.value) for row in step.batches[1].rows)
    assert not any(row.origin + "," in str(caught.value) for row in step.batches[0].rows)
    assert_same_bits(seen[4], seen[3])
    assert (case.saved, len(case.losses)) == ([2], 2)


@pytest.mark.parametrize("place", ["steps", "evaluation"])
def test_data_that_are_gone_end_the_run_after_a_checkpoint(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    case = make_case(tiny_llama, make_rows(23), training=training(max_steps=6, save_steps=2, eval_steps=3))
    after = case.steps.after

    def gone() -> Evaluation:
        if case.parts.state.step < 3:
            return Evaluation(EvaluationSums({}, 0, 0), {"loss": 1.0})
        raise DataError("no such file", file="d.jsonl")

    def three(first: int) -> Iterator[StepBatches]:
        yield from islice(after(first), 3)
        gone()

    if place == "steps":
        monkeypatch.setattr(case.steps, "after", three)
    else:
        case.evaluate_with(gone)
    with pytest.raises(InputError) as caught:
        case.run()
    assert [problem.what for problem in caught.value.problems] == [
        "no such file",
        "the checkpoint of step 3 is written",
    ]
    assert (case.saved, len(case.losses)) == ([2, 3], 3)
