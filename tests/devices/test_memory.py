"""What plan foresees against what the device's allocator counts, at reduced size: resident and streamed, with the
output projection on the device and in parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.devices.test_mistakes import CUDA
from tests.test_bench_gpu import arithmetic, planning, shapes
from tunekit.machine.memory import available_bytes
from tunekit.memory import vocabulary
from tunekit.planning.simulated.kernels import workspace_bytes

REDUCED = {
    "llama": shapes._llama(256, 768, 4, 4, num_key_value_heads=2, vocab_size=16384, head_dim=64),
    "mt5": shapes._t5("mt5", 256, 512, 4, 16384)
    | {"num_layers": 3, "num_decoder_layers": 3},  # one matrix: head, tables
}
# where the real kernels hold less than torch's plain ones, which the device has for 4 bits and for biased attention
SHORT = {"rows": 8, "length": 64, "quantization": "none"}
STREAMED = {"engine": "host", "micro_batches": 2}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"rows": 2}),
        ("llama", {"rows": 2, "streamed_head": True}),
        ("llama", STREAMED),
        ("llama", STREAMED | {"streamed_head": True}),
        ("mt5", SHORT | {"streamed_head": True}),
        ("mt5", SHORT | STREAMED | {"streamed_head": True}),
    ],
    ids=[
        *("resident", "resident, head in parts", "streamed", "streamed, head in parts"),
        *("tied, resident, head in parts", "tied, streamed, head in parts"),
    ],
)
def test_the_peak_is_foreseen(model: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.MODELS, "reduced", REDUCED[model])
    monkeypatch.setattr(vocabulary, "PART_BYTES", 2**20)
    planning.meta_base.cache_clear()
    usual = {"quantization": "nf4", "length": 256, "checkpointing": "every", "steps": 2}
    foreseen, measured = foreseen_and_measured(shapes.Row("peak", "test", "reduced", **(usual | settings)))
    assert foreseen == pytest.approx(measured, rel=0.05)


def test_memory_that_this_process_has_cached_is_free() -> None:
    """Otherwise the second run of a process, such as the second part of an audit, would be planned for less."""
    torch.cuda.empty_cache()
    before = available_bytes(CUDA)
    torch.ones(2**24, device=CUDA)
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= 2**26
    assert available_bytes(CUDA) == before


def foreseen_and_measured(row: Any) -> tuple[int, int]:
    """The peak bytes of a row beside what the device had before."""
    import gc

    import ours

    plan = planning.plan_row(row, CUDA, arithmetic.Ceilings())
    product = torch.ones(8, 8, device=CUDA, requires_grad=True) @ torch.ones(8, 8, device=CUDA)
    product.sum().backward()  # both threads' workspaces, which later tests find there
    del product
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    measured = ours.run_row(row, CUDA, plan)["peak_allocated_bytes"] - before
    return plan["predicted_bytes"]["total"] - workspace_bytes(CUDA), measured


@pytest.mark.parametrize("counts", [(2, 5), pytest.param((2, 5, 16), marks=pytest.mark.slow)])
@pytest.mark.parametrize("offloads", ["auto", True])
def test_every_micro_batch_of_a_streamed_pass_counts(
    offloads: Any, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, and the input of the last layer, stay on the device where the others' wait on the host."""
    import ours

    def offloading(*given: Any) -> Any:
        return replace(row_execution(*given), activation_offload=offloads)

    row_execution = planning.row_execution
    for module in (planning, ours):
        monkeypatch.setattr(module, "row_execution", offloading)
    monkeypatch.setitem(shapes.MODELS, "reduced", REDUCED["llama"] | {"vocab_size": 512})
    planning.meta_base.cache_clear()
    row = shapes.Row("peak", "test", "reduced", rows=4, length=64, steps=2, **STREAMED)
    foreseen, measured = zip(*(foreseen_and_measured(replace(row, micro_batches=n)) for n in counts), strict=True)
    assert foreseen == pytest.approx(measured, rel=0.06)
    growth = [[after - before for before, after in pairwise(peaks)] for peaks in (foreseen, measured)]
    assert growth[0] == pytest.approx(growth[1], rel=0.01)


@pytest.mark.parametrize("engine", ["resident", "host"])
def test_a_matrix_that_is_head_and_tables_in_one_trains_alike_in_parts(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ours

    monkeypatch.setattr(vocabulary, "PART_BYTES", 2**13)  # of 64 KiB
    row, losses = replace(next(row for row in shapes.DOUBLES if row.name == "tiny-t5"), engine=engine), []
    for streamed in (False, True):
        plan = planning.plan_row(replace(row, streamed_head=streamed), CUDA, arithmetic.Ceilings())
        losses.append(ours.run_row(replace(row, streamed_head=streamed), CUDA, plan)["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
