"""CPO, SimPO and ORPO: losses, gradients and what is logged against trl's own code; whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.test_dpo import base as base
from tests.objectives.test_dpo import write_recipe
from tests.support.pair_case import Told, trainer_of
from tests.support.train_case import losses, tensors_of, train
from tunekit.contracts import EncodeOptions
from tunekit.evaluate import evaluate_verb
from tunekit.formats.preference import make_example
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.bases.pair_settings import REWARDS
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.simpo import SimpoSettings
from tunekit.recipe.reading.names import settings_class

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cpo": ("cpo", {}),
    "cpo smoothed": ("cpo", {"label_smoothing": 0.2, "cpo_alpha": 0.5, "beta": 0.3}),
    "cpo hinge": ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    "cpo ipo": ("cpo", {"loss_type": "ipo", "beta": 0.4}),
    "simpo": ("simpo", {"beta": 2.0, "simpo_gamma": 0.6}),
    "simpo with likelihood": ("simpo", {"beta": 2.5, "cpo_alpha": 0.7, "label_smoothing": 0.1}),
    "orpo": ("orpo", {"beta": 0.3}),
}


def trl_loss(told: Told, name: str, settings: Any) -> tuple[Tensor, dict[str, float]]:
    """What trl's trainers make of the same log-probabilities in one batch."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    mask, real, pairs = told.trained()[:, 1:], told.real()[:, 1:], len(told.rows)
    scores = (told.policy * mask).sum(1)
    averaged = name in ("simpo", "orpo") or settings.loss_type == "ipo"
    scores = scores / mask.sum(1) if averaged else scores
    learnt = (real if name == "orpo" else mask)[:pairs]
    likelihood = -(told.policy[:pairs] * learnt).sum() / learnt.sum()
    if name == "orpo":
        trainer = trainer_of(beta=settings.beta)
        ratios, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, scores[:pairs], scores[pairs:])
        total = likelihood - ratios.mean()
    else:
        trainer = trainer_of(
            beta=settings.beta,
            alpha=0.0,
            loss_type=getattr(settings, "loss_type", "simpo"),
            simpo_gamma=getattr(settings, "simpo_gamma", None),
            label_smoothing=settings.label_smoothing,
        )
        values, chosen, rejected = CPOTrainer.cpo_loss(trainer, scores[:pairs], scores[pairs:])
        total = values.mean() + settings.cpo_alpha * likelihood
    logged = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), scores[:pairs], scores[pairs:])
    return total, {key: value.mean().item() for key, value in zip(REWARDS, logged, strict=True)}


@pytest.mark.parametrize("sizes", [[5], [2, 1, 2]], ids=["one batch", "three micro-batches"])
@pytest.mark.parametrize("case", CASES)
def test_every_loss_its_gradient_and_what_is_logged_are_trls(case: str, sizes: list[int]) -> None:
    name, values = CASES[case]
    settings: Any = settings_class("objectives", name)(**values)
    told = Told.drawn(1)
    expected, theirs = trl_loss(told, name, settings)
    (gradient,) = torch.autograd.grad(expected, told.policy)
    loss, logged, _ = told.ours(settings, sizes)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (ours,) = torch.autograd.grad(loss, told.policy)
    torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-6)
    assert logged == pytest.approx(theirs, rel=1e-5)


def test_certain_answers_have_finite_odds() -> None:
    from tunekit.objectives.losses.preferences import log_odds

    logp = torch.tensor([0.0, -1e-9, -1e-3, -0.7, -80.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(logp).sum(), logp)
    assert torch.isfinite(gradient).all()
    exact = logp.detach().double()[2:]
    torch.testing.assert_close(
        log_odds(logp.detach())[2:].double(), exact - torch.log1p(-exact.exp()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_a_run_learns_whatever_its_micro_batches_and_engine(base: Path, tmp_path: Path, name: str) -> None:
    values = {"cpo": {}, "simpo": {"beta": 2.0, "cpo_alpha": 0.5}, "orpo": {}}[name]
    section = {"method": name, **values}
    plain = train(write_recipe(tmp_path / "plain", base, objective=section, training={"epochs": 4}))
    assert losses(plain)[-1] < losses(plain)[0]
    changed = {"micro_batch_size": 1, "gradient_accumulation_steps": 6, "epochs": 4}
    split = write_recipe(tmp_path / "split", base, objective=section, training=changed, memory={"streaming": "disk"})
    assert losses(train(split)) == pytest.approx(losses(plain), rel=1e-5)
    evaluate_verb(str(plain), None, None, None, [], str(tmp_path / "after.json"), [])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert set(REWARDS) < set(after)


@pytest.mark.drawn
def test_a_method_without_a_reference_takes_any_adapter(base: Path, tmp_path: Path) -> None:
    """Virtual tokens stand before each sequence, which is a padded line then; and starts that move weights."""
    prompt = {"method": "prompt", "num_virtual_tokens": 4}
    for place, adapter in (("prompt", prompt), ("pissa", {"method": "lora", "r": 4, "start": "pissa"})):
        recipe = write_recipe(tmp_path / place, base, objective={"method": "simpo", "beta": 2.0})
        recipe.write_text(json.dumps({**json.loads(recipe.read_text("utf-8")), "adapter": adapter}), encoding="utf-8")
        run = train(recipe)
        assert losses(run)[-1] < losses(run)[0]
        assert tensors_of(run)


def test_a_row_is_counted_once_whatever_both_its_answers_have(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    open_ended = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    rows = make_objective(SimpoSettings(), tokenizer, options=EncodeOptions(template=open_ended, max_length=64)).rows
    prompt = [{"role": "user", "content": "ask"}]
    for number in range(2):
        sides = {side: [{"role": "assistant", "content": f"{side} {number}"}] for side in ("chosen", "rejected")}
        rows.encode(make_example({"prompt": prompt, **sides}), "file:1")
    assert list(rows.notices.values()) == [2]
