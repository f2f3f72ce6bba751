"""A finished run's folder as train leaves it, made of given numbers, for what reads run folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_run(
    folder: Path, *, steps: int = 40, seed: int = 0, rate: float = 1e-3, finished: bool = True, **more: Any
) -> Path:
    """Its losses fall from 2.5 by `rate`; everything is plain text and numbers. `more`: of the report."""
    folder.mkdir(parents=True)
    recipe = {
        "model": {"name_or_path": "org/base"},
        "adapter": {"method": "lora", "r": 16},
        "objective": {"method": "sft"},
        "training": {"learning_rate": rate, "seed": seed},
        "output": {"dir": str(folder)},
    }
    peak = {"weights": 270e6, "adapter": 20e6, "optimizer": 60e6, "activations": 300e6, "logits": 50e6, "total": 900e6}
    counts = {"read": 240, "trained": 236, "dropped": 4, "truncated": 1, "dropped_reasons": {"too long": 4}}
    counts |= {"longest_tokens": 98, "tokens": 20246, "supervised_tokens": 4550}
    model = {"name_or_path": "org/base", "model_type": "llama", "dtype": "float32", "quantization": "none"}
    plan = {"recipe": recipe, "model": model, "device": "cpu", "steps": steps, "peak_bytes": peak}
    plan |= {"trainable_parameters": 4884480, "total_parameters": 139399488, "notes": ["train.jsonl: format chat"]}
    plan |= {"rows": {"training": counts, "evaluation": None}}
    losses = [2.5 * math.exp(-step * rate) + 0.05 * math.sin(step * (seed + 1.7)) ** 2 for step in range(steps)]
    records: list[dict[str, Any]] = [
        {"step": at + 1, "loss": loss, "learning_rate": rate, "grad_norm": loss / 2, "tokens": 600, "epoch": at / 10}
        | {"supervised_tokens": 150, "seconds": 1.5, "tokens_per_second": 400 + at % 7, "peak_bytes": 1200000000 + at}
        for at, loss in enumerate(losses)
    ]
    ends = {0: (2.6, "I cannot <b>say</b>"), steps: (losses[-1], "two lemon cakes")}
    evaluations = [
        {"step": step, "eval": {"loss": loss, "exact_match": 1 / loss}}
        | {"samples": [{"prompt": "<|user|>cakes?", "reference": "two lemon cakes", "answer": answer}]}
        for step, (loss, answer) in ends.items()
    ]
    lines = [evaluations[0], *records, *evaluations[1:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report = {"final_loss": losses[-1], "tokens_per_second": 401.5, "seconds": {"load": 4.3, "train": 156.4}}
    report |= {"measured_bytes": {"cpu": 880e6}, "predicted_bytes": {"cpu": 900e6}, "peak_host_bytes": 1360e6}
    report |= {"adapter_bytes": 19595432, "base_bytes": 269030272, "tokens": 60738, "supervised_tokens": 13650}
    report |= {"base_eval_loss": 2.6, "eval_loss": losses[-1], "final_step": steps, "reactions": []} | more
    files = {"plan": plan, "environment": {"python": "3.11", "versions": {"torch": "2.13.0"}}}
    files |= {"report": report, "status": {"exit_code": 0, "reason": "finished"}} if finished else {}
    rows = 30
    kept = {
        "step": steps,
        "rows": [f"eval.jsonl:{at}" for at in range(rows)],
        "units": [at % 7 + 1 for at in range(rows)],
    }
    kept |= {"digests": [f"row {at}" for at in range(rows)]}
    kept |= {"losses": [units * (losses[-1] + math.cos(at)) for at, units in enumerate(kept["units"])]}
    kept |= {"before": [2.6 * units for units in kept["units"]]}
    kept |= {"worst": [{"number": 6, "text": [["<|user|>cakes?", False], ["<u>two</u> lemon cakes", True]]}]}
    (folder / "evaluation_rows.json").write_text(json.dumps(kept), encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    (folder / "recipe.yaml").write_text("model: org/base # </script><script>alert(1)</script>\n", encoding="utf-8")
    return folder
