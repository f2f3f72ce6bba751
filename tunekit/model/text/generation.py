"""Text generation in batches, greedy unless sampling is set, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tunekit.contracts import GREEDY, Sampling, Tensors, Tokenizer
from tunekit.errors import DataError, ModelError
from tunekit.machine.devices import forked_random, summing_dtype
from tunekit.model.call import calling, current_call, seed_for
from tunekit.model.families import text_config
from tunekit.model.families.structure import accepted_names, training_mode
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import as_pretrained, config_of
from tunekit.model.transformers_guard import quiet

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig

ModelInputs = Tensors
# indices of prompts, their new tokens -> which of them end here
StopCheck = Callable[[Sequence[int], list[int]], list[bool]]
PROBE_QUESTION, PROBE_ANSWER = "question", "plain answer"
PROBE_TOKENS = 8
PROBABILITY_UNITS = 2.0**52
MIN_TEMPERATURE = 1e-5  # dividing logits by less would overflow; a lower temperature counts as 0


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
    adapt: Callable[[ModelInputs], ModelInputs] | None = None,
    virtual_tokens: int = 0,
    ends: StopCheck | None = None,
    cache: Cache | None = None,
    seeds: Sequence[int] | None = None,
    keep_stop: bool = False,
) -> list[list[int]]:
    """New ids of each prompt, in order, without the stop token that ended it unless `keep_stop`.

    Prompts of similar length share a batch, padded with a mask: on the right if an encoder reads them, because its
    positions count from the start of the row, and on the left otherwise. A base whose rows influence each other
    answers one prompt at a time. The base's own generation defaults (penalties, top-k) are not used.
    `stop_ids`: by default the ids of find_stop_ids. `template`: a chat template that replaces the tokenizer's.
    `adapt`: changes the inputs of the first step, for an adapter that adds `virtual_tokens` positions.
    `ends`: called at every step of a batch.
    `cache`: keys and values of a prefix of the only prompt.
    `seeds`: one per prompt; a prompt's samples depend only on its seed, not on its batch.
    Raises: DataError for an empty prompt, or one as long as the model's table of positions; ModelError for a base that
    does not generate text.
    """
    if not model.family.answers:
        raise ModelError(
            f"{model.facts.name_or_path} is {model.family.text}, which does not generate text", "read its logits"
        )
    stops = sorted(set(find_stop_ids(model, tokenizer, template) if stop_ids is None else stop_ids))
    table = model.family.learned_positions(model.net)
    longest = None if table is None else table - virtual_tokens
    separate = model.family.reads_source  # then the answer has its own table of positions
    check_prompts(prompts_ids, longest, 0 if separate else 1)
    order = sorted(range(len(prompts_ids)), key=lambda index: (len(prompts_ids[index]), index))
    results: list[list[int]] = [[] for _ in prompts_ids]
    with unchanged_generation(model.net):
        batch_size = 1 if batch_size > 1 and _rows_interact(model, tokenizer.pad_id) else batch_size
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            widest = max(len(prompts_ids[index]) for index in rows)
            new_tokens = max_new_tokens if longest is None else min(max_new_tokens, longest - widest * (not separate))
            torch.manual_seed(seed_for("generate", sampling.seed, start))
            settings = _settings(model, tokenizer.pad_id, new_tokens, sampling if seeds is None else GREEDY, stops)
            draws = None if seeds is None else _SeededDraws([seeds[index] for index in rows], new_tokens, sampling)
            batch_prompts = [prompts_ids[index] for index in rows]
            row_ends = None if ends is None else partial(ends, rows)
            produced = _generate(model, batch_prompts, tokenizer.pad_id, settings, adapt, row_ends, cache, draws)
            for index, ids in zip(rows, produced, strict=True):
                answer = list(takewhile(lambda token_id: token_id not in stops, ids))
                results[index] = ids[: len(answer) + 1] if keep_stop else answer
    return results


def check_prompts(prompts_ids: Sequence[Sequence[int]], positions: int | None, others: int) -> None:
    """Check that each prompt fits into `positions` (None: no limit) together with `others` tokens.

    Raises: DataError for an empty prompt, or one that does not fit.
    """
    for number, prompt in enumerate(prompts_ids, start=1):
        if not len(prompt):
            raise DataError(f"prompt {number} is empty", "write at least one character")
        if positions is not None and len(prompt) + others > positions:
            what = f"prompt {number} has {len(prompt)} tokens, too many for the model's {positions} positions"
            raise DataError(what, "shorten it")


def find_stop_ids(model: LoadedModel, tokenizer: Tokenizer, template: str | None = None) -> list[int]:
    """Ids that end an answer: the tokenizer's end token, the model's own, and the token that ends a turn of the
    template."""
    eos_ids = getattr(model.generation_config, "eos_token_id", None)
    of_model = eos_ids if isinstance(eos_ids, list | tuple) else [eos_ids]
    stops = {tokenizer.eos_id, *of_model, *end_of_turn_ids(tokenizer, template)}
    return sorted(int(stop) for stop in stops if stop is not None)


def end_of_turn_ids(tokenizer: Tokenizer, template: str | None = None) -> list[int]:
    """The special token that the chat template writes after the last answer, or else after an earlier answer; a list of
    zero or one id."""
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


def prompt_cache(model: LoadedModel, ids: Sequence[int], cache: Cache | None, prompt: Sequence[int]) -> Cache | None:
    """A cache for a prompt: the shared prefix of `cache` (made from `ids`) and the prompt, otherwise an empty cache.

    None if the base has a state, a window or an encoder's output, which cannot be cut to a prefix.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if model.family.reads_source or as_pretrained(model.net)._is_stateful:
        return None
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, prompt[:-1], strict=False))))
    if cache is None or not shared:
        cache = DynamicCache(config=config_of(model.net))
        return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :shared], layer.values[:, :, :shared]  # (1, heads, T, D)
    return cache


