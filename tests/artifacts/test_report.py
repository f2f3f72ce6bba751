"""report.json holds what was measured and nothing else; report.md tells the same to a person."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_case import write_run
from tunekit.adapters.method import load_method
from tunekit.artifacts.report.markdown import curve, escape, markdown_page
from tunekit.artifacts.report.plan_page import memory_rows
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.sections import Chart, ReportPage, ReportSection, Series
from tunekit.artifacts.report.values import read_run
from tunekit.artifacts.report.write import report_values, write_report
from tunekit.artifacts.run import EXPORTS, RunFolder
from tunekit.recipe.reading.names import known_names
from tunekit.records import (
    EvaluationRecord,
    ExecutionSettings,
    ModelFacts,
    PeakBytes,
    Plan,
    PlannedRows,
    Reaction,
    ReportFacts,
    RowCounts,
    StepRecord,
    Target,
    TextFacts,
)

MIB = 1 << 20
FACTS = ReportFacts(
    peak_requested_bytes=None,
    peak_allocated_bytes=None,
    peak_reserved_bytes=None,
    peak_host_bytes=900 * MIB,
    tokens_per_second=1234.5,
    supervised_tokens_per_second=400.25,
    seconds={"save": 0.5, "load": 2.0, "train": 30.0, "data": 1.0, "evaluate": 4.0},
    rows={"read": 100, "trained": 90, "dropped": 10, "truncated": 3},
    tokens=5000,
    supervised_tokens=2000,
    predicted_bytes={"cpu": 110 * MIB},
    measured_bytes={"cpu": 100 * MIB},
    adapter_bytes=2 * MIB,
    base_bytes=200 * MIB,
    trainable_parameters=500_000,
    best_step=2,
    final_step=4,
    first_loss=3.0,
    final_loss=1.25,
    base_eval_loss=3.0,
    eval_loss=1.0,
    verdict=None,
    evaluations=[
        {"step": 0, "eval": {"loss": 3.0}},
        {"step": 2, "eval": {"loss": 1.0, "accuracy": 0.75}},
        {"step": 4, "eval": {"loss": 1.5, "accuracy": 0.5}},
    ],
    reactions=[Reaction("longest batch", "micro-batches are split in two", 0)],
)


def make_plan(**changes: Any) -> Plan:
    plan = Plan(
        tunekit_version="0.1.0",
        recipe={"adapter": {"method": "lora", "r": 16}, "data": {"train": [{"path": "train.jsonl"}]}},
        model=ModelFacts(
            "models/tiny_llama", None, "causal", "llama", "float32", "nf4", True, "sdpa", 1_000_000, 2, 64, "f"
        ),
        text=TextFacts(262, 2048),
        device="cpu",
        targets=[Target("model.layers.0.self_attn.q_proj", "linear", 64, 64, 500_000, 16, 32.0)],
        trainable_parameters=500_000,
        total_parameters=100_000_000,
        steps=4,
        warmup_steps=0,
        supervised_tokens=2000,
        rows=PlannedRows(
            RowCounts(100, 90, 10, 3, 5000, 2000, 99, dropped_reasons={"longer than max_length": 10}),
            evaluation=None,
            packing=True,
            packing_reason="auto: rows are isolated",
            micro_batches_per_epoch=4,
            steps_per_epoch=2,
        ),
        choice=ExecutionSettings(logits_chunk_tokens=128),
        peak_bytes=PeakBytes(50 * MIB, 2 * MIB, 4 * MIB, 40 * MIB, 14 * MIB, 110 * MIB),
        refusals=[],
    )
    return dataclasses.replace(plan, **changes)


def step(number: int, loss: float) -> StepRecord:
    return StepRecord(number, number / 2, loss, 1e-4, 0.5, 100, 40, 0.5, 200.0, MIB)


def written(run: RunFolder, facts: ReportFacts, plan: Plan | None = None) -> str:
    """report.md of these facts; report.html is written too. The evaluations are those of the facts."""
    plan = make_plan() if plan is None else plan
    run.write_json("plan.json", dataclasses.asdict(plan))
    steps = [record for record in run.read_metrics() if "eval" not in record]
    run.write_text("metrics.jsonl", "".join(f"{json.dumps(record)}\n" for record in [*steps, *facts.evaluations]))
    write_report(run, facts, plan)
    return (run.path / "report.md").read_text("utf-8")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.open_new(tmp_path / "first")
    for number, loss in enumerate((3.0, 2.0, 1.5, 1.25), start=1):
        run.append_metrics(step(number, loss))
    run.append_metrics(EvaluationRecord(4, {"loss": 1.5}))
    return run


def test_report_json_has_what_was_measured_and_nothing_else(run: RunFolder) -> None:
    write_report(run, FACTS, make_plan())
    report = json.loads((run.path / "report.json").read_text())
    assert "peak_allocated_bytes" not in report
    assert "peak_reserved_bytes" not in report
    assert report["peak_host_bytes"] == 900 * MIB
    assert report["seconds"] == FACTS.seconds
    assert report["rows"] == FACTS.rows
    assert report["predicted_bytes"] == {"cpu": 110 * MIB}
    assert report["reactions"] == [{"probe": "longest batch", "action": "micro-batches are split in two", "step": 0}]
    assert {field.name for field in dataclasses.fields(ReportFacts)} - set(report) == {
        "headline",
        "peak_requested_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "skipped_steps",
        "calibration",
        "budget_bytes",
        "verdict",
        "classes",
        "base_bytes_of_rank",
        "baselines",
    }


def test_the_page_states_the_share_of_a_sharded_base(run: RunFolder) -> None:
    page = written(run, dataclasses.replace(FACTS, base_bytes_of_rank=100 * MIB))
    assert "Each rank stored 100.0 MiB of the base." in page


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (120, "The budget of 120.0 MiB was kept: 20.0 MiB of it"),
        (90, "**The budget of 90.0 MiB was exceeded by 10.0"),
    ],
)
def test_the_page_says_whether_a_budget_was_kept(run: RunFolder, budget: int, words: str) -> None:
    page = written(run, dataclasses.replace(FACTS, budget_bytes=budget * MIB), make_plan(budget_bytes=budget * MIB))
    assert json.loads((run.path / "report.json").read_text())["budget_bytes"] == budget * MIB
    assert words in page


def test_the_pass_before_step_1_is_reported(run: RunFolder) -> None:
    counts = {"micro_batches": 8, "tokens": 1234, "forward_passes": 8, "backward_passes": 8, "seconds": 2.5}
    page = written(run, dataclasses.replace(FACTS, calibration={"start": "lora_ga", **counts}))
    assert json.loads((run.path / "report.json").read_text())["calibration"] == {"start": "lora_ga", **counts}
    words = "looked at 8 micro-batches (1,234 tokens) before step 1: 8 forward and 8 backward passes in 2.5 s."
    assert words in page.replace("\\", "")


def test_what_was_not_measured_is_absent_never_null_zero_or_nan() -> None:
    facts = dataclasses.replace(
        FACTS,
        peak_host_bytes=None,
        tokens_per_second=math.nan,
        final_loss=math.inf,
        seconds={},
        predicted_bytes={},
        measured_bytes={},
        best_step=None,
        reactions=[],
        evaluations=[{"step": 1, "eval": {"loss": 1.0, "accuracy": math.nan}}],
    )
    values = report_values(facts)
    absent = (
        "peak_host_bytes",
        "tokens_per_second",
        "final_loss",
        "seconds",
        "predicted_bytes",
        "measured_bytes",
        "best_step",
    )
    assert not set(absent) & set(values)
    assert values["reactions"] == []  # looked for, and there were none
    assert values["evaluations"] == [{"step": 1, "eval": {"loss": 1.0}}]
    json.dumps(values, allow_nan=False)


def test_true_zeros_stay() -> None:
    values = report_values(dataclasses.replace(FACTS, best_step=0, final_loss=0.0, adapter_bytes=0))
    assert (values["best_step"], values["final_loss"], values["adapter_bytes"]) == (0, 0.0, 0)


@pytest.mark.parametrize(("logits", "shown"), [(4, False), (MIB, True)])
def test_a_plan_shows_logits_that_take_memory(logits: int, shown: bool) -> None:
    plan = make_plan(peak_bytes=PeakBytes(50 * MIB, 2 * MIB, 4 * MIB, 40 * MIB, logits, 110 * MIB))
    assert ("logits" in [name for name, _ in memory_rows(plan, None)]) == shown


@pytest.mark.parametrize("best", ["eval.loss", "eval.accuracy"])
def test_a_metric_that_was_better_at_another_step_is_noted(run: RunFolder, best: str) -> None:
    evaluations = [
        {"step": step, "eval": {"loss": loss, "perplexity": math.exp(loss), "accuracy": share}}
        for step, loss, share in ((0, 3.0, 0.25), (2, 1.0, 0.75), (3, 1.25, 0.8125), (4, 1.5, 0.8125))
    ]
    facts, plan = dataclasses.replace(FACTS, evaluations=evaluations), make_plan()
    page = written(run, facts, dataclasses.replace(plan, recipe={**plan.recipe, "evaluation": {"best": best}}))
    noted = (
        "accuracy was better at step 3: 0.8125 instead of 0.75. To export the step with "
        "the best accuracy, set evaluation.best: eval.accuracy."
    )
    assert (noted in page.replace("\\", "")) == (best == "eval.loss")
    assert "perplexity was better" not in page


def test_a_metric_that_was_better_before_training_is_noted(run: RunFolder) -> None:
    evaluations = [{"step": step, "eval": {"loss": 3.0 - step, "accuracy": 0.75 - step / 8}} for step in (0, 2)]
    facts, plan = dataclasses.replace(FACTS, evaluations=evaluations), make_plan()
    page = written(run, facts, dataclasses.replace(plan, recipe={**plan.recipe, "evaluation": {"best": "eval.loss"}}))
    assert "accuracy was better at step 0 (before training): 0.75 instead of 0.5." in page.replace("\\", "")
    assert "eval.accuracy" not in page, "step 0 is never exported"


def test_the_best_loss_is_not_called_worse_than_itself(run: RunFolder) -> None:
    """Before training it was lower, but that state cannot be exported."""
    losses = {0: 0.5, 2: 1.0, 4: 1.5}
    evaluations = [
        {"step": step, "eval": {"loss": loss, "perplexity": math.exp(loss)}} for step, loss in losses.items()
    ]
    facts, plan = dataclasses.replace(FACTS, evaluations=evaluations), make_plan()
    page = written(run, facts, dataclasses.replace(plan, recipe={**plan.recipe, "evaluation": {"best": "eval.loss"}}))
    assert "This step had the best loss" not in page


def test_the_page_tells_all_of_it(run: RunFolder) -> None:
    page = written(run, FACTS)
    for text in (
        "# first",
        "lora of rank 16 on models/tiny\\_llama",
        "500,000 of 100,000,000 parameters (0.50%) in 1 modules",
        "for 4 of 4 steps (2.00 epochs)",
        "| 0 (before training) | 3 |  |",
        "| 2 (best) | 1 | 0.75 |",
        "| 4 | 1.5 | 0.5 |",
        "Training loss: 3 over the first tenth of the steps, 1.25 over the last.",
        "the weights after step 2, which had the best evaluation",
        "| activations | 40.0 MiB |",
        "| cpu | 110.0 MiB | 100.0 MiB | +10.0% |",
        "| tokens per second | 1,234 |",
        "are counted without padding",
        "| dropped | 10 |",
        "10 training rows were dropped: longer than max\\_length",
        "1.00% of the base's 200.0 MiB",
        "| longest batch | micro-batches are split in two | 0 |",
        "tunekit generate ",
        "first/adapter --output ",
    ):
        assert text in page, text
    assert "there are no evaluation rows" not in page
    order = [page.index(f"| {part} |") for part in ("load", "data", "train", "evaluate", "save")]
    assert order == sorted(order)


def test_the_page_tells_of_a_gpu_and_of_skipped_steps(run: RunFolder) -> None:
    peaks = {"peak_requested_bytes": 5 * MIB, "peak_allocated_bytes": 6 * MIB, "peak_reserved_bytes": 8 * MIB}
    page = written(run, dataclasses.replace(FACTS, skipped_steps=2, **peaks))
    assert json.loads((run.path / "report.json").read_text()).items() >= {"skipped_steps": 2, **peaks}.items()
    for text in (
        "2 steps changed no weight: their gradients overflowed in float16.",
        "| requested by tensors on the device | 5.0 MiB |",
    ):
        assert text in page, text


def test_a_result_that_is_worse_than_the_base_is_told_first(run: RunFolder) -> None:
    verdict = "worse than the base: eval loss 3.5 of the exported weights, 3 before training"
    page = written(run, dataclasses.replace(FACTS, eval_loss=3.5, verdict=verdict))
    assert json.loads((run.path / "report.json").read_text())["verdict"] == verdict
    assert page.index(f"**{verdict.capitalize()}.**") < page.index("## ")


def test_a_bare_run_has_a_page_without_holes(run: RunFolder) -> None:
    facts = dataclasses.replace(
        FACTS,
        peak_host_bytes=None,
        tokens_per_second=None,
        supervised_tokens_per_second=None,
        seconds={},
        rows={},
        predicted_bytes={},
        measured_bytes={},
        adapter_bytes=None,
        base_bytes=None,
        best_step=None,
        final_loss=None,
        evaluations=[],
        reactions=[],
    )
    rows = dataclasses.replace(make_plan().rows, steps_per_epoch=None)
    plan = make_plan(rows=rows, recipe={"adapter": {"method": "full"}, "objective": {"method": "dpo"}})
    page = written(run, facts, plan)
    assert "There are no evaluation rows." in page
    assert "set data.eval: 0.1 to evaluate on a tenth of the rows" in page
    assert " pairs." in page
    assert "None" not in page
    assert "nan" not in page.lower()
    assert "the weights after step 4, the last step" in page
    assert "merge" not in page
    assert "## Size" not in page


def test_text_of_others_is_never_markup(run: RunFolder) -> None:
    evil = "a|b`c`\n# heading <script>[x](http://y) ![i](z) ```sh\nrm -rf"
    model = dataclasses.replace(make_plan().model, name_or_path=evil)
    facts = dataclasses.replace(FACTS, reactions=[Reaction(evil, "https://bob:pw123@host hf_abcdefghijklmnop", 0)])
    page = written(run, facts, make_plan(model=model))
    assert "<script>" not in page.replace("\\<script", "")
    assert "\n# heading" not in page
    assert "a\\|b\\`c\\`" in page
    assert "](http" not in page.replace("\\](http", "")
    assert "pw123" not in page
    assert "abcdefghijklmnop" not in page
    values = (run.path / "report.json").read_text()
    assert "pw123" not in values
    assert "abcdefghijklmnop" not in values
    assert escape("plain words, 1.5") == "plain words, 1.5"


@pytest.mark.parametrize(
    ("objective", "asked"),
    [
        ("sft", "--prompt 'your text'"),
        ("dreambooth", "--prompt 'your text'"),
        ("speech", "--prompt FILE"),
        ("image_classify", "--prompt FILE"),
        ("reward", "--score FILE"),
    ],
)
def test_the_shown_commands_are_not_refused(objective: str, asked: str, tmp_path: Path) -> None:
    """A model that reads files or scores answers has no text as prompt, and without data.eval, eval needs rows."""
    folder = write_run(tmp_path / "run")
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    plan["recipe"]["objective"]["method"] = objective
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    run = read_run(folder)
    for rows, shown in (("", run), (" --data FILE", dataclasses.replace(run, evaluations=[]))):
        commands = next(section.commands for section in run_report(shown).sections if section.commands)
        assert commands[:2] == [f"tunekit eval {folder}{rows}", f"tunekit generate {folder} {asked}"]


@pytest.mark.parametrize("method", known_names("adapters"))
def test_the_command_to_merge_is_only_shown_where_merge_is_possible(method: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    plan["recipe"]["adapter"] = {"method": method}
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    commands = next(section.commands for section in run_report(read_run(folder)).sections if section.commands)
    changes_weights = load_method(method).model is None and method != "full"
    assert any(command.startswith("tunekit merge ") for command in commands) == changes_weights


def test_no_text_of_a_file_commands_the_terminal(tmp_path: Path) -> None:
    """report.md is made to be read in one."""
    hostile = "\x1b[2J\x1b]0;title\x07 \u202eback"
    folder = write_run(tmp_path / "run")
    for name in ("evaluation_rows.json", "metrics.jsonl"):
        text = (folder / name).read_text("utf-8").replace("<|user|>cakes?", json.dumps(hostile)[1:-1])
        (folder / name).write_text(text, "utf-8")
    (folder / "recipe.yaml").write_text(f"model: base # {hostile}\n", "utf-8")
    page = markdown_page(run_report(read_run(folder)))
    assert not any(control in page for control in ("\x1b", "\x07", "\u202e"))
    assert page.replace("\\\\", "\\").count("x1b") == 6  # of the answers, the worst row and the recipe


def test_the_curve_falls_with_the_loss() -> None:
    bars, _, words = curve([4.0, 3.0, 2.0, 1.0]).partition("  ")
    assert bars == "█▆▃▁"
    assert words == "4 to 1"
    assert len(curve([float(value) for value in range(1000)]).partition("  ")[0]) == 60
    assert curve([2.0, 2.0, 2.0]).startswith("▁▁▁")


def test_the_page_draws_the_headline_alone_and_says_what_it_is() -> None:
    series = [Series(label, [*range(4)], [4.0, 3.0, 2.0, 1.0], "line", 0) for label in ("training", "evaluation")]
    charts = [Chart(name, name.capitalize(), "", False, series) for name in ("loss", "rate")]
    assert markdown_page(ReportPage("run", [], [ReportSection(charts=charts)])).endswith(
        "```\nLoss, training\n█▆▃▁  4 to 1\n```\n"
    )
    short = [dataclasses.replace(charts[0], series=[dataclasses.replace(series[0], x=[0, 1], y=[2.0, 1.0])])]
    assert "```" not in markdown_page(ReportPage("run", [], [ReportSection(charts=short)]))


def test_many_evaluations_are_thinned_but_keep_first_best_and_last(run: RunFolder) -> None:
    evaluations = [{"step": number, "eval": {"loss": 1.0 + number}} for number in range(500)]
    page = written(run, dataclasses.replace(FACTS, evaluations=evaluations, best_step=123))
    for label in ("| 0 (before training) |", "| 123 (best) |", "| 499 |"):
        assert label in page
    assert page.count("\n| ") < 60


def test_the_page_shows_what_programs_computed_from_exports(run: RunFolder) -> None:
    part = {"largest": 0.25, "mean": 0.001, "perplexity": 3.5, "torch_perplexity": 3.4, "greedy_differences": 7}
    certificate = {"program": "llama.cpp", "version": "b10434", "parts": {"Q4_K_M": {**part, "tokens": 512}}}
    certificate |= {"rows": "8 evaluation rows of the run", "note": "Ollama itself was not run."}
    export = {"format": "gguf", "path": "/elsewhere/small.gguf", "certificate": certificate}
    run.write_json(EXPORTS, [export, export])
    page = written(run, FACTS)
    text = "small.gguf in llama.cpp b10434: 8 evaluation rows of the run. Ollama itself was not run.\n"
    assert page.count(text) == 1
    assert "| small.gguf | llama.cpp b10434 | Q4\\_K\\_M | 0.25 | 0.001 | 3.5 | 3.4 | 7 | 512 |" in page
    assert "/elsewhere" not in page


def test_markers_of_a_chat_template_are_left_out(tmp_path: Path) -> None:
    page = markdown_page(run_report(read_run(write_run(tmp_path / "run"))))
    assert "cakes?" in page
    assert "user" not in page.partition("cakes?")[0].rpartition("|")[2]
    assert "im_start" not in markdown_page(run_report(read_run(write_run(tmp_path / "run2"))))
