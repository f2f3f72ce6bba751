"""How a run behaves on a GPU: nothing waits, a bad gradient changes nothing, memory is foreseen, it ends in order."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_exactness import case_of, section
from tests.support.loop_case import make_rows
from tests.support.train_case import records, write_recipe
from tests.test_bench_gpu import arithmetic, planning, shapes
from tests.training.test_loop import assert_same_bits, training, weights
from tunekit.errors import NumericsError
from tunekit.training.engine import StepResult, StepWork

WITH_MEMORY = (
    "import sys, torch; torch.cuda.set_per_process_memory_fraction({share}); from tunekit.cli import main; main()"
)


@pytest.mark.parametrize(("packing", "quantization"), [(False, "none"), (True, "none"), (True, "nf4")])
def test_no_step_waits_for_the_device(folder: Path, gpu: torch.device, packing: bool, quantization: str) -> None:
    """From the second step on any synchronizing call is an error, but for the one that reads the step before."""
    model = section(folder, "bfloat16", quantization)
    case = case_of(folder, gpu, model=model, packing=packing, training=training(max_steps=5))
    assert case.parts.reads_later
    seen: set[int] = set()

    def enter(step: int) -> None:
        seen.add(step)
        if step:  # the first makes handles and work spaces
            torch.cuda.set_sync_debug_mode("error")

    case.watch_steps(enter, lambda: torch.cuda.set_sync_debug_mode("default"))
    case.run()
    assert seen >= {0, 1, 2, 3, 4}
    assert all(math.isfinite(loss) for loss in case.losses)


def test_a_gradient_that_is_not_finite_changes_no_weight(folder: Path, device: torch.device) -> None:
    case = case_of(folder, device, training=training(max_steps=6))
    seen = {}

    def poison(run: Callable[[], StepResult], work: StepWork) -> StepResult:
        seen[work.batches.step + 1] = weights(case)
        result = run()
        if work.batches.step + 1 == 3:
            case.optimizer.gradients()[0][7] = float("nan")
        return result

    case.around_steps(poison)
    with pytest.raises(NumericsError, match="step 3: the gradient is not finite"):
        case.run()
    assert_same_bits(seen.get(4, weights(case)), seen[3])  # a GPU makes step 4 before it reads step 3's numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_from_end_to_end(folder: Path, gpu: torch.device, dtype: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, folder, model={"dtype": dtype}, data={"packing": True})
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "tunekit", "train", str(recipe), f"output.dir={run}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [record for record in records(run) if "loss" in record]
    assert steps
    assert all(math.isfinite(record["loss"]) for record in steps)
    report = json.loads((run / "report.json").read_text())
    assert report["peak_allocated_bytes"] > 0
    assert json.loads((run / "plan.json").read_text())["device"].startswith("cuda")


def test_out_of_memory_ends_with_4_or_a_split(folder: Path, gpu: torch.device, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, folder), tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", WITH_MEMORY.format(share=2e-5), "train", str(recipe), f"output.dir={run}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        reactions = json.loads((run / "report.json").read_text())["reactions"]
        assert any("split" in reaction["action"] for reaction in reactions)
    else:
        assert done.returncode == 4, done.stderr[-2000:]
        assert "memory" in done.stderr


@pytest.mark.parametrize(
    ("quantization", "checkpointing", "documents"),
    [("none", 0, False), ("none", "every", False), ("nf4", 0, False), ("nf4", "every", True), ("none", 0, True)],
)
def test_the_peak_is_foreseen_within_5_percent(
    gpu: torch.device, quantization: str, checkpointing: Any, documents: bool, record_property: Any
) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("a 3B model needs 20 GiB of free memory")
    import gc

    import ours

    row = shapes.Row(
        "peak", "test", "llama-3.2-3b", quantization=quantization, rows=1, length=2048, documents=documents,
        checkpointing=checkpointing, steps=3,
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    plan = planning.plan_row(row, gpu, arithmetic.Ceilings())
    measured = ours.run_row(row, gpu, plan)["peak_allocated_bytes"] - before
    record_property("predicted_bytes", plan["predicted_bytes"]["total"])
    record_property("measured_bytes", measured)
    assert plan["predicted_bytes"]["total"] / measured == pytest.approx(1.0, abs=0.05)


def test_speed_and_memory_are_recorded_for_each_step(folder: Path, device: torch.device) -> None:
    case = case_of(folder, device, make_rows(23), training=training(max_steps=3))
    case.parts.session.peak_bytes = lambda: torch.cuda.max_memory_allocated() if device.type == "cuda" else 1
    case.run()
    assert [record.step for record in case.records] == [1, 2, 3]
    assert all(record.seconds > 0 and record.peak_bytes > 0 for record in case.records)  # type: ignore[union-attr]
