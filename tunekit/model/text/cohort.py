"""Decodes rows that start together (a cohort). This is for bases with an encoder or a recurrent state, whose rows
cannot join at different times, and for rows that are too long to share a forward. transformers itself prepares the
inputs of each step."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunekit.contracts import Tensors
from tunekit.errors import ModelError
from tunekit.model.families import text_config
from tunekit.model.families.structure import text_net
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import as_pretrained
from tunekit.model.text.continuation import DecoderRow, States
from tunekit.model.text.draws import Score, score
from tunekit.model.text.slots import shares_slots
from tunekit.model.transformers_guard import quiet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

PROBE_TOKENS = 8
Steps = Generator[Tensor, Tensor, None]


class Cohort:
    """Rows that are decoded together from the start. `rows`: the rows that have not ended. The forward also computes
    ended rows, until all rows have ended."""

    nbytes = 0  # transformers allocates their states token by token

    def __init__(self, model: LoadedModel, pad_id: int, rows: Sequence[DecoderRow]) -> None:
        self.rows, self._places = list(rows), {row: place for place, row in enumerate(rows)}
        self._size, self._pad_id, self._device = len(rows), pad_id, model.device
        prompts = [row.continuation.prompt for row in rows]
        inputs = padded(prompts, pad_id, left=not model.family.reads_source, device=model.device)
        adapt = rows[0].continuation.adapt
        inputs = inputs if adapt is None else adapt(inputs)
        reset_state(model)
        for row in rows:
            row.prompt_scores = _scored_prompt(model, row) if row.continuation.scores_prompt else ()
        longest = max(row.continuation.max_new_tokens for row in rows)
        self._steps = steps(model, inputs, generation_settings(model, pad_id, longest))

    def logits(self) -> Tensor:
        """Logits (B, V) float32 of the next token of each row."""
        if not self.rows[0].tokens:
            with quiet():
                logits = next(self._steps)
        else:
            last = {self._places[row]: row.tokens[-1] for row in self.rows}
            tokens = [last.get(place, self._pad_id) for place in range(self._size)]
            logits = self._steps.send(torch.tensor(tokens, device=self._device))
        return logits if len(self.rows) == self._size else logits[[self._places[row] for row in self.rows]]

    def remove(self, row: DecoderRow) -> None:
        """Remove a row that has ended."""
        self.rows.remove(row)

    def states(self, row: DecoderRow) -> States | None:
        """Always None: the states of these bases cannot be reused for a prefix of the text."""
        return None


def padded(prompts: Sequence[Sequence[int]], pad_id: int, *, left: bool, device: torch.device) -> Tensors:
    """Ids and mask (B, T) of the prompts. `left`: pad on the left. An encoder needs padding on the right, because it
    counts positions from the start of the row."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)  # (B, T)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)  # (B, T)
    for row, prompt in enumerate(prompts):
        columns = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, columns], mask[row, columns] = torch.tensor(list(prompt)), 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def steps(model: LoadedModel, inputs: Tensors, settings: GenerationConfig) -> Steps:
    """A Python generator that yields the logits (B, V) of the next tokens, and then receives the chosen tokens (B,).

    transformers prepares inputs, encoder and cache as usual, but runs this loop instead of its own generation loop.
    """

    def loop(net: PreTrainedModel, input_ids: Tensor, *_: object, **named: object) -> Steps:
        for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"):
            named.pop(name, None)
        ids, count = input_ids, dict[str, int | None]()
        while True:
            prepared = net.prepare_inputs_for_generation(ids, is_first_iteration=not count, **count, **named)
            output = net(**prepared, return_dict=True)
            named = net._update_model_kwargs_for_generation(
                output, named, is_encoder_decoder=net.config.is_encoder_decoder
            )
            tokens = yield output.logits[:, -1].float()
            ids, count = (
                torch.cat([ids, tokens[:, None]], dim=1),
                {"next_sequence_length": 1 if named.get("use_cache") else None},
            )

    net = as_pretrained(text_net(model.net))
    return net.generate(**inputs, generation_config=settings, custom_generate=loop)


