"""Direct preference optimization: every loss against trl's own code, and whole runs in every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DPOTrainer

from tests.conftest import write_tiny_llama
from tests.support.data_case import objective_of
from tests.support.pair_case import Told, make_rows, trainer_of
from tests.support.plans import make_plan
from tests.support.train_case import (
    check_a_resume,
    lose_the_end,
    losses,
    records,
    tensors_of,
    train,
    without_times,
    write_sections,
)
from tunekit.adapters.attach import attach_adapter
from tunekit.contracts import StepBatches
from tunekit.errors import DataError, ModelError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.merge import merge_verb
from tunekit.model.load import load_model
from tunekit.objectives.losses.preferences import LOSSES
from tunekit.objectives.rows.answers import ASKS_AGAIN, NOT_ANSWERED
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.bases.pair_settings import REWARDS
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.dpo import DpoSettings
from tunekit.records import ExecutionSettings
from tunekit.targets.target import find_target, load_target
from tunekit.training.begin import probe_reference
from tunekit.tuned.model import ModelRun, TunedModel
from tunekit.tuned.network import prepare_network

CPU = torch.device("cpu")
SMOOTHING = {"robust": 0.1, "exo_pair": 0.05, "aot": 0.2}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0), "beta": 0.3} for name in LOSSES},
    "weighted": {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "rpo": {"rpo_alpha": 0.7},
    "length-desensitised": {"ld_alpha": 0.4, "loss_type": ["sigmoid", "ipo"], "rpo_alpha": 0.5},
}


class TrlModel(nn.Module):
    """What trl's fused head says: one table for each forward, the policy's first."""

    is_gradient_checkpointing = False

    def __init__(self, tables: Sequence[Tensor]) -> None:
        super().__init__()
        self.tables = iter(tables)

    def forward(self, **inputs: Any) -> Any:
        table = next(self.tables)
        blank = torch.zeros_like(table)
        return SimpleNamespace(log_probs=table, entropy=blank, mean_logits=blank, is_top1=blank.bool())


def trl_loss(told: Told, settings: DpoSettings) -> tuple[Tensor, dict[str, float]]:
    """What DPOTrainer makes of the same log-probabilities in one batch."""
    mask = told.trained()
    tables = [table * mask[:, 1:] for table in (told.policy, told.reference)]  # 0 where there is no label, as in trl
    model = TrlModel(tables)
    weighted = settings.weighted_losses
    trainer = trainer_of(
        ld_alpha=settings.ld_alpha,
        precompute_ref_logps=False,
        model=model,
        ref_model=model,
        f_divergence_type="reverse_kl",
        beta=settings.beta,
        loss_types=[name for name, _ in weighted],
        loss_weights=[weight for _, weight in weighted],
        label_smoothing=settings.label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=settings.discopop_tau, gradient_checkpointing_kwargs=None),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": mask, "attention_mask": told.real(), "completion_mask": mask}
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name.replace("/", "_"): values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("sizes", [[5], [2, 1, 2]], ids=["one batch", "three micro-batches"])
@pytest.mark.parametrize("case", CASES)
def test_every_loss_its_gradient_and_what_is_logged_are_trls(case: str, sizes: list[int]) -> None:
    settings = DpoSettings(**CASES[case])
    told = Told.drawn()
    expected, theirs = trl_loss(told, settings)
    (gradient,) = torch.autograd.grad(expected, told.policy)
    loss, logged, _ = told.ours(settings, sizes)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    (ours,) = torch.autograd.grad(loss, told.policy)
    assert float(ours.abs().max()) > 0
    torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-6)
    for name in REWARDS:
        assert logged[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_aot_ranks_pairs_over_every_rank_s_share() -> None:
    """Two ranks with a part of the step each, and one with none, compare as one rank with the whole step does."""
    told, settings = Told.drawn(2), DpoSettings(loss_type=("aot",))
    whole = told.prepared(settings, told.rows)
    shares = [told.rows[:2], told.rows[2:]]
    everything: list[list[float]] = []

    def ask(mine: list[Any]) -> list[Any]:
        everything.append(mine)
        return mine

    for share in shares:
        told.prepared(settings, share, ask)
    answers = [one + other for one, other in zip(everything[:2], everything[2:], strict=True)]
    for share, start in zip(shares, (0, 2), strict=True):
        turn = iter(answers)
        found = told.prepared(settings, share, lambda mine, turn=turn: next(turn))
        assert found == whole[start : start + len(share)]
    assert told.prepared(settings, []) == []


def test_the_recipe_says_what_a_loss_does_not_read() -> None:
    for values in (
        {"label_smoothing": 0.1},
        {"loss_type": "exo_pair"},
        {"loss_type": ["sigmoid", "sigmoid"]},
        {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]},
        {"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0},
        {"loss_weights": [0.0]},
        {"loss_type": ["hinge", "sigmoid"], "loss_weights": [0.0, 0.0]},
        {"discopop_tau": 0.2},
        {"loss_type": []},
        {"loss_type": "bco"},
    ):
        with pytest.raises(ValueError, match=r"loss|label_smoothing|rpo_alpha"):
            DpoSettings.model_validate(values)
    DpoSettings.model_validate({"loss_weights": [0.0], "rpo_alpha": 1.0})
    DpoSettings.model_validate({"loss_type": ["discopop", "hinge"], "loss_weights": [1.0, 0.0], "discopop_tau": 0.2})
    DpoSettings.model_validate({"discopop_tau": 0.05})  # a run's own recipe has every default


# Whole runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


def pairs(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        asked = [{"role": "user", "content": f"say {'very ' * (number % 5)}{number}"}]
        said = ["so " * (number % 7) + str(number), "no " * (number % 4) + f"x{number}"]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in said)
        rows.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    return rows


def write_recipe(folder: Path, base: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows or pairs(24)]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": "train.jsonl", "eval": 0.25, "max_length": 128},
        "objective": {"method": "dpo"},
        "adapter": {"method": "lora", "r": 4},
        "training": {"learning_rate": 0.003, "micro_batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2},
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)


def check_it_is_one_run(
    write: Callable[..., Path], base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any
) -> Path:
    """Micro-batches of another size, padded lines, a streamed base and a resume give the same run."""

    def recipe(name: str, micro_batch_size: int, **memory: Any) -> Path:
        steps = {"micro_batch_size": micro_batch_size, "gradient_accumulation_steps": 6 // micro_batch_size}
        training = {**steps, "epochs": 1, "save_steps": 2}
        return write(folder / name, base, data={"eval": None}, training=training, memory=memory, **sections)

    run = train(recipe("whole", 2))
    whole, tensors = losses(run), tensors_of(run)
    streamed = train(recipe("streamed", 2, streaming="disk"))
    assert tensors_of(streamed) == tensors
    assert without_times(records(streamed)) == without_times(records(run))
    lose_the_end(run)
    train(run.parent / "recipe.yaml", resume=True)
    assert tensors_of(run) == tensors
    monkeypatch.setattr("tunekit.planning.prepare.keeps_documents_apart", lambda net: False)
    assert losses(train(recipe("padded", 1))) == pytest.approx(whole, rel=1e-5)
    return run


@pytest.mark.drawn
def test_a_run_learns_and_its_folder_is_used_by_every_verb(base: Path, tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path, base, training={"epochs": 8, "eval_steps": 4}))
    steps = [record for record in records(run) if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the policy is its own reference"
    assert steps[0]["rewards_accuracies"] == 0.0
    assert steps[-1]["loss"] < 0.5
    assert steps[-1]["rewards_margins"] == pytest.approx(
        steps[-1]["rewards_chosen"] - steps[-1]["rewards_rejected"], abs=1e-6
    )
    evaluations = [record["eval"] for record in records(run) if "eval" in record]
    assert set(evaluations[-1]) == {"loss", *REWARDS}
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "after.json"), [])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert after["rows"] == 6
    assert {name: after[name] for name in evaluations[-1]} == pytest.approx(evaluations[-1], rel=1e-5)
    evaluate_verb(str(tmp_path / "recipe.yaml"), None, None, None, [], str(tmp_path / "before.json"), [])
    before = json.loads((tmp_path / "before.json").read_text("utf-8"))
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    loaded = load_target(find_target(str(run), None, ["evaluation.max_new_tokens=3"]), CPU)
    assert len(answer(loaded, ["say 3", "say very 1"])) == 2
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), str(base), None, [])
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.drawn
def test_micro_batches_layouts_and_engines_are_one_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(write_recipe(tmp_path / "plain", base))
    changed = {"micro_batch_size": 6, "gradient_accumulation_steps": 1}
    whole = train(write_recipe(tmp_path / "whole", base, training=changed))
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-5)
    single = {"micro_batch_size": 1, "gradient_accumulation_steps": 6}
    alone = train(write_recipe(tmp_path / "alone", base, training=single))
    assert losses(alone) == pytest.approx(losses(plain), rel=1e-5)
    streamed = train(write_recipe(tmp_path / "streamed", base, memory={"streaming": "disk"}))
    assert tensors_of(streamed) == tensors_of(plain)
    assert without_times(records(streamed)) == without_times(records(plain))
    monkeypatch.setattr("tunekit.planning.prepare.shares_prefixes", lambda net, longest: False)
    apart = train(write_recipe(tmp_path / "apart", base))
    assert losses(apart) == pytest.approx(losses(plain), rel=1e-5)
    monkeypatch.setattr("tunekit.planning.prepare.keeps_documents_apart", lambda net: False)
    padded = train(write_recipe(tmp_path / "padded", base))
    assert losses(padded) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.drawn
def test_batches_are_what_they_say(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt once and both answers behind it, or each with its own; or two padded lines a pair."""
    found = []
    for keeps, shares in ((True, True), (True, False), (False, False)):
        monkeypatch.setattr("tunekit.planning.prepare.keeps_documents_apart", lambda net, keeps=keeps: keeps)
        monkeypatch.setattr("tunekit.planning.prepare.shares_prefixes", lambda net, longest, shares=shares: shares)
        plan, prepared = make_plan(load_recipe(write_recipe(tmp_path, base)), device=CPU)
        found.append(prepared.largest_batch)
        assert plan.peak_bytes.activations > 0
        if shares:
            objective = prepared.rows.objective
            computed = [row.size - objective.rows.shared(row) for row in (prepared.rows.train[at] for at in range(18))]
    shared, apart, padded = found
    assert shared.inputs["input_ids"].shape == (1, shared.padded)
    assert max(computed) < shared.padded <= sum(sorted(computed)[-2:]), "the largest of what is really computed"
    assert apart.inputs["input_ids"].shape == (1, apart.tokens)
    assert apart.padded == apart.tokens == sum(row.size for row in apart.rows)
    widest = max(max(row.sizes) for row in padded.rows)
    assert padded.inputs["input_ids"].shape == (2 * len(padded.rows), widest)
    assert padded.padded == 2 * len(padded.rows) * widest


