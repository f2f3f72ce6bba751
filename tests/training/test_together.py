"""Several runs over one streamed base, layer by layer: each equals its own run bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.loop_case import Case, make_case, make_rows
from tunekit.errors import DataError, TunekitError
from tunekit.memory.splitting import Splitting
from tunekit.memory.streaming import layer_weights, make_slots, shared_slots
from tunekit.model.load import load_model
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import settings_class
from tunekit.recipe.training import TrainingSection
from tunekit.training import streaming
from tunekit.training.run import Run
from tunekit.training.streaming import LayerPass
from tunekit.training.time_limit import REPORT_SECONDS, TimeLimit
from tunekit.training.together import train_together
from tunekit.tuned.network import copy_modules

CPU = torch.device("cpu")


def training(seed: int, **changes: Any) -> TrainingSection:
    values = {"learning_rate": 1e-2, "max_steps": 3, "epochs": None, "gradient_accumulation_steps": 3, "seed": seed}
    return TrainingSection(**{**values, "scheduler": "constant", "warmup_ratio": 0.0, "micro_batch_size": 2, **changes})


def weights(case: Case) -> Tensor:
    return torch.cat([flat.data.detach() for flat in case.optimizer.groups])


class Trials:
    """Runs with different adapters, rows and lengths over a base streamed from host memory: each alone, and all
    together."""

    def __init__(self, model: ModelSection, trials: list[dict[str, Any]]) -> None:
        self.model, self.trials = model, trials
        self.warnings: list[str] = []
        self.errors: list[TunekitError] = []

    def alone(self) -> list[Case]:
        cases = [self._case(trial) for trial in self.trials]
        for case in cases:
            case.run()
        return cases

    def together(self, change: Callable[[list[Case]], None] = lambda cases: None) -> list[Case]:
        """`change`: called with the cases before they train."""
        base = load_model(self.model, device=CPU)
        base.slots = make_slots(layer_weights(base), CPU, tier="host", mapped=base.mapped, poison=True)
        cases = [self._case(trial, base=copy_modules(base)) for trial in self.trials]
        for case in cases:
            case.model.slots = shared_slots(base)
        change(cases)
        train_together([self._opened(case.parts) for case in cases], self.warnings.append)
        return cases

    @contextmanager
    def _opened(self, run: Run) -> Iterator[Run]:
        try:
            with run.opened():
                yield run
        except TunekitError as error:
            self.errors.append(error)
            raise

    def _case(self, trial: dict[str, Any], **changes: Any) -> Case:
        rows = make_rows(23, seed=trial["rows"])
        return make_case(
            Path(),
            rows,
            training=trial["training"],
            adapter=trial["adapter"],
            model=self.model,
            end_to_end=True,
            max_length=64,
            streaming={},
            **changes,
        )


def lora(**changes: Any) -> LoraSettings:
    return LoraSettings(**{"r": 4, "alpha": 8.0, **changes})


def test_runs_together_equal_separate_runs(tiny_llama: Path) -> None:
    """Also with dropout, another method, rows and a seed of their own, and a run that ends earlier."""
    dora = settings_class("adapters", "dora").model_validate({"method": "dora", "r": 4})
    adapters = [lora(), dora, lora(r=8, dropout=0.2)]
    trials = [{"adapter": adapter, "rows": at, "training": training(at)} for at, adapter in enumerate(adapters)]
    trials[0]["training"] = training(0, max_steps=2)
    section = ModelSection(name_or_path=str(tiny_llama), dtype="float32", quantization="nf4")
    runs = Trials(section, trials)
    for one, other in zip(runs.alone(), runs.together(), strict=True):
        assert_same(one, other)
    assert runs.warnings == runs.errors == []


def assert_same(one: Case, other: Case) -> None:
    assert one.losses == other.losses
    assert torch.equal(weights(one), weights(other))


def three_runs(tiny_llama: Path) -> Trials:
    trials = [{"adapter": lora(), "rows": at, "training": training(at)} for at in range(3)]
    return Trials(ModelSection(name_or_path=str(tiny_llama), dtype="float32"), trials)


def fail_at(case: Case, step: int, error: Exception) -> None:
    """Let the loss of this run raise an error in every step from `step` on."""
    loss = case.parts.objective.loss
    plain = loss.loss

    def failing(output: Any, batch: Any) -> Any:
        if case.parts.state.step + 1 >= step:
            raise error
        return plain(output, batch)

    case.parts.objective = replace(case.parts.objective, loss=copy(loss))
    object.__setattr__(case.parts.objective.loss, "loss", failing)


def test_a_run_that_fails_leaves_the_others_together(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = three_runs(tiny_llama)
    alone = runs.alone()
    passes, run_passes = list[int](), streaming.run_passes
    monkeypatch.setattr(
        streaming,
        "run_passes",
        lambda some, **named: (passes.append(len(some)), run_passes(some, **named))[1],  # type: ignore[func-returns-value]
    )
    together = runs.together(lambda cases: fail_at(cases[1], 2, DataError("the row is wrong")))
    assert_same(alone[0], together[0])
    assert_same(alone[2], together[2])
    assert together[1].losses == alone[1].losses[:1]
    assert [error.problems[0].what for error in runs.errors] == ["the row is wrong"]
    assert runs.warnings == []
    assert passes == [3, 3, 1, 1, 1, 2], "the failed round runs each alone, and the next one those that are left"


def test_each_run_keeps_time_free_for_the_ends_of_the_others(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, others = three_runs(tiny_llama), list[float]()
    monkeypatch.setattr(TimeLimit, "is_over", lambda limit, *values: (others.append(limit.others), limit.ends)[1])

    def limit(cases: list[Case]) -> None:
        for number, case in enumerate(cases):
            case.parts.session.limit = TimeLimit(60.0)
            case.parts.session.limit.ends = number == 1  # type: ignore[attr-defined]
            case.parts.state.longest = {"save": 0.0, "export": 10.0**number - REPORT_SECONDS}

    assert len(runs.together(limit)[1].losses) == 1
    assert others[:5] == [110.0, 101.0, 1.0, 100.0, 1.0]


def test_an_error_of_no_single_run_keeps_the_runs_apart(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as memory that is enough for each run, but not for all of them together."""
    runs, begun = three_runs(tiny_llama), list[int]()
    alone = runs.alone()
    run_passes = streaming.run_passes

    def limited(some: list[LayerPass], **named: Any) -> None:
        begun.append(len(some))
        if len(some) > 1:
            raise torch.OutOfMemoryError("too much")
        run_passes(some, **named)

    monkeypatch.setattr(streaming, "run_passes", limited)
    for one, other in zip(alone, runs.together(), strict=True):
        assert_same(one, other)
    assert begun == [3] + [1] * 9
    assert runs.warnings == [
        "the trials cannot run together (too much); from now on, their steps run one after another"
    ]


def test_memory_that_one_run_lacks_is_its_own_fault(tiny_llama: Path) -> None:
    """Only its micro-batches are split, and the runs stay together."""
    runs, splittings = three_runs(tiny_llama), list[Splitting]()
    alone = runs.alone()

    def limit(cases: list[Case]) -> None:
        for case in cases:
            case.parts.splitting = Splitting()
            splittings.append(case.parts.splitting)
        loss = cases[1].parts.objective.loss
        plain, failed = loss.loss, list[int]()

        def failing(output: Any, batch: Any) -> Any:
            if len(batch.rows) > 1 and len(failed) < 2:  # together, then alone
                failed.append(1)
                raise torch.OutOfMemoryError("too much")
            return plain(output, batch)

        cases[1].parts.objective = replace(cases[1].parts.objective, loss=copy(loss))
        object.__setattr__(cases[1].parts.objective.loss, "loss", failing)

    together = runs.together(limit)
    assert [splitting.tokens is not None for splitting in splittings] == [False, True, False]
    assert_same(alone[0], together[0])
    assert_same(alone[2], together[2])
    assert together[1].losses == pytest.approx(alone[1].losses, rel=1e-5)
    assert runs.warnings == runs.errors == []
