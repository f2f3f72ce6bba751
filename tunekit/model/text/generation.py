"""Text generation for lists of prompts. It is greedy unless sampling is set, and does not change the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tunekit.contracts import GREEDY, Sampling, Tokenizer
from tunekit.errors import DataError, InputError, ModelError
from tunekit.model.call import seed_for
from tunekit.model.load import LoadedModel
from tunekit.model.text.continuation import Adapt, Continuation
from tunekit.model.text.decoder import Decoder, decoding
from tunekit.model.text.draws import MIN_TEMPERATURE

PROBE_QUESTION, PROBE_ANSWER = "question", "plain answer"
PREFILL_TOKENS = 2048  # prompt tokens that one forward computes


def generate_texts(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    template: str | None = None,
    adapt: Adapt | None = None,
    virtual_tokens: int = 0,
    seeds: Sequence[int] | None = None,
    keep_stop: bool = False,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """Generate new token ids for each prompt. The stop token that ended an answer is left out unless `keep_stop`.

    Up to `batch_size` prompts are continued at once; when one answer ends, the next prompt starts. The base's own
    generation defaults (penalties, top-k) are not used.
    `stop_ids`: by default the ids of find_stop_ids. `template`: a chat template that replaces the tokenizer's.
    `adapt`: changes the inputs of the first step, for an adapter that adds `virtual_tokens` positions.
    `seeds`: one per prompt; by default made from the seed of `sampling` and the prompt's number. The sampled answer
    depends only on the prompt and its seed. `ends`: returns whether the new ids so far are a complete answer.
    Raises: DataError for a prompt that is empty or fills all positions of the model; ModelError for a base that does
    not generate text.
    """
    if not prompts_ids:
        return []
    room = answer_room(model, virtual_tokens)
    check_prompts(prompts_ids, room(()), 0 if model.family.reads_source else 1)
    stops = frozenset(find_stop_ids(model, tokenizer, template) if stop_ids is None else stop_ids)
    seeds = seeds or [seed_for("generate", sampling.seed, number) for number in range(len(prompts_ids))]
    continuations = [
        Continuation(
            prompt,
            max_new_tokens if (limit := room(prompt)) is None else min(max_new_tokens, limit),
            replace(sampling, seed=seed),
            stops,
            adapt=adapt,
            virtual_tokens=virtual_tokens,
        )
        for prompt, seed in zip(prompts_ids, seeds, strict=True)
    ]
    results: list[list[int]] = [[] for _ in prompts_ids]
    with decoding(model.net):
        slots, tokens = min(batch_size, len(continuations)), max(wanted.columns for wanted in continuations)
        decoder = Decoder(model, tokenizer.pad_id, slots=slots, tokens=tokens, piece_tokens=PREFILL_TOKENS)
        order = sorted(range(len(continuations)), key=lambda index: (len(prompts_ids[index]), index))
        places = {decoder.add(continuations[index]): index for index in order}
        while decoder.is_busy:
            for token in decoder.step():
                answer = results[places[token.handle]]
                if keep_stop or token.reason != "stop":
                    answer.append(token.id)
                if ends is not None and token.reason is None and ends(answer):
                    decoder.cancel(token.handle)
    return results


def answer_room(model: LoadedModel, virtual_tokens: int = 0) -> Callable[[Sequence[int]], int | None]:
    """Make a function that returns, for a prompt, the number of positions that remain for new tokens; None: no limit.

    In an encoder-decoder, the prompt takes no positions from the answer.
    Raises: ModelError for a base that does not generate text.
    """
    if not model.family.answers:
        raise ModelError(
            f"{model.facts.name_or_path} is {model.family.text}, which does not generate text", "read its logits"
        )
    table, separate = model.family.learned_positions(model.net), model.family.reads_source
    return lambda prompt: None if table is None else table - virtual_tokens - len(prompt) * (not separate)


def check_prompts(prompts_ids: Sequence[Sequence[int]], positions: int | None, others: int) -> None:
    """Check that each prompt, with `others` additional tokens, fits into `positions` (None: no limit).

    Raises: DataError for a prompt that is empty or too long.
    """
    for number, prompt in enumerate(prompts_ids, start=1):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty", "write at least one character")
        if positions is not None and len(prompt) + others > positions:
            what = f"prompt {number} has {len(prompt)} tokens, too many for the model's {positions} positions"
            raise DataError(what, "shorten the prompt")


def find_stop_ids(model: LoadedModel, tokenizer: Tokenizer, template: str | None = None) -> list[int]:
    """Ids that end an answer: the tokenizer's end token, the model's end tokens, and the token with which the chat
    template ends a turn."""
    stops = {tokenizer.eos_id, *model_end_ids(model), *end_of_turn_ids(tokenizer, template)}
    return sorted(int(stop) for stop in stops if stop is not None)


def model_end_ids(model: LoadedModel) -> list[int]:
    """The end tokens in the model's generation settings, at which transformers itself ends an answer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = ids if isinstance(ids, list | tuple) else [ids]
    return [int(token) for token in ids if token is not None]


def end_of_turn_ids(tokenizer: Tokenizer, template: str | None = None) -> list[int]:
    """The id of the special token that the chat template writes after the last answer. If it writes none there: the
    special token after an earlier answer. A list of zero or one id."""
    if template is None and tokenizer.chat_template is None:
        return []
    question = {"role": "user", "content": PROBE_QUESTION}
    turns = [question, {"role": "assistant", "content": PROBE_ANSWER}]
    special = tokenizer.special_ids
    for messages in (turns, [*turns, question]):
        try:
            _, answer, after = tokenizer.render(messages, template=template).rpartition(PROBE_ANSWER)
        except DataError:  # a template that refuses plain turns does not reveal their end
            return []
        ids = tokenizer.encode(after) if answer else []
        first = next((token for token in ids if tokenizer.decode([token]).strip() or token in special), None)
        if first in special:
            return [first]
    return []


def sampling_settings(sampling: Sampling) -> dict[str, Any]:
    """The sampling settings as arguments of transformers' generate. Raises: InputError for settings that it lacks."""
    lacks = [name for name in ("presence_penalty", "frequency_penalty", "logit_bias") if getattr(sampling, name)]
    if lacks:
        raise InputError(f"{lacks[0]} has no effect on this model", "use repetition_penalty")
    penalty = {"repetition_penalty": sampling.repetition_penalty} if sampling.repetition_penalty != 1 else {}
    if sampling.temperature < MIN_TEMPERATURE:
        return {"do_sample": False, **penalty}
    settings = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    return {"do_sample": True, **settings, **({"min_p": sampling.min_p} if sampling.min_p else {}), **penalty}
