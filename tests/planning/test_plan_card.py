"""`tunekit plan --card`: a plan for a card that is not in this machine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.support.train_case import write_recipe
from tunekit.errors import RecipeError, TunekitError
from tunekit.machine.cards import CARDS, card_named, planned_card, planning_for
from tunekit.machine.devices import capability, computes_bfloat16, is_here
from tunekit.machine.memory import available_bytes, total_bytes
from tunekit.plan import plan_verb
from tunekit.planning.card_speed import KERNELS, LAUNCH_SECONDS, REACHED, speed_note
from tunekit.planning.ranks import plan_ranks
from tunekit.recipe.load import load_recipe
from tunekit.records import Plan

CUDA = torch.device("cuda")


def plan_for(recipe: Path, card: str, *overrides: str) -> Plan:
    with planning_for(card_named(card)):
        return plan_ranks(load_recipe(recipe, overrides), [CUDA])[0]


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_less_memory_than_its_name_says_and_more_than_nine_tenths(name: str) -> None:
    assert 0.9 * float(name.rpartition("-")[2]) < CARDS[name].gib < float(name.rpartition("-")[2])


def test_the_device_has_the_properties_of_the_card_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # also where a GPU is in the machine
    with planning_for(card_named("t4-16")):
        assert (is_here(CUDA), capability(CUDA), computes_bfloat16(CUDA)) == (False, (7, 5), False)
        assert total_bytes(CUDA) == 14.5 * 2**30
        assert available_bytes(CUDA) == 14 * 2**30
        with planning_for(card_named("h100-80")):
            assert (capability(CUDA), computes_bfloat16(CUDA)) == ((9, 0), True)
        assert capability(CUDA) == (7, 5)
    assert planned_card() is None
    assert is_here(CUDA)


def test_kernels_and_numbers_are_those_of_the_card(recipe: Path) -> None:
    old, new = (plan_for(recipe, card, "model.dtype=auto") for card in ("t4-16", "a100-40"))
    assert (old.model.dtype, new.model.dtype) == ("float16", "bfloat16")
    in_halves = plan_for(recipe, "a100-40", "model.dtype=float16")
    assert old.peak_bytes.activations > in_halves.peak_bytes.activations, "without flash attention, scores are kept"
    [refusal] = plan_for(recipe, "t4-16", "model.dtype=auto", "model.quantization=fp8").refusals
    assert refusal.key == "model.quantization"
    assert not plan_for(recipe, "h100-80", "model.dtype=auto", "model.quantization=fp8").refusals


def test_what_does_not_fit_on_the_card_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, "t4-16", replace(CARDS["t4-16"], gib=0.5))  # as much as the context takes
    with pytest.raises(TunekitError, match=r"training\.micro_batch_size.*are free"):
        plan_verb(load_recipe(recipe, ["memory.streaming=off"]), None, card="t4-16")


def test_the_speed_is_that_of_the_slowest_part(recipe: Path) -> None:
    plan, card = plan_for(recipe, "h100-80"), CARDS["h100-80"]
    tokens = plan.rows.training.tokens / (plan.rows.micro_batches_per_epoch or 0)
    small = speed_note(plan, "h100-80", card) or ""
    assert f"about {tokens / (plan.model.layers * KERNELS * LAUNCH_SECONDS):,.0f} tokens a second" in small
    assert "starting kernels takes the most time" in small
    large = replace(plan, total_parameters=8 * 10**9)
    of_products = REACHED * 989.4e12 / (4 * 8e9)
    assert f"about {of_products:,.0f} tokens a second" in (speed_note(large, "h100-80", card) or "")
    recomputed = replace(large, choice=replace(plan.choice, checkpointed_layers=plan.model.layers))
    assert f"about {of_products / 1.5:,.0f} tokens a second" in (speed_note(recomputed, "h100-80", card) or "")
    read = replace(plan, peak_bytes=replace(plan.peak_bytes, weights=16 * 10**9))
    assert f"about {tokens / (2 * 16 / 3350):,.0f} tokens a second" in (speed_note(read, "h100-80", card) or "")
    streamed = replace(plan, choice=replace(plan.choice, streaming="host"))
    assert speed_note(streamed, "h100-80", card) is None


def test_a_plan_for_a_card_prints_its_memory_and_an_estimate(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_verb(load_recipe(recipe, []), None, card="rtx4090-24")
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 23.0 GiB free" in printed
    assert "rtx4090-24: about" in printed
    assert planned_card() is None


def test_a_wrong_card_is_refused_in_one_line(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="not in the table of cards; choose t4-16, v100-32"):
        plan_verb(load_recipe(recipe, []), None, card="h100")
    with pytest.raises(RecipeError, match="name two devices; leave one of them out"):
        plan_verb(load_recipe(recipe, []), None, device="cuda", card="h100-80")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, write_tiny_llama(tmp_path / "base"), rows=8)
