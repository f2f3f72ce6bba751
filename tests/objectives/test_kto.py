"""KTO: losses, gradients and what is logged against trl's own trainer; whole runs; what is wrong with rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import pad

from tests.objectives.test_dpo import CPU, check_it_is_one_run, write_recipe
from tests.objectives.test_dpo import base as base
from tests.support.data_case import objective_of
from tests.support.pair_case import Output, log_probabilities_of, on_two_ranks, parts_of, run_of, trainer_of
from tests.support.plans import make_plan
from tests.support.train_case import records, train
from tunekit.contracts import Batch, EncodeOptions, Row, StepBatches
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.merge import merge_verb
from tunekit.preview import preview_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.kto import LOGGED, KtoSettings
from tunekit.targets.target import find_target, load_target

SIZES = [(5, 3), (7, 2), (2, 4), (6, 1), (3, 5)]  # tokens of each answer and its prompt
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "kto": {"beta": 0.3},
    "weighted": {"beta": 0.5, **WEIGHTS},
    "apo": {"loss_type": "apo_zero_unpaired", "beta": 0.4, **WEIGHTS},
}
MIXED, GOOD = (True, False, False, True, False), (True,) * 5


class Table(nn.Module):
    """A model that gives each id its own log-probability at each position, as trl's fused head says it."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, raised: float = 0.0) -> None:
        super().__init__()
        drawn = torch.rand(16, 100, generator=torch.Generator().manual_seed(seed))  # (T, V)
        self.values = nn.Parameter(raised - 3 * drawn)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        found = self.values[torch.arange(input_ids.shape[1] - 1)[None], input_ids[:, 1:]] * (labels[:, 1:] >= 0)
        blank = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=blank, mean_logits=blank, is_top1=blank.bool())


def make_rows(objective: Any, labels: Sequence[bool]) -> list[Row]:
    draw, rows = np.random.default_rng(0), []
    for number, ((size, prompt), label) in enumerate(zip(SIZES, labels, strict=True)):
        ids = draw.integers(1, 100, prompt + size).astype(np.int32)
        parts = parts_of(("completion", ids, np.arange(prompt + size) >= prompt), label=np.array([label]))
        rows.append(objective.rows.make_row(parts, f"d:{number}", number))
    return rows


