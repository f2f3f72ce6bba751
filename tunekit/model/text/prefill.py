"""Computes the keys and values of prompts in chunks, so that a long prompt does not delay the rows that are already
running."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from tunekit.contracts import Tensors
from tunekit.model.attention.self_attention import CACHE_NAMES
from tunekit.model.families.structure import accepted_names, text_net
from tunekit.model.load import LoadedModel
from tunekit.model.text.continuation import DecoderRow, States
from tunekit.model.text.draws import Score, score
from tunekit.model.text.slots import Columns, SlotMemory
from tunekit.model.transformers_guard import quiet

SCORED_TOKENS = 256  # a piece whose tokens are scored needs logits of each of them


class Forward:
    """Calls a net with a cache of keys and values. Arguments that the net does not accept are left out."""

    def __init__(self, model: LoadedModel) -> None:
        self.net, self.device = text_net(model.net), model.device
        self._names = accepted_names(self.net)
        self._cache = next(name for name in CACHE_NAMES if name in self._names)

    def __call__(
        self, inputs: Tensors, mask: Tensor, positions: Tensor, slots: SlotMemory, *, last: bool = True
    ) -> Tensor:
        """Logits (B, T, V). `last`: only the logits of the last token, (B, 1, V). Shapes: mask (B, columns), positions
        (B, T)."""
        named = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": int(last)}
        arguments = {name: value for name, value in named.items() if name in self._names}
        logits: Tensor = self.net(**inputs, **arguments, **{self._cache: slots.cache}, use_cache=True).logits
        return logits[:, -1:] if last else logits


class Prefill:
    """Computes the keys and values of several prompts, which are padded on the left. Each call of `advance` computes
    the next tokens of all prompts.

    `logits` (B, V): the logits after the last token of each prompt, when all tokens are computed. `scores`: the scores
    of the prompt's tokens, if its continuation requests them.
    """

    def __init__(self, forward: Forward, model: LoadedModel, rows: Sequence[DecoderRow], pad_id: int) -> None:
        self.forward, self.rows = forward, list(rows)
        self.places = {row.key: place for place, row in enumerate(rows)}
        wanted = rows[0].continuation
        width = max(len(row.continuation.prompt) for row in rows)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)  # (B, T)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)  # (B, T)
        for place, row in enumerate(rows):
            prompt = torch.tensor(list(row.continuation.prompt))
            ids[place, width - len(prompt) :], mask[place, width - len(prompt) :] = prompt, 1
        inputs: Tensors = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        inputs = inputs if wanted.adapt is None else wanted.adapt(inputs)
        self._mask = inputs["attention_mask"]
        self._inputs = {name: part for name, part in inputs.items() if name not in ("attention_mask", "position_ids")}
        self._positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)
        self.columns = Columns(len(rows), self._mask.shape[1])
        self._virtual_columns = self._mask.shape[1] - width  # prefix tuning has its tokens inside attention
        self.slots = SlotMemory(model, self.columns)
        self.logits = torch.empty(0)
        self.scores: list[Score] = []
        if wanted.states is not None:
            self._reuse(wanted.states)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens of all prompts are computed."""
        return self.columns.end == self.columns.capacity

    def length(self, row: DecoderRow) -> int:
        """The number of tokens of a row's prompt in the cache, including virtual tokens."""
        return self._virtual_columns + len(row.continuation.prompt)

    @property
    def adapters(self) -> list[str | None]:
        """The adapter of each row."""
        return [row.continuation.adapter for row in self.rows]

    def advance(self, tokens: int) -> int:
        """Compute the next tokens, about `tokens` in all prompts together. Returns the number of tokens computed."""
        start, wanted = self.columns.end, self.rows[0].continuation
        count = max(tokens // len(self.rows), 1)
        count = min(count, SCORED_TOKENS) if wanted.scores_prompt else count
        end = min(start + count, self.columns.capacity)
        inputs = {name: part[:, start:end] for name, part in self._inputs.items()}
        with quiet():
            logits = self.forward(
                inputs,
                self._mask[:, :end],
                self._positions[:, start:end],
                self.slots,
                last=not wanted.scores_prompt,
            )
        self.columns.end = end
        if wanted.scores_prompt:
            self._score(logits[0], start - self._virtual_columns)
        self.logits = logits[:, -1]
        return (end - start) * len(self.rows)

    def _reuse(self, states: States) -> None:
        """Copy the keys and values of the prefix that `states` and the prompt have in common, so that this prefix is
        not computed again. The prompt's last token is always computed."""
        pairs = zip(states.ids, self.rows[0].continuation.prompt[:-1], strict=False)
        if shared := len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))):
            self.slots.put([[part[:, :, :shared] for part in layer] for layer in states.layers], 0, 0)
            self.columns.end = shared

    def _score(self, logits: Tensor, start: int) -> None:
        """Score the prompt's tokens that follow position `start`. The first row of `logits` (T, V) is computed at
        `start` and predicts the token after it."""
        wanted = self.rows[0].continuation
        first, end = max(-start, 0), max(start + len(logits), 0)  # virtual tokens come before
        following = list(wanted.prompt[start + first + 1 : end + 1])
        if following:
            self.scores += score(logits[first : first + len(following)], following, wanted.top or 0)


def shared_prefill(waiting: Iterable[DecoderRow], count: int, tokens: int) -> list[DecoderRow]:
    """Choose up to `count` waiting rows whose prompts can be computed together, with at most `tokens` tokens. Equal
    prompts count once. The first row is always chosen. If an adapter changes inputs, all prompts must have the same
    length."""
    first, *others = waiting
    rows, wanted = {first.key: first}, first.continuation
    width = len(wanted.prompt)
    for row in others:
        other = row.continuation
        if first.is_special or row.is_special or len(rows) == count or row.group != first.group:
            break
        adapted = (wanted.adapt, len(wanted.prompt)) != (other.adapt, len(other.prompt))
        widest = max(width, len(other.prompt))
        if row.key not in rows and ((adapted and (wanted.adapt or other.adapt)) or widest * (len(rows) + 1) > tokens):
            break
        rows.setdefault(row.key, row)
        width = widest
    return list(rows.values())
