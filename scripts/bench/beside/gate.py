"""The parity gate: checks on the timed model and rows. Timings count only if all checks pass.

The result is {"passed", "checks": [{"what", "found", "limit", "passed"}]}, with all loss curves.

Both sides start from the same adapter: a tunekit run of one step with learning rate 0 (the first step of a warm-up)
exports it, and peft loads it. 20 steps of 2 rows, AdamW at a constant rate, gradient norm clipped at 1.
AdamW's first updates are almost the gradient's signs, so that rounding moves numbers whose gradient is near zero. So
the change of the adapter after 5 steps is compared with a run of peft in float64. tunekit's distance from that run must
be at most 1.2 times the distance of peft in float32 with a cross entropy in float64. A float64 cross entropy makes the
limit stricter: in float32, torch sums 49,152 terms with a bias (3e-6 of the loss at step 1, with equal weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

STEPS, DOUBLE_STEPS, ROWS, RATE = 20, 5, 2, 2e-4
MARGIN = 1.2  # of peft's own rounding error


def run_gate(bench: Any) -> dict:
    """Run all checks, and print each result at once."""
    bench.say("parity gate")
    few = {"learning_rate": RATE, "max_steps": STEPS, "micro_batch_size": ROWS}
    wide, narrow = {"dtype": "float32"}, {"dtype": "bfloat16"}
    begin = bench.ours("gate: initial", model=wide, training={**few, "max_steps": 1, "warmup_steps": 1})
    initial = Path(begin["place"]) / "run" / "adapter"
    ours = bench.ours("gate: tunekit float32", model=wide, training=few)
    theirs = _peft(bench, "gate: peft float32", initial, "float32")
    theirs_exact = _peft(bench, "gate: peft float32, loss in float64", initial, "float32", exact_loss=True)
    short = {"steps": DOUBLE_STEPS, "exact_loss": True}
    double, single = (
        _peft(bench, f"gate: peft {dtype}, short", initial, dtype, **short) for dtype in ("float64", "float32")
    )
    ours_short = bench.ours("gate: tunekit float32, short", model=wide, training={**few, "max_steps": DOUBLE_STEPS})
    alone = bench.ours(
        "gate: rows alone", model=wide, training={**few, "micro_batch_size": 1, "gradient_accumulation_steps": ROWS}
    )
    again = bench.ours("gate: recomputed", model=wide, training=few, memory={"gradient_checkpointing": True})
    plain = bench.ours("gate: kept", model=wide, training=few, memory={"gradient_checkpointing": False})
    ours_narrow = bench.ours("gate: tunekit bfloat16", model=narrow, training=few)
    theirs_narrow = _peft(bench, "gate: peft bfloat16", initial, "bfloat16")
    reference = theirs["losses"]
    of_double = Path(double["place"]) / "adapter"
    delta = _difference(initial, Path(ours_short["place"]) / "run" / "adapter", of_double)
    delta_limit = MARGIN * _difference(initial, Path(single["place"]) / "adapter", of_double)
    exact = _relative(ours["losses"], theirs_exact["losses"])
    narrow_limit = MARGIN * _error(theirs_narrow["losses"], reference)
    same = again["losses"] == plain["losses"] and _bytes(again) == _bytes(plain)
    narrow_error, apart = _error(ours_narrow["losses"], reference), _relative(ours["losses"], alone["losses"])
    checks = [
        _check("float32 losses of 20 steps against peft's, relative", _relative(ours["losses"], reference), 1e-5),
        _check("float32 losses of 20 steps against those of peft's float64 loss, relative", exact, 1e-5),
        _check("float32 change of the adapter against peft's in float64, 1.2 of peft's in float32", delta, delta_limit),
        _check("bfloat16 losses against float32, root mean square, 1.2 of peft's", narrow_error, narrow_limit),
        _check("rows end to end against rows alone, float32, relative", apart, 1e-5),
        _check("recomputed against kept activations, different bits", 0.0 if same else 1.0, 0.0),
    ]
    for check in checks:
        bench.say(f"  {check['what']}: {check['found']:.2e} of {check['limit']:.2e}, {check['passed']}")
    runs = (ours, theirs, theirs_exact, alone, again, plain, ours_narrow, theirs_narrow)
    curves = {run["name"].removeprefix("gate: "): run["losses"] for run in runs}
    return {"passed": all(check["passed"] for check in checks), "checks": checks, "losses": curves}


def _peft(bench: Any, name: str, initial: Path, dtype: str, **more: Any) -> dict:
    settings = {"rows_per_step": ROWS, "steps": STEPS, "learning_rate": RATE, "init": str(initial), "save": "adapter"}
    return bench.theirs(name, "loop", dtype=dtype, **{**settings, **more})


def _check(what: str, found: float, limit: float) -> dict:
    return {"what": what, "found": float(found), "limit": float(limit), "passed": bool(found <= limit)}


def _relative(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def _error(curve: list[float], reference: list[float]) -> float:
    """The root mean square difference of two loss curves."""
    return float(np.sqrt(np.mean(np.square(np.array(curve) - np.array(reference)))))


def _difference(initial: Path, ours: Path, theirs: Path) -> float:
    """|change of ours - change of theirs| / |change of theirs| over all tensors, in float64."""
    first, one, other = (load_file(folder / "adapter_model.safetensors") for folder in (initial, ours, theirs))
    if not set(first) == set(one) == set(other):
        raise RuntimeError("the adapters hold different tensors")
    apart = sum(float(np.square(one[name].astype(np.float64) - other[name]).sum()) for name in first)
    moved = sum(float(np.square(other[name] - first[name].astype(np.float64)).sum()) for name in first)
    return float(np.sqrt(apart / moved))


def _bytes(run: dict) -> bytes:
    return (Path(run["place"]) / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