def _settings(model: LoadedModel, pad: int, new_tokens: int, sampling: Sampling, stops: list[int]) -> GenerationConfig:
    """transformers' GenerationConfig with only the requested settings."""
    from transformers import GenerationConfig

    ends = _answer_ends(model) if model.family.reads_source else {}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        eos_token_id=stops or None,
        bos_token_id=getattr(text_config(model.net), "bos_token_id", None),
        use_cache=True,
        num_beams=1,
        **(sampling_settings(sampling) | ends),
    )


def sampling_settings(sampling: Sampling) -> dict[str, Any]:
    """transformers' settings for choosing tokens."""
    settings = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    return {"do_sample": True, **settings} if sampling.temperature >= MIN_TEMPERATURE else {"do_sample": False}


def _answer_ends(model: LoadedModel) -> dict[str, int]:
    """The tokens that start an encoder-decoder's answer, and the token that ends a truncated answer.

    Raises: ModelError if neither the configuration nor the generation settings name the first one.
    """
    names = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    holders = (model.config, model.generation_config)  # the generation settings are newer, so they have priority
    values = [(name, getattr(holder, name, None)) for holder in holders for name in names]
    tokens = {name: int(value) for name, value in values if value is not None}
    if "decoder_start_token_id" not in tokens:
        what = f"{model.facts.name_or_path} does not define the token with which answers begin"
        raise ModelError(what, "write decoder_start_token_id into its config.json")
    return tokens


@torch.no_grad()
def _rows_interact(model: LoadedModel, pad_id: int) -> bool:
    """Whether a row's answer depends on its batch, because a state reads the padding (xlstm, recurrent_gemma) or mixes
    rows (rwkv). Nets with a state or without a mask are tested with two rows."""
    net = as_pretrained(model.net)
    if not getattr(net, "_is_stateful", False) and "attention_mask" in accepted_names(net):
        return False
    settings = _settings(model, pad_id, 2, GREEDY, [])
    settings.output_logits, settings.return_dict_in_generate = True, True
    rows = torch.arange(2 * PROBE_TOKENS, device=model.device).view(2, -1)  # (B, T)
    mask, half = torch.ones_like(rows), PROBE_TOKENS // 2  # (B, T)
    rows[0, :half], mask[0, :half] = pad_id, 0
    runs = []
    for ids, row_mask in ((rows[:1, half:], mask[:1, half:]), (rows, mask)):
        with quiet():
            steps = net.generate(input_ids=ids, attention_mask=row_mask, generation_config=settings).logits
        runs.append(torch.stack([logits[0].float() for logits in steps]))  # (2, V)
    alone, batched = runs
    allowed = max(1e-4, 2 * torch.finfo(net.dtype).eps) * float(alone.abs().max())
    return float((batched - alone).abs().max()) > allowed