def generation_settings(model: LoadedModel, pad: int, new_tokens: int) -> GenerationConfig:
    """Generation settings for transformers that leave the logits unchanged.

    Raises: ModelError if an encoder-decoder names no start token.
    """
    from transformers import GenerationConfig

    start = _setting(model, "decoder_start_token_id") if model.family.reads_source else None
    if model.family.reads_source and start is None:
        what = f"{model.facts.name_or_path} does not name the token with which its answers begin"
        raise ModelError(what, "write decoder_start_token_id into its config.json")
    return GenerationConfig(
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        eos_token_id=None,
        bos_token_id=getattr(text_config(model.net), "bos_token_id", None),
        use_cache=True,
        do_sample=False,
        num_beams=1,
        decoder_start_token_id=start,
    )


def forced_first_token(model: LoadedModel) -> int | None:
    """The token with which each answer of an encoder-decoder begins, such as the language of a translation."""
    return _setting(model, "forced_bos_token_id") if model.family.reads_source else None


def _setting(model: LoadedModel, name: str) -> int | None:
    """A token in the generation settings, or else in the configuration, which is older."""
    values = (getattr(holder, name, None) for holder in (model.generation_config, model.config))
    return next((int(value) for value in values if value is not None), None)


def keeps_state_in_modules(model: LoadedModel) -> bool:
    """Whether the base stores its recurrent state in its modules, as recurrent_gemma does, or the rotary factors of the
    longest row so far (dynamic). Then only one cohort can run at a time."""
    return any(
        hasattr(module, "_setup_cache") or "dynamic" in str(getattr(module, "rope_type", ""))
        for module in model.net.modules()
    )


def reset_state(model: LoadedModel) -> None:
    """If modules store the state of previous rows, remove it by a forward without a cache."""
    if keeps_state_in_modules(model):
        text_net(model.net)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


@torch.no_grad()
def rows_interact(model: LoadedModel, pad_id: int) -> bool:
    """Whether a row's answer depends on the other rows in its cohort: the recurrent state includes the padding (xlstm,
    recurrent_gemma) or mixes rows (rwkv). Bases whose rows cannot share a cache are tested with two rows."""
    if model.family.reads_source or shares_slots(model):
        return False
    rows = torch.arange(2 * PROBE_TOKENS, device=model.device).view(2, -1)  # (B, T)
    mask, half = torch.ones_like(rows), PROBE_TOKENS // 2  # (B, T)
    rows[0, :half], mask[0, :half] = pad_id, 0
    runs = []
    for ids, row_mask in ((rows[:1, half:], mask[:1, half:]), (rows, mask)):
        with quiet():
            reset_state(model)
            run = steps(model, {"input_ids": ids, "attention_mask": row_mask}, generation_settings(model, pad_id, 2))
            first = next(run)
            runs.append(torch.stack([first[0], run.send(first.argmax(dim=-1))[0]]))  # (2, V)
    alone, batched = runs
    allowed = max(1e-4, 2 * torch.finfo(as_pretrained(text_net(model.net)).dtype).eps) * float(alone.abs().max())
    return float((batched - alone).abs().max()) > allowed


def _scored_prompt(model: LoadedModel, row: DecoderRow) -> list[Score]:
    """Score the prompt's tokens from the second token on, in one forward of the whole prompt.

    Raises: ModelError if an encoder reads the prompt.
    """
    if model.family.reads_source:
        what = f"{model.facts.name_or_path} reads prompts with an encoder, which predicts no tokens"
        raise ModelError(what, "request the log-probabilities of the answer only")
    wanted = row.continuation
    inputs: Tensors = {"input_ids": torch.tensor([list(wanted.prompt)], device=model.device)}  # (1, T)
    inputs = inputs if wanted.adapt is None else wanted.adapt(inputs)
    logits = text_net(model.net)(**inputs, use_cache=False).logits[
        0, -len(wanted.prompt) : -1
    ]  # (T - 1, V), not virtual tokens
    return score(logits, list(wanted.prompt[1:]), wanted.top or 0) if len(logits) else []
