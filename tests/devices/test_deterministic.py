"""training.deterministic: attention's backward pass over long documents repeats its bits with it, and without it not;
torch is left as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.devices.test_mistakes import CUDA
from tests.devices.test_runs import train, whole_device
from tests.devices.test_steps import section
from tests.objectives.test_dpo import train as train_grpo
from tests.objectives.test_grpo import base, write_prompts
from tests.support.loop_case import make_case, make_rows
from tests.support.train_case import records
from tests.training.test_loop import training, weights
from tunekit.contracts import StepBatches
from tunekit.machine.devices import deterministic_kernels
from tunekit.model.attention.documents import VARLEN
from tunekit.training.engine import StepWork
from tunekit.training.run import Run

__all__ = ["base", "whole_device"]


def run_of(folder: Path, longest: int) -> list[torch.Tensor]:
    rows = make_rows(4, longest=longest, shortest=longest - 3)
    case = make_case(
        folder, rows, training=training(max_steps=2), device=CUDA, model=section(folder, "bfloat16"), packing=True,
        max_length=2 * longest, chunk=256,
    )  # fmt: skip
    assert case.model.base.facts.attention == VARLEN
    case.run()
    return [tensor.cpu() for tensor in weights(case).values()]


@pytest.mark.parametrize(
    ("deterministic", "longest", "repeats"), [(True, 300, True), (False, 300, False), (False, 60, True)]
)
def test_long_documents_repeat_their_bits_with_it_alone(
    folder: Path, deterministic: bool, longest: int, repeats: bool
) -> None:
    with deterministic_kernels(deterministic):
        first, second = run_of(folder, longest), run_of(folder, longest)
    assert all(map(torch.equal, first, second)) == repeats


def test_cumulated_probabilities_refuse_no_deterministic_run(base: Path, tmp_path: Path) -> None:
    """A GPU has no deterministic sum of parts of fractions."""
    with deterministic_kernels(True), pytest.raises(RuntimeError, match="does not have a deterministic"):
        torch.ones(2, device=CUDA).cumsum(0)
    objective = {"temperature": 0.9, "top_p": 0.9, "top_k": 100}
    training_of = {"epochs": 1, "micro_batch_size": 6, "deterministic": True}
    os.environ["TUNEKIT_DEVICE"] = "cuda"
    run = train_grpo(write_prompts(tmp_path, base, training=training_of, objective=objective))
    assert [each["loss"] for each in records(run) if "loss" in each]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_asks_torch_for_it_while_it_lasts(
    folder: Path, tmp_path: Path, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_step, seen = Run.begin_step, set[bool]()

    def watched(run: Run, step: StepBatches) -> StepWork:
        seen.add(torch.are_deterministic_algorithms_enabled())
        return begin_step(run, step)

    monkeypatch.setattr(Run, "begin_step", watched)
    train(tmp_path, folder, f"training.deterministic={str(wanted).lower()}", device="cuda")
    assert seen == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()
