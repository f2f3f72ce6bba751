"""The decoder for chat, serve, generate, evaluation and sampling. It continues many prompts at once, token by token.

Rows (prompts with their answers) can join and leave at any token. The tokens that a row samples depend only on its
seed.

Other engines cannot replace this decoder. The continuous batching of transformers 5.24 puts the tokens of all requests
into one row (1, T), so that requests cannot use different unmerged adapters. vLLM 0.32 for CPUs does not read bases
quantized by bitsandbytes or in GGUF, and needs a different release of transformers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor, nn

from tunekit.machine.devices import forked_random
from tunekit.model.call import calling, current_call
from tunekit.model.families.structure import training_mode
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import as_pretrained
from tunekit.model.text.cohort import Cohort, forced_first_token, keeps_state_in_modules, rows_interact
from tunekit.model.text.continuation import Continuation, DecoderRow, NewToken, States
from tunekit.model.text.draws import TokenSampler, choose, penalized, score
from tunekit.model.text.slot_batch import SlotBatch, Using
from tunekit.model.text.slots import shared_length, shares_slots

PIECE_TOKENS = 256  # prompt tokens that are computed between two tokens of the running rows


class Decoder:
    """Continues up to `slots` prompts at once. The cache of each prompt has room for `tokens` tokens.

    `piece_tokens`: the maximum number of prompt tokens that one step computes, because running rows wait meanwhile.
    `using`: makes a context manager that activates adapters, from one adapter name per row of a forward, or one for all
    rows.
    Use a Decoder only inside the context manager `decoding`.
    """

    def __init__(
        self,
        model: LoadedModel,
        pad_id: int,
        *,
        slots: int,
        tokens: int,
        piece_tokens: int = PIECE_TOKENS,
        using: Using = lambda adapters: nullcontext(),
    ) -> None:
        self.model, self.pad_id, self.slots, self.tokens = model, pad_id, slots, tokens
        self.piece_tokens, self.using = piece_tokens, using
        self._numbers, self._waiting = count(), deque[DecoderRow]()
        limit = shared_length(model)  # longer rows are decoded alone
        self._shared_tokens = tokens if limit is None else min(tokens, limit)
        self._slot_batch = SlotBatch(model, pad_id, slots, self._shared_tokens, using) if shares_slots(model) else None
        self._cohorts, self._cohort_queue = list[Cohort](), deque[DecoderRow]()
        is_alone = self._slot_batch is not None or slots == 1 or self._shared_tokens < tokens
        self._cohort_size = 1 if is_alone or rows_interact(model, pad_id) else slots
        self._is_single = keeps_state_in_modules(model)
        self._first_token = forced_first_token(model)

    @property
    def nbytes(self) -> int:
        """The bytes of memory for keys and values. This memory is allocated when the first prompt is computed."""
        return 0 if self._slot_batch is None else self._slot_batch.nbytes

    @property
    def is_busy(self) -> bool:
        """Whether a continuation waits or runs."""
        return bool(self._waiting or self._cohort_queue or self._running)

    @property
    def free_slots(self) -> int:
        """The number of continuations that could start now."""
        return max(self.slots - len(self._running) - len(self._waiting) - len(self._cohort_queue), 0)

    def add(self, continuation: Continuation) -> int:
        """Queue a continuation, and return its handle. Raises: ValueError if the continuation is empty or too long."""
        too_long = self._slot_batch is not None and continuation.columns > self.tokens  # other rows have no slots
        if not len(continuation.prompt) or continuation.max_new_tokens < 1 or too_long:
            raise ValueError(f"a continuation of {continuation.columns} tokens is empty, or longer than {self.tokens}")
        row = DecoderRow(next(self._numbers), continuation, TokenSampler(continuation.sampling))
        is_shared = self._slot_batch is not None and continuation.columns <= self._shared_tokens
        (self._waiting if is_shared else self._cohort_queue).append(row)
        return row.handle

    def cancel(self, handle: int) -> States | None:
        """End a continuation now. Returns its keys and values if it keeps them. Nothing happens if it has already
        ended."""
        self._waiting = deque(row for row in self._waiting if row.handle != handle)
        self._cohort_queue = deque(row for row in self._cohort_queue if row.handle != handle)
        for batch in self._batches:
            for row in [row for row in batch.rows if row.handle == handle]:
                states = batch.states(row) if row.continuation.keeps_states else None
                batch.remove(row)
                return states
        return None

    def forget(self, adapter: str | None) -> None:
        """Drop all results computed with an adapter, before its weights change. The adapter must not be running."""
        if self._slot_batch is not None:
            self._slot_batch.forget(adapter)

    def step(self) -> list[NewToken]:
        """Compute the next token of each running row, and the first token of each row that starts now."""
        tokens: list[NewToken] = []
        for batch in self._batches:
            if batch.rows:
                logits = self._logits(batch)  # the forward may change the order of rows
                tokens += self._chosen(batch, list(batch.rows), logits)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        if self._slot_batch is not None:
            tokens += self._join(self._slot_batch)
        return tokens + self._start_cohorts()

    @property
    def _batches(self) -> list[SlotBatch | Cohort]:
        return [*([] if self._slot_batch is None else [self._slot_batch]), *self._cohorts]

    @property
    def _running(self) -> list[DecoderRow]:
        return [row for batch in self._batches for row in batch.rows]

    def _logits(self, batch: SlotBatch | Cohort) -> Tensor:
        if isinstance(batch, SlotBatch):
            return batch.logits()
        with self.using([batch.rows[0].continuation.adapter]):
            return batch.logits()

    def _join(self, batch: SlotBatch) -> list[NewToken]:
        """Compute waiting prompts, and choose the first token of each row whose prompt is complete."""
        tokens: list[NewToken] = []
        joined = batch.admit(self._waiting, self.piece_tokens)
        if joined:
            rows = [row for row, _ in joined]
            self._waiting = deque(row for row in self._waiting if row not in set(rows))
            tokens = self._chosen(batch, rows, torch.stack([logits for _, logits in joined]))
        return tokens

    def _start_cohorts(self) -> list[NewToken]:
        """Start waiting rows together as a cohort, as soon as half of the slots are free. Rows do not start one by one,
        because a cohort of one row takes as much time as a large cohort."""
        tokens, queue = list[NewToken](), self._cohort_queue
        while queue and not (self._is_single and self._cohorts):
            free = min(self.slots - len(self._running), self._cohort_size)
            if 2 * free < min(self._cohort_size, len(queue)) or not free:
                break
            first = queue[0].continuation
            rows = [queue.popleft()]
            while queue and len(rows) < free and not first.scores_prompt:
                other = queue[0].continuation
                if (other.adapter, other.adapt) != (first.adapter, first.adapt):
                    break
                rows.append(queue.popleft())
            with self.using([first.adapter]):
                cohort = Cohort(self.model, self.pad_id, rows)
            self._cohorts.append(cohort)
            tokens += self._chosen(cohort, rows, self._logits(cohort))
        return tokens

    def _chosen(self, batch: SlotBatch | Cohort, rows: list[DecoderRow], logits: Tensor) -> list[NewToken]:
        """Choose the next token of each row, and remove rows that end. Shapes: logits (B, V) float32."""
        scores = logits
        for place, row in enumerate(rows):
            wanted = row.continuation
            allowed = wanted.allowed and wanted.allowed(row.tokens)
            if allowed is not None or wanted.sampling.changes_logits:
                scores = scores.clone() if scores is logits else scores
            if wanted.sampling.changes_logits:
                prompt = () if self.model.family.reads_source else wanted.prompt  # an encoder reads it
                scores[place] = penalized(scores[place], wanted.sampling, prompt, row.tokens)
            if allowed is not None:
                scores[place].masked_fill_(~allowed.to(scores.device), -torch.inf)
        ids = choose(scores, [row.sampler for row in rows]).tolist()
        tokens = []
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            wanted = row.continuation
            token = token if row.tokens or self._first_token is None else self._first_token
            row.tokens.append(token)
            ended = "length" if len(row.tokens) >= wanted.max_new_tokens else None
            reason = "stop" if token in wanted.stop_ids else ended
            scored = None if wanted.top is None else score(logits[place : place + 1], [token], wanted.top)[0]
            states = batch.states(row) if reason and wanted.keeps_states else None
            tokens.append(NewToken(row.handle, token, reason, scored, row.prompt_scores, states))
            row.prompt_scores = ()
            if reason:
                batch.remove(row)
        return tokens


@contextmanager
def decoding(net: nn.Module) -> Iterator[None]:
    """Context manager for decoding: no gradients, eval mode, use of the cache, and none of the model's generation
    defaults. Modes, settings and random state are restored afterwards."""
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
        call = replace(current_call(), fuses=True)
        with torch.no_grad(), training_mode(net, False), forked_random(device), calling(call):
            yield
    finally:
        contiguous.remove()
        holder.config.use_cache, holder.generation_config = use_cache, defaults
