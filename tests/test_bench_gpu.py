"""scripts/bench/run gpu without a GPU: arithmetic, plans, how results are kept, and the doubles on a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path += [str(SCRIPTS / "bench"), str(SCRIPTS / "gpu")]

import arithmetic  # noqa: E402
import gpu as bench_gpu  # noqa: E402
import planning  # noqa: E402
import random_model  # noqa: E402
import shapes  # noqa: E402

from tunekit.planning.simulated.kernels import workspace_bytes  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = {row.name: row for row in [*shapes.ROWS, *shapes.DOUBLES]}


def test_operations_of_the_8b_model() -> None:
    """4 N + attention at 4096 tokens: 33.8 GFLOP a token, 23.6 thousand tokens a second at 798 TFLOP/s."""
    size = planning.model_size("llama-3.1-8b", CPU)
    assert size.body + size.head == pytest.approx(7.5e9, rel=0.01)
    least = arithmetic.least_flops_per_token(size, ROWS["8b-bf16"], 1.0)
    assert least == pytest.approx(33.8e9, rel=0.01)
    assert arithmetic.Ceilings().product_flops / least == pytest.approx(23.6e3, rel=0.01)
    recomputed = arithmetic.flops_per_token(size, ROWS["8b-bf16"], 1.0, 1.0)
    assert recomputed == pytest.approx(49.9e9, rel=0.03)


def test_a_token_of_an_encoder_decoder_passes_about_half_of_it() -> None:
    """T5 v1.1: two matrices of width x inner and one back in each layer, 4 d^2 in the encoder's, 8 d^2 in the decoder's
    (heads of 64 x 32 = d), of which 2 d^2 see the source alone."""
    size, row, d, inner = planning.model_size("t0-3b", CPU), ROWS["t0-3b-nf4"], 2048, 5120
    mlp, layers = 3 * d * inner, 24
    assert size.of_source == pytest.approx(layers * (4 * d * d + mlp + 2 * d * d), rel=0.001)
    assert size.body == pytest.approx(layers * (12 * d * d + 2 * mlp), rel=0.001)
    assert arithmetic.passed_parameters(size, row) == pytest.approx(size.body / 2, rel=1e-6)
    scores = 3 * 256**2 * 2.5  # of three attentions, each 256 x 256; the answer's own is causal: a half
    assert arithmetic.attention_flops(size, row) == pytest.approx(4 * 24 * d * scores / 3 / 512)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        *(("llama-3.2-3b", 3.21), ("llama-3.1-8b", 8.03), ("qwen2.5-32b", 32.76), ("llama-70b", 70.55)),
        *(("bloomz-7b1", 7.07), ("t0-3b", 2.78), ("mt0-xxl", 11.90)),  # of the last two, transformers ties the head
    ],
)
def test_shapes_are_those_of_the_real_models(model: str, billions: float) -> None:
    count = planning.meta_base(model, "none", CPU).facts.total_parameters
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.slow
def test_the_plan_of_a_row_is_printed_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = "8b-nf4-small-streamed,t0-3b-nf4,8b-bf16-peft"
    monkeypatch.setattr(sys, "argv", ["bench", "--dry-run", "--rows", names, "--json", str(tmp_path / "plans.json")])
    bench_gpu.main()
    text = capsys.readouterr().out
    assert "assumed" in text
    assert "t0-3b-nf4" in text
    assert "41,943,040 parameters" in text
    assert "streaming breaks even from 2,639 tokens" in text
    plan = json.loads((tmp_path / "plans.json").read_text())["plans"]["8b-nf4-small-streamed"]
    assert plan["slot_bytes"] == 2 * plan["layer_bytes"]
    parts = plan["predicted_bytes"]
    beside = workspace_bytes(torch.device("cuda"))
    assert sum(size for name, size in parts.items() if name != "total") + beside == parts["total"]
    assert parts["weights"] < plan["stored_bytes"] - 30 * plan["layer_bytes"] + plan["slot_bytes"]


def fake_result(name: str, outcome: str = "ok") -> dict[str, Any]:
    measured = {"tokens_per_second": 10.0, "tokens_per_second_least": 9.0, "host_anonymous_bytes": 2**30}
    card = {"device": "a card", "python": "3", "versions": {}}
    if outcome != "ok":
        return {"outcome": outcome, "card": card, "plan": {"limit_tokens_per_second": 20.0}}
    peaks = {"peak_allocated_bytes": 2**31, "peak_reserved_bytes": 2**31, "losses": [2.0, 1.0]}
    return {"outcome": "ok", "card": card, "plan": {"limit_tokens_per_second": 20.0}, **measured, **peaks}


def test_results_are_kept_after_every_row_and_no_row_runs_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, ran = tmp_path / "gpu.json", []
    ceilings = {"product_flops": 1e12, "product_side": 8, "copy_bytes": 1e9, "host_to_device_bytes": 1e9}
    ceilings |= {"host_to_device_pageable_bytes": 1e9, "real_products": {}, "card": fake_result("")["card"]}

    def in_child(name: str, device: torch.device, file: Path, seconds: float) -> dict[str, Any]:
        ran.append((name, file.exists() and sorted(json.loads(file.read_text())["rows"])))
        assert seconds > 0
        return ceilings if name == "ceilings" else fake_result(name, "out of memory" if "nf4" in name else "ok")

    monkeypatch.setattr(bench_gpu, "in_child", in_child)
    chosen = [ROWS["tiny-bf16"], ROWS["tiny-nf4"]]
    bench_gpu.run_rows(chosen, ROWS, CPU, file, 10.0, again=False)
    assert ran == [("ceilings", False), ("tiny-bf16", []), ("tiny-nf4", ["tiny-bf16"])]
    bench_gpu.run_rows(chosen, ROWS, CPU, file, 10.0, again=False)
    assert len(ran) == 3
    bench_gpu.run_rows(chosen[:1], ROWS, CPU, file, 10.0, again=True)
    assert len(ran) == 4
    bench_gpu.run_rows([ROWS["tiny-streamed"]], ROWS, CPU, file, 0.001, again=False)
    assert "tiny-streamed: waits for another call" in capsys.readouterr().out
    from table import make_table

    text = make_table(json.loads(file.read_text()), [*chosen, ROWS["tiny-streamed"]])
    lines = [line for line in text.splitlines() if line.startswith("| t")]
    assert [line.split(" | ")[0] for line in lines] == ["| tiny-bf16", "| tiny-nf4"]
    assert "10 (9) |  | 50% | 2.00 GiB" in lines[0]
    assert "out of memory" in lines[1]


def test_peft_is_measured_in_the_call_of_what_is_held_against_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds, ran = iter([100.0, 50.0, 120.0, 130.0, 65.0]), list[str]()

    def in_child(name: str, device: torch.device, file: Path, seconds: float) -> dict[str, Any]:
        ran.append(name)
        assert seconds <= bench_gpu.ROW_SECONDS
        return fake_result(name) | {"tokens_per_second": 1.0 if name == "ceilings" else next(speeds)}

    monkeypatch.setattr(bench_gpu, "in_child", in_child)
    rows = [ROWS[name] for name in ("8b-nf4-small", "8b-nf4-small-head")]
    file = tmp_path / "gpu.json"
    for chosen in (rows, [replace(rows[0], name="8b-nf4")]):
        bench_gpu.run_rows(chosen, ROWS, CPU, file, 1e6, again=False)
    first = ["8b-nf4-small", "8b-nf4-small-peft", "8b-nf4-small-head"]
    assert ran == ["ceilings", *first, "8b-nf4", "8b-nf4-small-peft"]
    found = json.loads(file.read_text())["rows"]
    assert [found[name]["rival_tokens_per_second"] for name in (first[0], first[2], "8b-nf4")] == [50.0, 50.0, 65.0]
    from table import make_table

    line = next(
        line for line in make_table(json.loads(file.read_text()), rows).splitlines() if "| 8b-nf4-small " in line
    )
    assert "| 2.00 |" in line


@pytest.mark.drawn
def test_every_row_of_the_table_can_be_rehearsed_and_fits_in_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PACKERS", 16)  # cores of a machine with a GPU
    for row in shapes.ROWS:
        assert row.rival is None or ROWS[row.rival].tool == "peft"
        assert planning.expected_minutes(row, CUDA, arithmetic.Ceilings()) < 10.0
    monkeypatch.setattr(shapes, "MODELS", dict(shapes.MODELS))
    shapes.shrink_models()
    assert {row.name for row in map(shapes.rehearsed, shapes.ROWS)} <= set(ROWS)
    assert all(config["vocab_size"] == 512 for config in shapes.MODELS.values())


def test_a_child_that_runs_out_of_memory_or_of_time_is_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(*_: Any) -> Any:
        yield {"plan": {"layers": 3}}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(bench_gpu, "child_work", work)
    bench_gpu.run_child("tiny-bf16", ROWS, CPU, tmp_path / "answer.json")
    found = json.loads((tmp_path / "answer.json").read_text())
    assert (found["outcome"], found["plan"]["layers"]) == ("out of memory", 3)
    assert bench_gpu.in_child("ceilings", CPU, tmp_path / "r.json", 0.01) == {"outcome": "stopped after 0 s"}


def test_a_random_model_has_every_value_and_the_same_ones_packed() -> None:
    dense = random_model.random_base("tiny", "none", CPU)
    rotary: Any = dense.net.get_submodule("model.rotary_emb")
    real: Any = type(rotary)(dense.net.config)
    assert torch.equal(rotary.inv_freq, real.inv_freq)
    weight: Any = dense.net.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert 0.015 < float(weight.float().std()) < 0.025
    assert torch.equal(dense.net.get_parameter("model.norm.weight"), torch.ones(64, dtype=torch.bfloat16))
    packed = random_model.random_base("tiny", "nf4", CPU)
    layer: Any = packed.net.get_submodule("model.layers.1.mlp.up_proj")
    error = (layer.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
    assert error < 0.15
    logits = dense.net(input_ids=torch.tensor([[1, 2, 3]])).logits  # type: ignore[operator]
    assert torch.isfinite(logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("bf16", "peft"), ("nf4", "nf4-peft"), ("t5", "t5-peft")])
def test_the_doubles_give_the_losses_of_peft(pair: tuple[str, str]) -> None:
    import ours
    import rival

    own, peft_row = (ROWS[f"tiny-{name}"] for name in pair)
    plan = planning.plan_row(own, CPU, arithmetic.Ceilings())
    mine, theirs = ours.run_row(own, CPU, plan), rival.run_row(peft_row, CPU)
    rounded = 1e-2 if own.reads_source else 2e-4  # transformers takes a T5's loss in bf16: 6.21875 and then 6.25
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=rounded)
    assert mine["tokens_per_second"] > 0
    assert theirs["rows_of_a_forward"] == peft_row.rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-streamed", "tiny-t5-streamed"])
def test_streamed_and_resident_doubles_give_the_same_losses(name: str) -> None:
    import ours

    streamed = ROWS[name]
    resident = replace(streamed, engine="resident")
    found = [
        ours.run_row(row, CPU, planning.plan_row(row, CPU, arithmetic.Ceilings()))["losses"]
        for row in (streamed, resident)
    ]
    assert found[0] == found[1]