@torch.no_grad()
def _generate(
    model: LoadedModel,
    prompts: list[Sequence[int]],
    pad_id: int,
    settings: GenerationConfig,
    adapt: Callable[[ModelInputs], ModelInputs] | None,
    ends: Callable[[list[int]], list[bool]] | None,
    cache: Cache | None,
    draws: _SeededDraws | None,
) -> list[list[int]]:
    """One batch: new ids of each row, including ids after a stop token."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)  # (B, T)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)  # (B, T)
    separate = model.family.reads_source
    for row, prompt in enumerate(prompts):
        columns = slice(0, len(prompt)) if separate else slice(width - len(prompt), width)
        ids[row, columns], mask[row, columns] = torch.tensor(list(prompt)), 1
    net = as_pretrained(model.net)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    inputs = inputs if adapt is None else adapt(inputs)
    extras: dict[str, Any] = {} if ends is None else {"stopping_criteria": [_stopping_criterion(ends)]}
    extras |= {} if draws is None else {"logits_processor": [draws]}
    with quiet():
        if cache is None and adapt is None:
            cache = _bounded_cache(model, prompts, ids, mask, settings.max_new_tokens)
        extras |= {} if cache is None else {"past_key_values": cache}
        # recurrent_gemma keeps the last row's state in its modules, and drops it in a forward without a cache
        if any(hasattr(module, "_setup_cache") for module in net.modules()):
            net(input_ids=ids[:1, :1].to(model.device), use_cache=False)
        output = net.generate(**inputs, generation_config=settings, **extras)
    repeated = 1 if separate else width if "input_ids" in inputs else 0  # prompt ids at the start of the output
    return output[:, repeated:].tolist()


def _bounded_cache(
    model: LoadedModel, prompts: Sequence[Sequence[int]], ids: Tensor, mask: Tensor, new_tokens: int
) -> Cache | None:
    """A cache for the prompts and their new tokens, with the keys and values of all but the last token of each prompt
    if some prompts are equal, for which they are computed once; None if the base keeps other state.

    Shapes: ids, mask (B, T), padded on the left.
    """
    places: dict[tuple[int, ...], int] = {}
    rows = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    cache = prompt_cache(model, (), None, ())
    if cache is None:
        return None
    from tunekit.model.text.bounded_cache import bound

    cache = bound(cache, ids.shape[1] + new_tokens)
    if len(places) == len(rows) or ids.shape[1] == 1 or not model.family.takes_positions(model.net):
        return cache
    firsts = torch.tensor([rows.index(place) for place in range(len(places))])
    unique_mask = mask[firsts].to(model.device)
    positions = (unique_mask.cumsum(dim=-1) - 1).clamp(min=0)  # (U, T)
    model.net(
        input_ids=ids[firsts, :-1].to(model.device),
        attention_mask=unique_mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_select_indices(torch.tensor(rows, device=model.device))
    return cache


class _SeededDraws:
    """Draws the next token of each row with the row's own random numbers, so that transformers can only choose this
    token.

    The numbers depend only on the row's seed and the token's position, not on the other rows of the batch.
    """

    def __init__(self, seeds: Sequence[int], new_tokens: int, sampling: Sampling) -> None:
        raw = np.stack([np.random.Philox(key=seed).random_raw(new_tokens) for seed in seeds])
        self.numbers = torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53)  # (B, new tokens) float64
        self.sampling, self.drawn = sampling, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Shapes: scores (B, V) -> (B, V), with all but one token of each row at -inf."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper

        sampling = self.sampling
        scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores) if sampling.temperature != 1 else scores
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores) if sampling.top_k else scores
        scores = _top_p(scores, sampling.top_p) if sampling.top_p < 1 else scores
        place = draw(scores.float(), self.numbers[:, self.drawn].to(scores.device, summing_dtype(scores.device)))
        self.drawn += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, place, 0.0)


def _top_p(scores: Tensor, share: float) -> Tensor:
    """(B, V) scores, -inf except for the most likely tokens whose probabilities sum to `share`, as transformers'
    top_p."""
    ordered, places = scores.sort(dim=-1)
    unlikely = cumulative_sums(ordered.float().softmax(dim=-1)) <= int((1 - share) * PROBABILITY_UNITS)  # (B, V)
    unlikely[:, -1] = False
    return scores.masked_fill(unlikely.scatter(1, places, unlikely), -torch.inf)


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """(B, 1): for each row, the first token whose cumulative probability exceeds the row's number in [0, 1).

    Shapes: logits (B, V) float32, numbers (B,).
    """
    total = cumulative_sums(torch.softmax(logits, dim=-1))  # (B, V)
    reached = (numbers[:, None] * total[:, -1:].to(numbers.dtype)).to(torch.int64)  # (B, 1)
    return torch.searchsorted(total, reached, right=True).clamp(max=logits.shape[-1] - 1)


def cumulative_sums(probabilities: Tensor) -> Tensor:
    """(B, V) float32 -> (B, V) int64: cumulative sums in units of 2^-52, because a GPU has a fixed order of sums only
    for integers."""
    return (probabilities * PROBABILITY_UNITS).to(torch.int64).cumsum(dim=-1)


def _stopping_criterion(ends: Callable[[list[int]], list[bool]]) -> Callable[..., Tensor]:
    """A stopping criterion of transformers: (B,) bool, called after every step with all ids (B, T) so far."""
    return lambda ids, scores, **_: torch.tensor(ends(ids[:, -1].tolist()), device=ids.device)


@contextmanager
def unchanged_generation(net: nn.Module) -> Iterator[None]:
    """A block with eval mode, cache on and no generation defaults; modes, settings and random state are restored after
    it."""
    from transformers import GenerationConfig

    holder = as_pretrained(net)
    use_cache, defaults = holder.config.use_cache, getattr(holder, "generation_config", None)
    device = next(
        (parameter.device for parameter in net.parameters() if parameter.device.type != "cpu"), torch.device("cpu")
    )
    holder.config.use_cache, holder.generation_config = True, GenerationConfig()
    # A head copies a non-contiguous slice (each row's last position) once per row of the batch.
    contiguous = holder.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        with training_mode(net, False), forked_random(device), calling(replace(current_call(), fuses=True)):
            yield
    finally:
        contiguous.remove()
        holder.config.use_cache, holder.generation_config = use_cache, defaults
