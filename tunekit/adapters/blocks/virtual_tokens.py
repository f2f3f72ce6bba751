"""Code that all prompt methods share: trained vectors before each row's embeddings, their initialisation, and PEFT's
fields."""

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

IN_FILES = "prompt_embeddings"  # PEFT's name for the final vectors
FIELDS: PeftFields = {
    "num_virtual_tokens": ("num_virtual_tokens", None),
    "num_transformer_submodules": ("num_transformer_submodules", 1),
}
BASE_FIELDS: Fixed = dict.fromkeys(("token_dim", "num_attention_heads", "num_layers"), (None, ANY))
START_FIELDS: Fixed = {  # initialisation of the vectors; it does not affect a finished file
    **BASE_FIELDS,
    "prompt_tuning_init": ("RANDOM", ANY),
    **dict.fromkeys(("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"), (None, ANY)),
}
FIRST_VALUES = frozenset({"init", "init_text", "init_ids"})  # settings of the vectors' initialisation
ABSENT = frozenset(MODULES) - {"modules_to_save"}


class VirtualTokens(ModelAdapter[Settings]):
    """Puts trained vectors before the embeddings of each row. A subclass computes them in `vectors`.

    Shapes: P vectors of width D; a row of T tokens becomes (P + T, D), with the tokens at positions P, P + 1 and so
    on. Left padding stays left of the vectors, so that they come directly before the row's first token.
    """

    starts_as_identity = False
    prompts_decoder = False  # whether the second half of the vectors is for an encoder-decoder's decoder

    net: Any
    real: Tensor | None
    prompt: nn.Parameter  # the vectors, if they are trained themselves or loaded from a file

    def attach(self, net: nn.Module) -> None:
        self.__dict__["net"] = net  # not a submodule of its own adapter
        self.__dict__["real"] = None  # (B, T): positions of the last call's tokens; None: after all vectors
        if is_encoder_decoder(net) and self.net.get_output_embeddings() is None:
            what = (
                f"{type(net).__name__} needs token ids to find the position whose hidden state it reads, but a prompt "
                "passes embeddings"
            )
            raise AdapterError(what, "use a method that adapts layers, such as lora", key="adapter.method")

    @classmethod
    def virtual_tokens(cls, settings: Settings) -> int:
        return int(getattr(settings, "num_virtual_tokens", 0))

    @classmethod
    def vector_count(cls, settings: Settings) -> int:
        """The number of vectors in the file. It is twice the setting if both the encoder and the decoder get
        vectors."""
        return cls.virtual_tokens(settings) * int(getattr(settings, "num_transformer_submodules", 1))

    @classmethod
    def file_slots(cls, settings: Settings, net: nn.Module) -> Slots:
        return {"prompt": Slot(IN_FILES, (cls.vector_count(settings), width_of(net)), decays=False)}

    def vectors(self, tasks: Tensor | None) -> Tensor:
        """The vectors (P, D), or (B, P, D) if they differ between rows. If the decoder has separate vectors, there are
        2 P of them."""
        return self.prompt

    def file_tensors(self) -> Tensors:
        """The computed vectors, under the tensor name that PEFT uses."""
        return {IN_FILES: self.vectors(None).detach()}

    def inputs(self, net: nn.Module, inputs: Tensors) -> Tensors:
        changed = dict(inputs)
        rows = self._embed(changed, "input_ids", "inputs_embeds")  # (B, T, D)
        length, vectors = self.virtual_tokens(self.settings), self.vectors(changed.pop("task_ids", None))
        vectors = vectors.to(rows).expand(rows.shape[0], -1, -1)  # (B, P, D)
        order, self.__dict__["real"] = _order(changed.get("attention_mask"), length)
        changed["inputs_embeds"] = _join(vectors[:, :length], rows, order)
        for name, before in (("attention_mask", 1), ("token_type_ids", 0)):
            if name in changed:
                changed[name] = _join(changed[name].new_full((rows.shape[0], length), before), changed[name], order)
        if "position_ids" in changed:
            positions = changed["position_ids"].expand(rows.shape[0], -1)  # (B, T)
            first = torch.arange(length, device=positions.device).expand(rows.shape[0], -1)  # (B, P)
            changed["position_ids"] = _join(first, positions + length, order)
        if self._decoder_length:
            self._before_decoder(changed, vectors[:, length:])
        return changed

    def _embed(self, inputs: Tensors, ids: str, embeddings: str) -> Tensor:
        """Takes the token ids out of the inputs and returns their embeddings. Without ids, returns the embeddings in
        the inputs."""
        tokens = inputs.pop(ids, None)
        return inputs[embeddings] if tokens is None else self.net.get_input_embeddings()(tokens)

    def _before_decoder(self, inputs: Tensors, vectors: Tensor) -> None:
        """Put the decoder's vectors before the decoder's tokens.

        Raises: AdapterError if the call passes no decoder inputs.
        """
        if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            what = "the decoder has its own virtual tokens, but the call passes no decoder_input_ids"
            raise AdapterError(what, "pass decoder_input_ids or decoder_inputs_embeds")
        rows = self._embed(inputs, "decoder_input_ids", "decoder_inputs_embeds")
        inputs["decoder_inputs_embeds"] = _join(vectors, rows, None)
        if "decoder_attention_mask" in inputs:
            mask = inputs["decoder_attention_mask"]
            inputs["decoder_attention_mask"] = _join(mask.new_ones(vectors.shape[:2]), mask, None)

    @property
    def _decoder_length(self) -> int:
        length = self.virtual_tokens(self.settings)
        both = self.vector_count(self.settings) == 2 * length
        return length if both and self.prompts_decoder and is_encoder_decoder(self.net) else 0

    def outputs(self, hidden: Tensor) -> Tensor:
        """Removes the positions of the vectors from hidden states (B, T, D). A classifier's logits (B, labels) have no
        positions and stay unchanged."""
        if hidden.dim() < 3:
            return hidden
        if is_encoder_decoder(self.net):
            return hidden[:, self._decoder_length :]
        if self.real is None:
            return hidden[:, self.virtual_tokens(self.settings) :]
        return hidden.gather(1, self.real[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def file_fields(self) -> PeftConfig:
        """The fields of PEFT's configuration that describe the base."""
        config = text_config(self.net)
        layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
        heads = getattr(config, "num_attention_heads", None)
        return {"token_dim": width_of(self.net), "num_attention_heads": heads, "num_layers": layers}


class ClassifierCopy(TrainedCopy):
    """A module that is fully trained in addition to a prompt. In PEFT's files the names of its tensors begin with
    `base_model.`."""

    file_prefix = "base_model."


def width_of(net: nn.Module) -> int:
    """D of the token embedding, the width of the vectors."""
    return int(as_pretrained(net).get_input_embeddings().weight.shape[1])


def is_encoder_decoder(net: nn.Module) -> bool:
    """Whether the network is an encoder-decoder."""
    return bool(getattr(getattr(net, "config", None), "is_encoder_decoder", False))


def embeddings_of(net: nn.Module, ids: Sequence[int] | Tensor) -> Tensor:
    """The base's embeddings of the ids, (ids, D) float32 on the CPU. Zeros for a base on the meta device, because its
    values are loaded later.

    Raises: AdapterError for an id that the base does not have.
    """
    table = as_pretrained(net).get_input_embeddings()
    tokens = torch.as_tensor(ids, dtype=torch.int64)
    if int(tokens.max()) >= table.weight.shape[0]:
        largest = f"token id {int(tokens.max())} is too large: this base has {table.weight.shape[0]} tokens"
        raise AdapterError(largest, "use the tokenizer that belongs to the base", key="adapter")
    if table.weight.device.type == "meta":
        return torch.zeros(len(tokens), table.weight.shape[1])
    with torch.no_grad(), calling(replace(current_call(), bypassed=True)):  # a copy of the table has no values yet
        embeddings: Tensor = table(tokens.to(table.weight.device)).float().cpu()
    return embeddings


def initial_vectors(net: nn.Module, settings: StartedTokenSettings, vectors: int, generator: Generator) -> Tensor:
    """Initial vectors (vectors, D) in float32. The setting `init` selects their source: embeddings of random token ids,
    random values from N(0, 1), or the embeddings of a text."""
    if settings.init == "random":
        return torch.randn(vectors, width_of(net), generator=generator)
    if settings.init == "vocabulary":
        size = min(int(text_config(net).vocab_size), as_pretrained(net).get_input_embeddings().weight.shape[0])
        return embeddings_of(net, torch.randint(0, size, (vectors,), generator=generator))
    if settings.init_ids is None:
        raise AdapterError("the prompt's text has not been tokenized", "write init_ids", key="adapter.init")
    return embeddings_of(net, cycled_ids(settings.init_ids, vectors))


def cycled_ids(ids: Sequence[int], count: int) -> list[int]:
    """The ids repeated cyclically, `count` in total."""
    return list(itertools.islice(itertools.cycle(ids), count))


def with_text_ids(settings: StartedTokenSettings, tokenizer: Tokenizer) -> StartedTokenSettings:
    """Returns the settings with init_text encoded as token ids. Special tokens are encoded only if the text contains
    them."""
    if settings.init != "text" or settings.init_ids is not None or settings.init_text is None:
        return settings
    return settings.model_copy(update={"init_ids": tuple(tokenizer.encode(settings.init_text))})


def _order(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Computes the order of P vectors and T tokens if a row's left padding stays first. Returns two tensors: for each
    position, the index into [vectors; row] (B, P + T); and each token's new position (B, T). Both are None without a
    mask (B, T): then the vectors come first."""
    if mask is None or mask.dim() != 2:
        return None, None
    padding = (mask == 0).to(torch.int64).cumprod(dim=1).sum(dim=1, keepdim=True)  # (B, 1) on the left
    places = torch.arange(length + mask.shape[1], device=mask.device)[None]  # (1, P + T)
    shifted = torch.where(places < padding, places + length, places - padding)
    tokens = places[:, : mask.shape[1]]
    real = torch.where(tokens < padding, tokens, tokens + length)
    return torch.where(places < padding + length, shifted, places), real


def _join(before: Tensor, rows: Tensor, order: Tensor | None) -> Tensor:
    """Concatenates `before` and `rows` along the token dimension, and rearranges them by `order`. Shapes: (B, P, ...)
    and (B, T, ...) -> (B, P + T, ...)."""
    joined = torch.cat([before.to(rows), rows], dim=1)
    if order is None:
        return joined
    return joined.gather(1, order if joined.dim() == 2 else order[:, :, None].expand_as(joined))
