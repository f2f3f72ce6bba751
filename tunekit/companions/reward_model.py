"""Loads a recipe's reward model as a function that scores completions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunekit.adapters.folder.config import CONFIG_NAME, FACTS_NAME
from tunekit.contracts import EncodeOptions
from tunekit.data.rendering.render import Renderer
from tunekit.errors import RecipeError
from tunekit.evaluation.scores import undisturbed
from tunekit.files.untrusted import MODEL_FILE, sha256_of
from tunekit.formats.example import Message
from tunekit.formats.preference import PromptedExample
from tunekit.model.load import base_fingerprint, make_meta_model
from tunekit.model.quantized.weights import stored_bytes
from tunekit.model.text.generation import check_prompts
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.rows.prompts import Completion
from tunekit.objectives.rows.text import TextRows
from tunekit.recipe.bases.sample_settings import RewardSource
from tunekit.targets.target import TargetSpec, find_target, load_target, processor_of

BATCH_SIZE = 16  # completions per forward
Scorer = Callable[[Sequence[Completion]], list[float]]


def find_reward_model(source: RewardSource) -> TargetSpec:
    """Find the reward model in a folder, by the same rules as for a model on the command line."""
    return find_target(str(source.model), None, [], allow_code=source.allow_code)


def weight_bytes(source: RewardSource, device: torch.device) -> int:
    """The size of the reward model's weights in bytes, computed before they are loaded."""
    return stored_bytes(make_meta_model(find_reward_model(source).model, device=device).net)


def reward_model_content(source: RewardSource) -> bytes:
    """All content that affects the model's scores: weights, adapter, configuration, tokenizer and template."""
    target = find_reward_model(source)
    place = target.adapter or Path(target.model.name_or_path)
    names = [CONFIG_NAME] if target.holder else [CONFIG_NAME, FACTS_NAME]  # the facts name the temporary folder
    files = [*sorted(place.glob("*.safetensors")), *(place / name for name in names if (place / name).is_file())]
    section = target.model.model_dump_json(exclude={"name_or_path", "revision"})
    texts = [section, base_fingerprint(target.model), processor_of(target).fingerprint, target.chat_template or ""]
    return "\0".join([*(sha256_of(file, MODEL_FILE) for file in files), *texts]).encode("utf-8", "surrogatepass")


def load_scorer(source: RewardSource, key: str, device: torch.device) -> Scorer:
    """Load a recipe's reward model, and return a function that scores completions. Raises: RecipeError if the folder
    contains no reward model."""
    loaded = load_target(find_reward_model(source), device)
    objective, model, tokenizer = loaded.objective, loaded.model, loaded.tokenizer
    scores = None if objective.answering is None else objective.answering.score
    if scores is None:
        what = f"the model was trained with the objective {objective.name}, so it has no scores"
        raise RecipeError(what, "name the run folder of a reward model (objective: reward), or its adapter", key=key)
    text = model.base.text
    assert text is not None  # a reward model reads text
    assert isinstance(objective.rows, TextRows)
    renderer = objective.rows.with_options(EncodeOptions(template=loaded.target.chat_template)).renderer

    @torch.no_grad()
    def score(completions: Sequence[Completion]) -> list[float]:
        sequences = [_ids(completion, renderer, tokenizer.eos_id) for completion in completions]
        check_vocabulary(tokenizer, text.vocabulary_size, max(map(max, sequences)))
        check_prompts(sequences, model.base.family.learned_positions(model.base.net), model.virtual_tokens)
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
        with undisturbed(model):
            ordered = scores(model, [sequences[at] for at in order], BATCH_SIZE)
        by_place = dict(zip(order, ordered, strict=True))
        return [by_place[at] for at in range(len(sequences))]

    return score


def _ids(completion: Completion, renderer: Renderer, eos_id: int | None) -> list[int]:
    """The ids of prompt and completion. An empty completion is replaced by the end token."""
    prompt = completion.prompt
    example = PromptedExample(prompt if isinstance(prompt, str) else tuple(map(_message, prompt)))
    if completion.text.strip():
        return renderer.sequence(example.answered(completion.text))[0]
    rendered = renderer.prompt(example.answered("an answer"))
    assert rendered is not None
    return [*rendered[0], *([] if eos_id is None else [eos_id])]


def _message(turn: Mapping[str, Any]) -> Message:
    extra = {name: value for name, value in turn.items() if name not in ("role", "content")}
    return Message(turn["role"], turn["content"], extra=extra)
