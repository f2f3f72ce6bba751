"""Prompts with their reference answers go in; answers and the text metrics over them come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from tunekit.contracts import Objective, Told
from tunekit.data.rows import Prompt
from tunekit.evaluation.scores import undisturbed
from tunekit.machine.devices import Devices
from tunekit.tuned.model import TunedModel


def answer_questions(
    model: TunedModel,
    objective: Objective,
    questions: Sequence[Prompt],
    devices: Devices,
    *,
    max_new_tokens: int,
    batch_size: int,
    template: str | None = None,
    told: Told = lambda what, done, total: None,
) -> list[str]:
    """The model's answer to each question, in order; questions are shared among the ranks, and of each rank those of
    similar length share a batch."""
    mine = sorted(range(devices.rank, len(questions), devices.world), key=lambda at: _size(questions[at].asked))
    texts: list[str] = []
    with undisturbed(model):
        for start in range(0, len(mine), batch_size):
            told("answers written", devices.world * start, len(questions))
            prompts = [questions[index].asked for index in mine[start : start + batch_size]]
            texts += objective.answer(
                model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, template=template
            )
    gathered = dict(devices.gather(list(zip(mine, texts, strict=True))))
    return [gathered[index] for index in range(len(questions))]


def _size(asked: Any) -> int:
    """Of ids; recordings and images are all of one size, or of one that is not known yet."""
    return len(asked) if isinstance(asked, Sequence) else 0


def text_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    normalized: Callable[[str], str] = str,
) -> dict[str, float]:
    """Each named metric of metrics/ over all pairs, of normalised texts where it asks for them; as NAME_left_out, how
    many pairs it leaves out, where it does."""
    found = dict[str, float]()
    for name in names:
        metric = import_module(f"tunekit.metrics.{name}")
        pairs = [predictions, references]
        if getattr(metric, "NORMALIZED", False):
            pairs = [[normalized(text) for text in texts] for texts in pairs]
        found[name] = metric.score(*pairs)
        empty = sum(not text.strip() for text in pairs[1]) if getattr(metric, "LEAVES_OUT", False) else 0
        found |= {f"{name}_left_out": float(empty)} if empty else {}
    return found
