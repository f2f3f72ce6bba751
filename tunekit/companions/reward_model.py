"""Reward models that a recipe's objective asks: their folders go in; what scores completions, by folder, comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.rendering.render import Renderer
from tunekit.errors import RecipeError
from tunekit.evaluation.scores import undisturbed
from tunekit.formats.example import Message
from tunekit.formats.preference import AskedExample
from tunekit.model.load import make_meta_model
from tunekit.model.quantized.weights import stored_bytes
from tunekit.model.text.generation import check_prompts
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.reward import Reward
from tunekit.objectives.rewards import Written
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.targets.target import LoadedTarget, Target, find_target, load_target

BATCH_SIZE = 16  # completions that are scored side by side
Scorer = Callable[[Sequence[Written]], list[float]]


def load_scorers(settings: ObjectiveSettings, device: torch.device) -> dict[str, Scorer]:
    """Every reward model of the objective, loaded. Raises: RecipeError for a folder that holds none."""
    return {folder: _scorer(load_target(found, device), key) for key, folder, found in _named(settings)}


def scorer_bytes(settings: ObjectiveSettings, device: torch.device) -> int:
    """What their weights take, before they are loaded."""
    return sum(stored_bytes(make_meta_model(found.model, device=device).net) for _, _, found in _named(settings))


def _named(settings: ObjectiveSettings) -> Iterator[tuple[str, str, Target]]:
    """Key, folder and target of each."""
    for number, source in enumerate(getattr(settings, "reward", ())):
        if source.model is not None:
            yield f"objective.reward.{number}.model", source.model, find_target(source.model, None, [])


def _scorer(loaded: LoadedTarget, key: str) -> Scorer:
    objective, model, tokenizer = loaded.objective, loaded.model, loaded.tokenizer
    if not isinstance(objective, Reward):
        what = f"it was made for {objective.name} and gives no scores"
        raise RecipeError(what, "name a run of objective: reward, or its adapter", key=key)
    text = model.base.text
    assert text is not None  # a reward model reads text
    options = EncodeOptions("assistant", loaded.target.chat_template, 0, "drop")
    renderer = objective.row_encoder(options).renderer

    @torch.no_grad()
    def score(written: Sequence[Written]) -> list[float]:
        sequences = [_ids(each, renderer, tokenizer.eos_id) for each in written]
        check_vocabulary(tokenizer, text.vocabulary_size, max(map(max, sequences)))
        check_prompts(sequences, model.base.family.learned_positions(model.base.net), model.virtual_tokens)
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
        with undisturbed(model):
            found = objective.score(model, [sequences[at] for at in order], BATCH_SIZE)
        by_place = dict(zip(order, found, strict=True))
        return [by_place[at] for at in range(len(sequences))]

    return score


def _ids(written: Written, renderer: Renderer, eos_id: int | None) -> list[int]:
    """Of the prompt with the completion; of an empty one the prompt and the end."""
    prompt: Any = written.prompt
    if not isinstance(prompt, str):
        prompt = tuple(
            Message(
                each["role"], each["content"], extra={k: v for k, v in each.items() if k not in ("role", "content")}
            )
            for each in prompt
        )
    example = AskedExample(prompt)
    if written.text.strip():
        return renderer.sequence(example.answered(written.text))[0]
    found = renderer.prompt(example.answered("an answer"))
    assert found is not None
    return [*found[0], *([] if eos_id is None else [eos_id])]
