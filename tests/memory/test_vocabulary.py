"""An output projection that passes through the device a part of the vocabulary at a time computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import write_tiny_llama
from tests.support.train_case import records, write_recipe
from tunekit.contracts import ModelOutput
from tunekit.errors import TunekitError
from tunekit.memory import vocabulary
from tunekit.memory.vocabulary import stream_head
from tunekit.model.families.heads import TextHead
from tunekit.objectives.losses.logprobs import log_probabilities, loss_of_positions, scored_positions
from tunekit.recipe.load import load_recipe
from tunekit.train import train_verb

CPU = torch.device("cpu")


class Net(nn.Module):
    """A head of 70 tokens over 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(12, 70, bias=False)


@pytest.mark.parametrize("scale", [{}, {"scale": 0.3, "divisor": 2.0}, {"soft_cap": 3.0}])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_losses_and_gradients_are_those_of_the_whole(
    tier: str, scale: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, hidden = Net(), torch.randn(1, 23, 12) * 3
    text, targets, index = TextHead(net, "lm_head", **scale), torch.randint(0, 70, (19,)), torch.randperm(23)[:19]
    head: Any = text

    def found() -> tuple[Tensor, ...]:
        states = hidden.clone().requires_grad_()
        output = ModelOutput(states, head, (), 8)
        loss = loss_of_positions(output, index, targets).total
        logps = log_probabilities(output, index, targets)
        (loss.sum() * 0.7 + (logps * torch.arange(19.0)).sum()).backward()
        assert states.grad is not None
        scored = scored_positions(states.detach()[0, index], targets, head, 8)
        return loss.detach(), logps.detach(), states.grad, scored[0], scored[1].float(), head.logits(hidden[0])

    whole = found()
    monkeypatch.setattr(vocabulary, "PART_BYTES", 16 * 12 * 4)  # parts of 16 rows, the last of 6
    monkeypatch.setattr("tunekit.objectives.losses.logprobs.CHUNK_BYTES", 16 * 4 * 5)  # five positions at a time
    head = stream_head(text, CPU, tier)
    assert len(head.weights) == 5
    assert net.lm_head.weight.isnan().all(), "nothing of the matrix is left where it was"
    for one, other in zip(found(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_is_the_same_matrix_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    net.embed = nn.Embedding(70, 12)
    net.embed.weight = net.lm_head.weight
    monkeypatch.setattr(vocabulary, "PART_BYTES", 16 * 12 * 4)
    ids, hidden = torch.arange(70), torch.randn(3, 12)
    rows, logits = net.embed(ids).detach(), net.lm_head(hidden).detach()
    assert stream_head(TextHead(net, "lm_head"), CPU, "host").tables == (net.embed,)
    assert torch.equal(net.embed(ids), rows)
    with torch.no_grad():
        torch.testing.assert_close(net.lm_head(hidden), logits)
    with pytest.raises(RuntimeError, match="is computed part by part"):
        net.lm_head(hidden.requires_grad_())


def run(place: Path, folder: Path, **memory: Any) -> tuple[list[float], dict[str, Any]]:
    """The losses, training's and evaluation's, and plan.json."""
    place.mkdir()
    train_verb(
        load_recipe(write_recipe(place, folder, rows=11, memory=memory), [f"output.dir={place / 'run'}"]), False, False
    )
    found = [record["loss"] if "loss" in record else record["eval"]["loss"] for record in records(place / "run")]
    return found, json.loads((place / "run" / "plan.json").read_text())


@pytest.mark.drawn
def test_a_run_with_it_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_llama(tmp_path / "base", layers=2)
    monkeypatch.setattr(vocabulary, "PART_BYTES", 64 * 64 * 4)
    plain, before = run(tmp_path / "plain", folder, streaming="disk")
    streamed, plan = run(tmp_path / "streamed", folder, streaming="disk", streamed_head=True)
    assert streamed == pytest.approx(plain, rel=1e-5)
    assert plan["choice"]["streamed_head"]
    assert plan["peak_bytes"]["weights"] < before["peak_bytes"]["weights"]


def test_layers_may_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_llama(tmp_path / "base", layers=2)
    monkeypatch.setattr(vocabulary, "PART_BYTES", 64 * 64 * 4)
    plain, _ = run(tmp_path / "plain", folder, streaming="off")
    streamed, plan = run(tmp_path / "streamed", folder, streaming="off", streamed_head=True)
    assert plan["choice"]["streaming"] == "off"
    assert streamed == pytest.approx(plain, rel=1e-5)


def test_it_is_refused_where_the_base_is_trained(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "base", layers=2)
    (tmp_path / "run").mkdir()
    recipe = write_recipe(tmp_path / "run", folder, memory={"streamed_head": True})
    with pytest.raises(TunekitError, match="trains the base's own weights, and a streamed head is read-only"):
        train_verb(
            load_recipe(
                recipe, ["~adapter.r", "~adapter.dropout", "adapter.method=full", f"output.dir={tmp_path / 'full'}"]
            ),
            False,
            False,
        )