def trl_loss(
    rows: Sequence[Row], models: Sequence[Table], settings: KtoSettings, longest: int = 1024
) -> tuple[Tensor, dict[str, float]]:
    """What KTOTrainer makes of the rows as one batch of its data set, whose max_length is `longest`."""
    prompts = [row.parts["completion"][~row.parts["completion_trained"]] for row in rows]
    answers = [row.parts["completion"][row.parts["completion_trained"]] for row in rows]
    inputs = {"label": torch.tensor([bool(row.parts["label"][0]) for row in rows])}
    for name, said in (("", answers), ("KL_", [answers[-1], *answers[:-1]])):
        ids = [torch.from_numpy(np.concatenate(both))[:longest].long() for both in zip(prompts, said, strict=True)]
        marks = [(torch.arange(len(line)) >= len(prompt)).long() for line, prompt in zip(ids, prompts, strict=True)]
        found = {"input_ids": ids, "completion_mask": marks, "attention_mask": [torch.ones_like(line) for line in ids]}
        inputs |= {f"{name}{key}": pad(values, padding_value=0) for key, values in found.items()}
    policy, reference = models
    trainer = trainer_of(
        model=policy,
        ref_model=reference,
        calculate_KL=settings.loss_type == "kto",
        precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _total_train_tokens=0,
        _tp_size=1,
        **settings.model_dump(include={"beta", "loss_type", *WEIGHTS}),
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    loss = KTOTrainer._compute_loss(trainer, policy, inputs, False)
    return loss, {name.replace("/", "_"): values[0] for name, values in trainer._metrics["train"].items()}


def scored_by(models: Sequence[Table]) -> AbstractContextManager[None]:
    """A block in which log-probabilities are those of the tables."""

    def of_batch(name: str, batch: Batch) -> Tensor:
        places = batch.inputs["position_ids"].flatten()[batch.targets["index"]]
        return models[name == "reference"].values[places, batch.targets["ids"]]

    return log_probabilities_of(of_batch)


@pytest.mark.parametrize("labels", [MIXED, GOOD], ids=["mixed", "all good"])
@pytest.mark.parametrize("sizes", [[5], [2, 1, 2]], ids=["one batch", "three micro-batches"])
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_what_is_logged_are_trls(case: str, sizes: list[int], labels: Sequence[bool]) -> None:
    settings, models = KtoSettings(**CASES[case]), (Table(0, raised=0.5), Table(1))
    objective = objective_of(settings)
    rows = make_rows(objective, labels)
    expected, theirs = trl_loss(rows, models, settings)
    (gradient,) = torch.autograd.grad(expected, models[0].values)
    left = iter([rows[place] for place in (3, 0, 4, 1, 2)])
    batches = tuple(objective.rows.collate([[next(left)] for _ in range(size)]) for size in sizes)
    with scored_by(models):
        step = objective.prepare_step(run_of(objective.rows), StepBatches(0, 0.0, tuple(range(len(batches))), batches))
        outputs: Any = [Output("policy", batch) for batch in step.batches]
        found = [objective.loss.loss(output, output.batch) for output in outputs]
    loss = torch.cat([each.total for each in found]).sum() / len(rows)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, models[0].values)[0], gradient, rtol=1e-5, atol=1e-7)
    logged = {name: sum(float(each.metrics[name]) for each in found) / len(rows) for name in LOGGED}
    finite = {name: value for name, value in logged.items() if np.isfinite(value)}
    assert finite == pytest.approx({name: theirs[name] for name in LOGGED if name in theirs}, rel=1e-5)
    assert (finite["kl"] > 0) == (settings.loss_type == "kto")


@pytest.mark.parametrize(("max_length", "positions"), [(0, None), (8, None), (10, 8), (16, 14)])
def test_mismatched_answers_are_cut_only_where_trl_and_the_model_must(max_length: int, positions: int | None) -> None:
    """The longest row has 9 tokens, and the longest prompt with the answer of the row before it 11."""
    settings, models = KtoSettings(), (Table(0, raised=0.5), Table(1))
    objective = objective_of(settings)
    rows = make_rows(objective, MIXED)
    expected = trl_loss(rows, models, settings, min(max_length or 99, positions or 99))[1]["kl"]
    assert (expected == trl_loss(rows, models, settings)[1]["kl"]) == (max_length in (0, 16))
    kind = objective.rows.with_options(EncodeOptions(max_length=max_length))
    with scored_by(models):
        batch = kind.collate([[row] for row in rows])
        run = run_of(kind, positions=positions)
        step = objective.prepare_step(run, StepBatches(0, 0.0, (0,), (batch,)))
        measured: Any = objective.loss.measuring(run, rows, [batch])
    assert float(step.batches[0].targets["facts"][0, 0]) == pytest.approx(expected, rel=1e-5)
    assert measured.balance[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("prompts", "answers"),
    [
        ([0, 0, 1, 1, 2, 2], [5, 5, 1, 1, 3, 3]),
        ([0, 0, 1, 1, 0], [3, 3, 1, 1, 3]),
        ([0, 0, 0], [2, 0, 1]),
        ([0], []),
    ],
    ids=["pairs", "a prompt again", "one prompt", "one row"],
)
def test_a_mismatched_row_has_an_answer_to_a_different_prompt(prompts: list[int], answers: list[int]) -> None:
    """The last row is before the first one. A single row has no other answer, so that its KL is 0."""
    objective = objective_of(KtoSettings())
    rows, seen = list[Row](), dict[int, int]()
    for number, prompt in enumerate(prompts):
        ids = np.array([50 + prompt] * 2 + [number + 1] * 3, np.int32)
        parts = parts_of(("completion", ids, np.arange(5) >= 2), label=np.array([number % 2 == 0]))
        rows.append(objective.rows.make_row(parts, f"d:{number}", number))

    def of_batch(name: str, batch: Batch) -> Tensor:
        if name == "policy":
            seen.update({row.number: int(row.parts["completion"][-1]) - 1 for row in batch.rows})
        return torch.full(batch.targets["ids"].shape, -1.0 if name == "policy" else -2.0)

    batches = tuple(objective.rows.collate([[row]]) for row in reversed(rows))
    expected = 3.0 if answers else 0.0
    with log_probabilities_of(of_batch):
        step = objective.prepare_step(run_of(objective.rows), StepBatches(0, 0.0, tuple(range(len(rows))), batches))
        assert [seen[number] for number in sorted(seen)] == answers
        assert {float(batch.targets["facts"][0, 0]) for batch in step.batches} == {expected}
        seen.clear()
        measured: Any = objective.loss.measuring(run_of(objective.rows), rows, batches)
    assert [seen[number] for number in sorted(seen)] == answers
    assert measured.balance[0] == expected


