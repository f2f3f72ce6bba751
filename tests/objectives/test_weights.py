"""Rows and turns that count more or less than 1: loss, gradient and evaluation, against cross entropy in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.objectives.test_logprobs import CappedHead, numbers
from tests.support.data_case import encoder_of, tokenizer_of
from tunekit.contracts import IGNORED, ModelOutput, Objective
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import NO_WEIGHT
from tunekit.formats.example import ChatExample, CompletionExample, Message
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.train import train_verb

ROWS = (CompletionExample("abc", "defg", 2.5), CompletionExample("z", "ih"), CompletionExample("12", "54321", 0.1))
WEIGHTS = [example.weight for example in ROWS]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> LoadedTokenizer:
    return LoadedTokenizer(tokenizer_of(tiny_llama).native, None, answer_start_id=0)


class WideHead(CappedHead):
    """Of the tokenizer's vocabulary."""

    def __init__(self, dtype: torch.dtype, trained: bool, vocabulary: int) -> None:
        super().__init__(dtype, trained)
        weight = numbers(4, vocabulary, self.weight.shape[1]).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=trained)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("settings", [SftSettings(), Seq2seqSettings()], ids=["sft", "seq2seq"])
def test_loss_gradient_and_sums_are_weighted(
    settings: ObjectiveSettings, trained: bool, tokenizer: LoadedTokenizer
) -> None:
    objective: Objective = make_objective(settings, tokenizer)
    encoder = encoder_of(tokenizer, settings=settings)
    rows = [encoder.encode(example, f"d:{line}") for line, example in enumerate(ROWS)]
    batch = objective.rows.collate([[row] for row in rows])
    labels = batch.targets["labels"]  # (B, T)
    if settings.method == "sft":
        labels = torch.cat([labels[:, 1:], torch.full((len(rows), 1), IGNORED)], dim=1)
    exact = WideHead(torch.float64, trained, tokenizer.vocabulary_size)
    hidden = numbers(2, *labels.shape, 6).requires_grad_()
    each = nn.functional.cross_entropy(
        exact.logits(hidden.flatten(0, 1)), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    of_row = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None]
    expected, units = (each * of_row).sum(), ((labels != IGNORED) * of_row).sum()
    head, ours = WideHead(torch.float32, trained, tokenizer.vocabulary_size), hidden.detach().float().requires_grad_()
    output = ModelOutput(ours, head, [head.weight] if trained else [], 4)
    found = objective.loss.loss(output, batch).total
    torch.testing.assert_close(found.double()[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(objective.loss.units(batch)[0], units, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(found, [ours, head.weight][: 1 + trained])
    for one, other in zip(gradients, torch.autograd.grad(expected, [hidden, exact.weight][: 1 + trained]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        sums = objective.loss.sums(output, batch)
        right = (exact.logits(hidden.flatten(0, 1)).argmax(-1).view(labels.shape) == labels) * of_row
    for name, value in {"loss": expected, "units": units, "correct": right.sum()}.items():
        torch.testing.assert_close(sums[name].double(), value, rtol=1e-5, atol=1e-6)


def test_a_turn_counts_as_it_says_and_a_cut_row_keeps_it(tokenizer: LoadedTokenizer) -> None:
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    turns = (
        Message("user", "q"),
        Message("assistant", "ab", 0.5),
        Message("user", "r"),
        Message("assistant", "cd", 2.0),
    )
    encoder = encoder_of(tokenizer, template=template)
    row = encoder.encode(ChatExample(turns, weight=3.0), "d:1")
    weights = row.parts["weights"]
    assert tokenizer.decode(row.parts["ids"][weights == 1.5].tolist()).startswith("ab")
    assert tokenizer.decode(row.parts["ids"][weights == 6.0].tolist()).startswith("cd")
    assert set(weights.tolist()) == {0.0, 1.5, 6.0}
    objective = make_objective(SftSettings(), tokenizer)
    assert objective.rows.cut(row, 2, 5).parts["weights"].tolist() == weights[2:5].tolist()
    plain = encoder.encode(ChatExample((turns[0], Message("assistant", "ab"))), "d:2")
    assert not len(plain.parts["weights"]), "where all count the same, nothing is stored"
    assert objective.rows.spans(row)[0].title == "weight of the loss: 1.5 of 3 tokens, 6 of 4 tokens"
    assert objective.rows.spans(plain)[0].title == ""
    together = objective.rows.collate([[plain, row]])
    assert together.targets["weights"].tolist() == [[1.0] * plain.size + weights.tolist()]


@pytest.mark.parametrize("settings", [SftSettings(), Seq2seqSettings()], ids=["sft", "seq2seq"])
def test_a_row_that_does_not_count_is_dropped_by_name(settings: ObjectiveSettings, tokenizer: LoadedTokenizer) -> None:
    with pytest.raises(Dropped, match=NO_WEIGHT):
        encoder_of(tokenizer, settings=settings).encode(CompletionExample("a", "b", 0.0), "d:1")


def test_a_run_learns_from_relative_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """Weights that are all 4 change nothing; other ones do."""

    def losses(name: str, weights: list[float | None]) -> list[float]:
        texts = [f"row number {number} of six" for number in range(6)]
        rows: list[dict[str, Any]] = [
            {"text": text, "sample_weight": w} for text, w in zip(texts, weights, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "model": {"name_or_path": str(tiny_llama)},
            "data": {"train": f"{name}.jsonl", "shuffle": False},
            "training": {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
            "output": {"dir": name},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        train_verb(load_recipe(tmp_path / f"{name}.yaml"), False, False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    plain, fours = losses("plain", [None] * 6), losses("fours", [4.0] * 6)
    assert len(plain) == 3
    assert fours == pytest.approx(plain, rel=1e-5)
    uneven = losses("uneven", [4.0, 1.0, 1.0, 1.0, 2.0, 0.5])
    assert abs(uneven[0] - plain[0]) > 1e-4
