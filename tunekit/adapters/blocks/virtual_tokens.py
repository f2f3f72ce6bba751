"""What prompt methods share: vectors before each row's embeddings, their initialisation, PEFT's fields of the base.

What the network would be called with goes in; the same with embeddings in place of ids comes out, and outputs without
the virtual positions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import ModelAdapter, PeftConfig, Settings, Slot, Slots
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.folder.fields import ANY, MODULES, Fixed, PeftFields
from tunekit.contracts import Tensors, Tokenizer
from tunekit.errors import AdapterError
from tunekit.model.call import calling, current_call
from tunekit.model.pretrained import as_pretrained, text_config
from tunekit.recipe.bases.virtual_tokens import StartedTokenSettings

IN_FILES = "prompt_embeddings"  # PEFT's name for the finished vectors
FIELDS: PeftFields = {
    "num_virtual_tokens": ("num_virtual_tokens", None),
    "num_transformer_submodules": ("num_transformer_submodules", 1),
}
BASE_FIELDS: Fixed = dict.fromkeys(("token_dim", "num_attention_heads", "num_layers"), (None, ANY))
START_FIELDS: Fixed = {  # how the vectors once started; a finished file computes the same
    **BASE_FIELDS,
    "prompt_tuning_init": ("RANDOM", ANY),
    **dict.fromkeys(("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"), (None, ANY)),
}
FIRST_VALUES = frozenset({"init", "init_text", "init_ids"})  # settings of how the vectors started
ABSENT = frozenset(MODULES) - {"modules_to_save"}


class VirtualTokens(ModelAdapter[Settings]):
    """[vectors; embeddings of the row], which a subclass's `vectors` gives.

    Shapes: P vectors of width D; a row of T tokens becomes (P + T, D), the tokens at the positions P, P + 1 and so on.
    Padding on the left stays on the left of the vectors, so that they stand directly before the row's first token.
    """

    starts_as_identity = False
    prompts_decoder = False  # whether the second half of the vectors stands before an encoder-decoder's decoder

    net: Any
    real: Tensor | None
    prompt: nn.Parameter  # the vectors themselves, where they are trained, or nothing else is left of what was

    def attach(self, net: nn.Module) -> None:
        self.__dict__["net"] = net  # not a submodule of its own adapter
        self.__dict__["real"] = None  # (B, T): where the last call's tokens stand; None: after all vectors
        if is_encoder_decoder(net) and self.net.get_output_embeddings() is None:
            what = (
                f"{type(net).__name__} looks in the ids for the place that it reads, and a prompt gives it embeddings"
            )
            raise AdapterError(what, "adapt its layers, with lora for one", key="adapter.method")

    @classmethod
    def virtual_tokens(cls, settings: Settings) -> int:
        return int(getattr(settings, "num_virtual_tokens", 0))

    @classmethod
    def vector_count(cls, settings: Settings) -> int:
        """Vectors in the file: PEFT counts an encoder-decoder's twice where both halves are to have some."""
        return cls.virtual_tokens(settings) * int(getattr(settings, "num_transformer_submodules", 1))

    @classmethod
    def file_slots(cls, settings: Settings, net: nn.Module) -> Slots:
        return {"prompt": Slot(IN_FILES, (cls.vector_count(settings), width_of(net)), decays=False)}

    def vectors(self, tasks: Tensor | None) -> Tensor:
        """(P, D), or a row's own (B, P, D); twice as many where a decoder has its own."""
        return self.prompt

    def exported(self) -> Tensors:
        """The finished vectors under PEFT's name."""
        return {IN_FILES: self.vectors(None).detach()}

    def inputs(self, net: nn.Module, inputs: Tensors) -> Tensors:
        given = dict(inputs)
        rows = self._embedded(given, "input_ids", "inputs_embeds")  # (B, T, D)
        length, vectors = self.virtual_tokens(self.settings), self.vectors(given.pop("task_ids", None))
        vectors = vectors.to(rows).expand(rows.shape[0], -1, -1)  # (B, P, D)
        order, self.__dict__["real"] = _order(given.get("attention_mask"), length)
        given["inputs_embeds"] = _join(vectors[:, :length], rows, order)
        for name, before in (("attention_mask", 1), ("token_type_ids", 0)):
            if name in given:
                given[name] = _join(given[name].new_full((rows.shape[0], length), before), given[name], order)
        if "position_ids" in given:
            own = given["position_ids"].expand(rows.shape[0], -1)  # (B, T)
            first = torch.arange(length, device=own.device).expand(rows.shape[0], -1)  # (B, P)
            given["position_ids"] = _join(first, own + length, order)
        if self._decoder_length:
            self._before_decoder(given, vectors[:, length:])
        return given

    def _embedded(self, given: Tensors, ids: str, embeddings: str) -> Tensor:
        """The embeddings that are given, or those of the ids, which are taken out."""
        tokens = given.pop(ids, None)
        return given[embeddings] if tokens is None else self.net.get_input_embeddings()(tokens)

    def _before_decoder(self, given: Tensors, vectors: Tensor) -> None:
        """The decoder's own vectors before its tokens, where the call names those."""
        if "decoder_input_ids" not in given and "decoder_inputs_embeds" not in given:
            raise AdapterError("the decoder has virtual tokens of its own, and the call names no decoder_input_ids")
        rows = self._embedded(given, "decoder_input_ids", "decoder_inputs_embeds")
        given["decoder_inputs_embeds"] = _join(vectors, rows, None)
        if "decoder_attention_mask" in given:
            mask = given["decoder_attention_mask"]
            given["decoder_attention_mask"] = _join(mask.new_ones(vectors.shape[:2]), mask, None)

    @property
    def _decoder_length(self) -> int:
        length = self.virtual_tokens(self.settings)
        both = self.vector_count(self.settings) == 2 * length
        return length if both and self.prompts_decoder and is_encoder_decoder(self.net) else 0

    def outputs(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) of the real positions; a classifier's logits (B, labels) have no positions."""
        if hidden.dim() < 3:
            return hidden
        if is_encoder_decoder(self.net):
            return hidden[:, self._decoder_length :]
        if self.real is None:
            return hidden[:, self.virtual_tokens(self.settings) :]
        return hidden.gather(1, self.real[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def file_fields(self) -> PeftConfig:
        """What PEFT's configuration says of the base."""
        config = text_config(self.net)
        layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
        heads = getattr(config, "num_attention_heads", None)
        return {"token_dim": width_of(self.net), "num_attention_heads": heads, "num_layers": layers}


class ClassifierCopy(TrainedCopy):
    """A copy beside a prompt, which PEFT's files name without the wrapper that adapters of layers have."""

    file_prefix = "base_model."


def width_of(net: nn.Module) -> int:
    """D of the token embedding, whose rows the vectors stand beside."""
    return int(as_pretrained(net).get_input_embeddings().weight.shape[1])


def is_encoder_decoder(net: nn.Module) -> bool:
    """Whether rows go into an encoder, and what comes out is the decoder's."""
    return bool(getattr(getattr(net, "config", None), "is_encoder_decoder", False))


def embeddings_of(net: nn.Module, ids: Sequence[int] | Tensor) -> Tensor:
    """(ids, D) float32 on the CPU, as the base looks the ids up; zeros on a meta base, whose values come later.

    Raises: AdapterError for an id that the base does not have.
    """
    table = as_pretrained(net).get_input_embeddings()
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    if int(tokens.max()) >= table.weight.shape[0]:
        largest = f"token {int(tokens.max())} is none of this base's {table.weight.shape[0]}"
        raise AdapterError(largest, "use the tokenizer that belongs to the base", key="adapter")
    if table.weight.device.type == "meta":
        return torch.zeros(len(tokens), table.weight.shape[1])
    with torch.no_grad(), calling(replace(current_call(), bypassed=True)):  # a copy of the table has no values yet
        found: Tensor = table(tokens.to(table.weight.device)).float().cpu()
    return found


def started(net: nn.Module, settings: StartedTokenSettings, vectors: int, generator: Generator) -> Tensor:
    """(vectors, D) float32 as `init` says: embeddings of ids, each as likely, N(0, 1), or embeddings of a text."""
    if settings.init == "random":
        return torch.randn(vectors, width_of(net), generator=generator)
    if settings.init == "vocabulary":
        size = min(int(text_config(net).vocab_size), as_pretrained(net).get_input_embeddings().weight.shape[0])
        return embeddings_of(net, torch.randint(0, size, (vectors,), generator=generator))
    if settings.init_ids is None:
        raise AdapterError("the text of the prompt has not been made into tokens", "give init_ids", key="adapter.init")
    return embeddings_of(net, repeated(settings.init_ids, vectors))


def repeated(ids: Sequence[int], count: int) -> list[int]:
    """The ids again and again, `count` in all."""
    return list(itertools.islice(itertools.cycle(ids), count))


def with_text_ids(settings: StartedTokenSettings, tokenizer: Tokenizer) -> StartedTokenSettings:
    """The settings with init_text as ids, no special token among them that the text does not spell."""
    if settings.init != "text" or settings.init_ids is not None or settings.init_text is None:
        return settings
    return settings.model_copy(update={"init_ids": tuple(tokenizer.encode(settings.init_text))})


def _order(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """(B, P + T): which of [vectors; row] stands at each place, and (B, T): where each of the row's tokens stands; None
    where the vectors simply come first."""
    if mask is None or mask.dim() != 2:
        return None, None
    padding = (mask == 0).to(torch.int64).cumprod(dim=1).sum(dim=1, keepdim=True)  # (B, 1) on the left
    places = torch.arange(length + mask.shape[1], device=mask.device)[None]  # (1, P + T)
    shifted = torch.where(places < padding, places + length, places - padding)
    tokens = places[:, : mask.shape[1]]
    real = torch.where(tokens < padding, tokens, tokens + length)
    return torch.where(places < padding + length, shifted, places), real


def _join(before: Tensor, rows: Tensor, order: Tensor | None) -> Tensor:
    """[before; rows] along the tokens, in `order`. Shapes: (B, P, ...) and (B, T, ...) -> (B, P + T, ...)."""
    joined = torch.cat([before.to(rows), rows], dim=1)
    if order is None:
        return joined
    return joined.gather(1, order if joined.dim() == 2 else order[:, :, None].expand_as(joined))
