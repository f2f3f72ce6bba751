"""What plan foresees against what the device's allocator counts, at reduced size: resident and streamed, with the
output projection on the device and in parts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.devices.test_mistakes import CUDA
from tests.test_bench_gpu import arithmetic, planning, shapes
from tunekit.memory import vocabulary
from tunekit.planning.simulated.kernels import workspace_bytes

REDUCED = shapes._llama(256, 768, 4, 4, num_key_value_heads=2, vocab_size=16384, head_dim=64)


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 2},
        {"rows": 2, "streamed_head": True},
        {"engine": "host", "micro_batches": 2},
        {"engine": "host", "micro_batches": 2, "streamed_head": True},
    ],
    ids=["resident", "resident, head in parts", "streamed", "streamed, head in parts"],
)
def test_the_peak_is_foreseen(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    import ours
    import torch

    monkeypatch.setitem(shapes.MODELS, "reduced", REDUCED)
    monkeypatch.setattr(vocabulary, "PART_BYTES", 2**20)
    planning.meta_base.cache_clear()
    row = shapes.Row(
        "peak", "test", "reduced", quantization="nf4", length=256, checkpointing="every", steps=2, **settings
    )
    plan = planning.plan_row(row, CUDA, arithmetic.Ceilings())
    product = torch.ones(8, 8, device=CUDA, requires_grad=True) @ torch.ones(8, 8, device=CUDA)
    product.sum().backward()  # both threads' workspaces, which later tests find there
    del product
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    measured = ours.run_row(row, CUDA, plan)["peak_allocated_bytes"] - before
    foreseen = plan["predicted_bytes"]["total"] - workspace_bytes(CUDA)
    assert foreseen == pytest.approx(measured, rel=0.05)