def test_ranks_together_have_the_kl_of_one() -> None:
    objective = objective_of(KtoSettings())
    rows = make_rows(objective, MIXED)

    def facts(share: Sequence[Row], gather: Any = list) -> list[float]:
        batches = tuple(objective.rows.collate([[row]]) for row in share)
        step = objective.prepare_step(
            run_of(objective.rows, gather), StepBatches(0, 0.0, tuple(range(len(share))), batches)
        )
        return step.batches[0].targets["facts"][0].tolist()  # type: ignore[no-any-return]

    shares = (rows[3:], rows[:3])
    with scored_by((Table(0, raised=0.5), Table(1))):
        found = on_two_ranks(lambda number, gather: facts(shares[number], gather))
        assert found[0] == found[1] == facts(rows)
    assert found[0][0] > 0


# Whole runs.


def unpaired(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        good = number % 3 != 2
        said = "so " * (number % 7) + str(number) if good else "no " * (number % 4 + 1) + f"x{number}"
        asked = [{"role": "user", "content": f"say {'very ' * (number % 5)}{number}"}]
        rows.append({"prompt": asked, "completion": [{"role": "assistant", "content": said}], "label": good})
    return rows


def write_kto(folder: Path, base: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    objective = {"method": "kto", **sections.pop("objective", {})}
    return write_recipe(folder, base, rows or unpaired(24), objective=objective, **sections)


def measured(target: Path, *overrides: str) -> dict[str, float]:
    evaluate_verb(str(target), None, None, None, [], str(target.parent / "eval.json"), list(overrides))
    return json.loads((target.parent / "eval.json").read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.mark.drawn
def test_a_run_learns_and_its_folder_is_used_by_every_verb(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_kto(
        tmp_path, base, objective={"beta": 1.0}, training={"epochs": 5, "eval_steps": 20, "learning_rate": 0.01}
    )
    run = train(recipe)
    steps = [record for record in records(run) if "loss" in record]
    assert (steps[0]["loss"], steps[0]["kl"]) == (0.5, 0.0), "the policy is its own reference"
    assert steps[-1]["loss"] < 0.45
    assert steps[-1]["rewards_margins"] > 0.1
    after = measured(run)
    assert after["rows"] == 6
    assert set(LOGGED) < set(after)
    alone = measured(run, "evaluation.batch_size=1")
    assert alone == pytest.approx(after, rel=1e-5), "the KL is of all rows, whatever their batches"
    loaded = load_target(find_target(str(run), None, ["evaluation.max_new_tokens=3"]), CPU)
    assert len(answer(loaded, ["say 3"])) == 1
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), str(base), None, [])
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    capsys.readouterr()
    preview_verb(load_recipe(recipe), 1, None)
    assert "completion, label: " in capsys.readouterr().out


@pytest.mark.drawn
def test_each_source_s_rewards_are_means_over_its_own_good_and_bad_rows(base: Path, tmp_path: Path) -> None:
    """As of the source alone, whatever share of its rows is good; the KL is that of all rows."""
    rows = unpaired(30)
    shares = {"mixed": rows[:5], "bad": [row for row in rows[5:14] if not row["label"]], "good": rows[15:17]}
    files = {name: tmp_path / f"{name}.jsonl" for name in shares}
    for name, some in shares.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    evaluated = {"eval": [str(file) for file in files.values()]}
    run = train(write_kto(tmp_path / "made", base, rows[17:], data=evaluated, training={"learning_rate": 0.01}))
    together = measured(run)
    assert together["rewards_chosen"] - together["rewards_rejected"] == pytest.approx(together["rewards_margins"])
    sources: Any = together["sources"]
    counts = {name.removesuffix(".jsonl"): len(values) for name, values in sources.items()}
    assert counts == {"mixed": 8, "bad": 5, "good": 5}, "a mean over no rows is left out"
    for name, file in files.items():
        alone, values = measured(run, f"data.eval=[{file}]"), sources[file.name]
        found, expected = ({key: each[key] for key in LOGGED[:5] if each.get(key)} for each in (values, alone))
        assert found == pytest.approx(expected, rel=1e-5), name
        assert values["kl"] == pytest.approx(together["kl"], rel=1e-6)


@pytest.mark.drawn
def test_micro_batches_layouts_engines_and_interruptions_are_one_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = check_it_is_one_run(write_kto, base, tmp_path, monkeypatch)
    assert max(record.get("kl", 0) for record in records(run)) > 1e-3


BAD = [
    ({"prompt": "p", "completion": "a", "label": "yes"}, "'label' must be true or false, not 'yes'"),
    ({"prompt": "p", "completion": "a"}, "no field 'label'"),
    ({"prompt": "p", "label": True}, "no field 'completion'"),
    ({"prompt": "p", "completion": "", "label": True}, "the row has an empty answer; correct the row, or write obj"),
    ({"completion": "a", "label": False}, "the row has no prompt"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_is_named(base: Path, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    recipe = write_kto(tmp_path, base, [*unpaired(4), row])
    with pytest.raises(TunekitError, match=rf"train\.jsonl:5: {said}"):
        make_plan(load_recipe(recipe), device=CPU)


def test_unusable_rows_are_counted_and_one_sided_data_said(base: Path, tmp_path: Path) -> None:
    rows = [row for row in unpaired(9) if row["label"]]
    recipe = write_kto(tmp_path, base, [*rows, BAD[-1][0]], objective={"unusable_rows": "drop"}, data={"eval": None})
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    assert plan.rows.training.dropped_reasons == {"no prompt": 1}
    assert any(note.startswith("6 good and 0 bad answers") for note in plan.notes)


def test_other_tools_spellings_are_read(base: Path, tmp_path: Path) -> None:
    recipe = write_kto(tmp_path, base)
    values = json.loads(recipe.read_text("utf-8"))
    del values["objective"]
    theirs = {"stage": "kto", "pref_beta": 0.2, "kto_chosen_weight": 2.0, "kto_undesirable_weight": 0.5}
    recipe.write_text(json.dumps({**values, **theirs}), encoding="utf-8")
    expected = KtoSettings(beta=0.2, desirable_weight=2.0, undesirable_weight=0.5)
    assert load_recipe(recipe).recipe.objective == expected


def test_a_new_run_whose_steps_have_one_row_has_no_kl(base: Path, tmp_path: Path) -> None:
    """Runs of older versions can be read and resumed."""
    one = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
    loaded = load_recipe(write_kto(tmp_path, base, training=one))
    (refusal,) = make_plan(loaded, device=CPU)[0].refusals
    assert refusal.key == "training.micro_batch_size"
    assert refusal.message.startswith("a step has one row, but kto estimates its KL from the answers of other rows")
    previous = make_plan(load_recipe(loaded.path, ["training.gradient_accumulation_steps=2"]), device=CPU)[0]
    assert not previous.refusals
    assert not make_plan(loaded, device=CPU, previous=previous.choice)[0].refusals
    without_kl = load_recipe(loaded.path, ["objective.loss_type=apo_zero_unpaired"])
    assert not make_plan(without_kl, device=CPU)[0].refusals