BESIDE: list[dict[str, Any]] = [
    {"method": "dpo", "rpo_alpha": 0.5, "ld_alpha": 0.5},
    {"method": "orpo"},
    {"method": "simpo"},
    {"method": "reward"},
]


@pytest.mark.parametrize("objective", BESIDE, ids=lambda settings: settings["method"])
def test_a_prompt_computed_once_is_two_plain_rows(base: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    """The same loss, gradient and logged numbers, in a float64 net whose losses are float32; also where answers begin
    alike and where one of them is the beginning of the other."""
    rows = pairs(8)
    rows[0]["chosen"][0]["content"] = rows[0]["rejected"][0]["content"] + " and more"
    rows[1]["chosen"][0]["content"] = "very much so"
    rows[1]["rejected"][0]["content"] = "very little"
    recipe = write_recipe(tmp_path, base, rows=rows)
    values = json.loads(recipe.read_text("utf-8")) | {"objective": objective}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    _, prepared = make_plan(load_recipe(recipe), device=CPU)
    sharing: Any = prepared.rows.objective
    loaded = load_model(prepared.model, device=CPU)
    loaded.net.double()
    adapter = attach_adapter(loaded.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.trained().values():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).double()
    model = TunedModel(loaded, adapter)
    found = []
    for layout in (sharing, sharing.laid_out(True), sharing.laid_out(False)):
        batch = layout.rows.collate([[prepared.rows.train[at]] for at in range(6)])
        batch = layout.prepare_step(ModelRun(model, layout.rows), StepBatches(0, 0.0, (0,), (batch,))).batches[0]
        loss = layout.loss.loss(model.output(batch.inputs), batch)
        gradient = torch.autograd.grad(loss.total.sum(), list(adapter.trained().values()))
        found.append((batch.padded, loss, torch.cat([each.flatten() for each in gradient])))
    assert found[0][0] < found[1][0] <= found[2][0]
    for _, loss, gradient in found[1:]:
        torch.testing.assert_close(found[0][1].total, loss.total, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[0][2], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
        for name, metric in loss.metrics.items():
            torch.testing.assert_close(found[0][1].metrics[name], metric, rtol=1e-6, atol=1e-6)


@pytest.mark.drawn
def test_a_resumed_run_is_the_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    check_a_resume(write_recipe(tmp_path, base, adapter={"dropout": 0.1}, training={"save_steps": 2}))


@pytest.mark.drawn
@pytest.mark.parametrize("keeps", [True, "auto"])
def test_a_reference_that_is_kept_is_computed_once_and_changes_nothing(
    keeps: bool | str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of 18 rows and the evaluations of 6: 24 forwards of the reference, each of one row, whatever the
    micro-batches and however often the run is begun anew."""
    plain = train(write_recipe(tmp_path / "plain", base, objective={"precompute_ref_log_probs": False}))
    asked: list[int] = []
    scored = ModelRun.reference

    def counted(self: ModelRun, batches: Any, *values: Any) -> Any:
        if self.model.device.type == "cpu" and step_is_real(self.model):
            asked.extend(len(batch.rows) for batch in batches)
        return scored(self, batches, *values)

    def step_is_real(model: Any) -> bool:
        return not next(model.base.net.parameters()).is_meta

    monkeypatch.setattr(ModelRun, "reference", counted)
    kept = {"objective": {"precompute_ref_log_probs": keeps}}
    run = train(write_recipe(tmp_path / "kept", base, **kept))
    assert asked == [1] * 24
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    recipe = write_recipe(tmp_path / "parts", base, **kept, training={"save_steps": 4})
    parts = train(recipe)
    lose_the_end(parts)
    asked.clear()
    train(recipe, resume=True)
    assert 0 < len(asked) < 24, "rows that the rest of the run meets"
    assert tensors_of(parts) == tensors_of(run)
    streamed = train(write_recipe(tmp_path / "streamed", base, **kept, memory={"streaming": "disk"}))
    assert tensors_of(streamed) == tensors_of(run)
    asked.clear()
    train(write_recipe(tmp_path / "once", base, **kept, training={"epochs": 1}))
    assert (set(asked) == {1}) is (keeps is True), "one epoch never needs a score of the training rows again"


@pytest.mark.drawn
def test_a_cpu_takes_no_more_long_pairs_at_a_time_than_full_speed_needs(base: Path, tmp_path: Path) -> None:
    def planned(name: str, words: int, *overrides: str, previous: ExecutionSettings | None = None) -> Any:
        answers = [[{"role": "assistant", "content": f"{word} " * words}] for word in ("so", "no")]
        rows = [
            {"prompt": [{"role": "user", "content": str(n)}], "chosen": answers[0], "rejected": answers[1]}
            for n in range(8)
        ]
        recipe = write_recipe(tmp_path / name, base, rows, data={"max_length": 4096, "eval": None})
        return make_plan(load_recipe(recipe, list(overrides)), device=CPU, previous=previous)[0]

    short, long = planned("short", 2), planned("long", 200)
    sizes = [(plan.choice.micro_batch_size, plan.choice.gradient_accumulation_steps) for plan in (short, long)]
    assert sizes == [(2, 3), (1, 6)]
    assert short.steps == long.steps
    assert "6 micro-batches of size 1 a step (the same rows as 3 of size 2), because they need" in "\n".join(long.notes)
    assert not any("because they need less memory" in note for note in short.notes)
    written = replace(long.choice, micro_batch_size=2, gradient_accumulation_steps=3)
    assert planned("long", 200, previous=written).choice.micro_batch_size == 2, "a resumed run keeps its micro-batches"
    assert planned("long", 200, "memory.budget=10GiB").choice == long.choice


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"train_on": "all"}}, "data.train_on: this objective compares answers"),
        ({"data": {"excess_length": "split"}}, "data.excess_length: if an answer were split"),
        ({"data": {"packing": True}}, "data.packing: rows with pairs of sequences cannot be packed"),
        (
            {"objective": {"label_smoothing": 0.1}},
            "objective.label_smoothing: has an effect only with robust, exo_pair, aot",
        ),
    ],
)
def test_what_cannot_be_is_said(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    recipe = write_recipe(tmp_path, base, **changes)
    with pytest.raises(TunekitError, match=said):
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])


def turn(content: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": content}


BAD = [
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "an empty answer"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "an empty answer"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the chosen and the rejected answer are the same"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "no prompt"),
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({"prompt": "p", "chosen": [turn("a"), turn("c", "user")], "rejected": "b"}, NOT_ANSWERED),
    ({"prompt": "p", "chosen": "a", "rejected": [turn("b", "user")]}, NOT_ANSWERED),
    ({"prompt": "p", "chosen": [turn(" ")], "rejected": "b"}, "an empty answer"),
    ({"prompt": "p", "chosen": [turn("q", "user"), turn("a")], "rejected": [turn("b")]}, ASKS_AGAIN),
    ({"prompt": "p", "chosen": [turn("a")], "rejected": [turn("s", "system"), turn("b")]}, ASKS_AGAIN),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_an_unusable_pair_is_an_error_or_counted(base: Path, tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    recipe = write_recipe(tmp_path, base, rows=[*pairs(4), row])
    with pytest.raises(
        TunekitError, match=rf"train\.jsonl:5: .*{reason}; correct the row, or write objective\.unusable_pairs"
    ):
        make_plan(load_recipe(recipe), device=CPU)
    recipe = write_recipe(
        tmp_path, base, rows=[*pairs(4), row], objective={"unusable_pairs": "drop"}, data={"eval": None}
    )
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert plan.rows.training.dropped_reasons == {reason: 1}


def test_a_pair_without_a_side_names_the_row(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, rows=[*pairs(4), {"prompt": "p", "chosen": "a"}])
    with pytest.raises(TunekitError, match=r"train\.jsonl:5: no field 'rejected'"):
        make_plan(load_recipe(recipe), device=CPU)


def test_the_rate_is_the_objective_s_where_none_is_written(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    values = json.loads(recipe.read_text("utf-8"))
    del values["training"]["learning_rate"]
    recipe.write_text(json.dumps(values), encoding="utf-8")
    loaded = load_recipe(recipe)
    assert loaded.recipe.training.learning_rate == 5e-6
    assert any("trl/scripts/dpo.py" in default for default in loaded.defaults)


def test_other_tools_spellings_are_read(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    values = json.loads(recipe.read_text("utf-8"))
    del values["objective"]
    recipe.write_text(json.dumps({**values, "rl": "dpo", "rl_beta": 0.2, "pref_loss": "hinge"}), encoding="utf-8")
    loaded = load_recipe(recipe)
    assert loaded.recipe.objective == DpoSettings(beta=0.2, loss_type=("hinge",))
    assert len(loaded.rewrites) == 3


def test_an_adapter_that_is_not_the_identity_is_no_reference(base: Path) -> None:
    loaded = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=CPU)
    adapter = attach_adapter(loaded.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    model, objective = TunedModel(loaded, adapter), objective_of(DpoSettings())
    batch = objective.rows.collate([make_rows()])
    probe_reference(model, objective, batch)
    for parameter in adapter.trained().values():
        parameter.data.add_(0.1)
    with pytest.raises(ModelError, match="bypassed differs from the model at step 0"):
        probe_reference(model, objective, batch)


def test_the_reference_of_a_streamed_base_is_one_pass_of_the_whole_step(base: Path) -> None:
    loaded = load_model(ModelSection(name_or_path=str(base), dtype="float32"), device=CPU, streamed=True)
    attach = partial(attach_adapter, loaded.net, LoraSettings(r=4), seed=0, head_name="lm_head")
    model, objective = prepare_network(loaded, ExecutionSettings(streaming="disk"), attach), objective_of(DpoSettings())
    slots: Any = model.slots
    held, holding = list[int](), slots.holding
    slots.holding = lambda layer, then=None: (held.append(layer), holding(layer, then))[1]
    batches = tuple(objective.rows.collate([[row]]) for row in make_rows()[:3])
    run = ModelRun(model, objective.rows)
    step = objective.prepare_step(run, StepBatches(0, 0.0, (0, 1, 2), batches))
    assert [layer for layer, _ in groupby(held)] == list(range(len(slots.blobs)))
    alone = [objective.prepare_step(run, StepBatches(0, 0.0, (0,), (batch,))).batches[0] for batch in batches]
    for together, single in zip(step.batches, alone, strict=True):
        assert torch.equal(together.targets["reference"], single.targets["reference"])


def test_an_answer_counts_as_a_whole(tiny_llama: Path, tmp_path: Path) -> None:
    rows = pairs(8)
    rows[2]["chosen"][0]["weight"] = 0.5
    with pytest.raises(DataError, match=r"train\.jsonl:3: a message has a 'weight' other than 0 and 1"):
        make_plan(load_recipe(write_recipe(tmp_path, tiny_llama, rows)), device=CPU)
