"""Prefix tuning: every layer attends to P trained keys and values that stand before those of its tokens.

o_t = softmax(q_t [K_prefix; K_1..t]^T) [V_prefix; V_1..t], the tokens at the positions P, P + 1 and so on.
Shapes: (P, L * 2 * H * D) for L layers of H key heads of width D; one row is a virtual token: layer by layer its keys,
then its values.    Starts as the base behind a real text, where it is made of one.    Source: Li and Liang 2021.

With a projection the trained state is an embedding E (P, H * D) and two layers: prefix = W2 tanh(W1 E + b1) + b2; it is
in checkpoints. PEFT's files hold the prefix that comes of it, and are read as that.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import ModelAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.blocks.virtual_tokens import ABSENT, FIRST_VALUES, IN_FILES, is_encoder_decoder, repeated
from tunekit.adapters.folder.fields import ANY, PeftSide
from tunekit.adapters.method import Method
from tunekit.contracts import Tensors, Tokenizer
from tunekit.errors import AdapterError, Problem, RecipeError
from tunekit.model.attention.earlier_keys import enter, keys_and_values
from tunekit.model.attention.self_attention import SelfAttention, decoder, self_attentions
from tunekit.model.call import calling, current_call
from tunekit.recipe.adapters.prefix import INIT_TEXT, PrefixSettings

SHAPES = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")  # PEFT's facts of the base


class FilePrefixSettings(PrefixSettings):
    """The settings of a folder, and what its configuration says of the base: compared with it, and nothing more."""

    _facts: tuple[tuple[str, int], ...] = ()


class Prefix(ModelAdapter[PrefixSettings]):
    """Keys and values before every layer's own; a part of no layer, so that one tensor holds all of them."""

    starts_as_identity = False

    prefix: Tensor
    embedding: Tensor
    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor
    net: nn.Module

    @classmethod
    def slots(cls, settings: PrefixSettings, net: nn.Module) -> Slots:
        if not settings.prefix_projection:
            return cls.file_slots(settings, net)
        places = self_attentions(net)
        width, length = places[0].heads * places[0].width, settings.num_virtual_tokens
        hidden = settings.encoder_hidden_size or width
        return {
            "embedding": Slot("prompt_encoder.embedding.weight", (length, width)),
            "inner": Slot("prompt_encoder.transform.0.weight", (hidden, width)),
            "inner_bias": Slot("prompt_encoder.transform.0.bias", (hidden,), decays=False),
            "outer": Slot("prompt_encoder.transform.2.weight", (len(places) * 2 * width, hidden)),
            "outer_bias": Slot("prompt_encoder.transform.2.bias", (len(places) * 2 * width,), decays=False),
        }

    @classmethod
    def file_slots(cls, settings: PrefixSettings, net: nn.Module) -> Slots:
        places = self_attentions(net)
        _compare(settings, net, places)
        width = places[0].heads * places[0].width
        return {"prefix": Slot(IN_FILES, (settings.num_virtual_tokens, len(places) * 2 * width))}

    @classmethod
    def virtual_tokens(cls, settings: PrefixSettings) -> int:
        return int(settings.num_virtual_tokens)

    def attach(self, net: nn.Module) -> None:
        self.__dict__["net"] = net  # not a submodule of its own adapter
        self.places = self_attentions(net)
        self.shared_rows = is_encoder_decoder(net)
        self._made: Tensor | None = None
        # A recomputed layer takes what this made.
        before = decoder(net).register_forward_pre_hook(lambda *_: self._make())
        self.hooks = [before, *enter(net, self.places, self.settings.num_virtual_tokens, self.keys_values)]

    @property
    def projected(self) -> bool:
        """Whether the prefix is computed."""
        return "prefix" not in self.declared

    def _make(self) -> None:
        self._made = self._computed() if self.projected and not current_call().bypassed else None

    def _computed(self) -> Tensor:
        """(P, L * 2 * H * D), as files hold it."""
        if not self.projected:
            return self.prefix
        return F.linear(torch.tanh(F.linear(self.embedding, self.inner, self.inner_bias)), self.outer, self.outer_bias)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """(H, P, D) keys and values of one layer.

        In an encoder-decoder PEFT deals the rows out to self-attention and cross-attention in turn and drops the
        latter's, so that layer i has those of 2 i, counted round.
        """
        made = self._made
        if made is None or (torch.is_grad_enabled() and not made.requires_grad):  # made where no gradient was asked for
            made = self._computed()
        row = 2 * layer % len(self.places) if self.shared_rows else layer
        place = self.places[layer]
        rows = made.view(made.shape[0], len(self.places), 2, place.heads, place.width)[:, row]
        keys, values = rows.permute(1, 2, 0, 3)
        return keys, values

    def initialise(self, generator: torch.Generator) -> None:
        start = self.settings.first_values
        if start == "text":
            with torch.no_grad():
                self.prefix.copy_(self._of_text())
        elif self.projected:
            self._initialise_projection(generator)
            if start == "zero":
                nn.init.zeros_(self.outer)
                nn.init.zeros_(self.outer_bias)
        elif start == "zero":
            nn.init.zeros_(self.prefix)
        else:
            nn.init.normal_(self.prefix, generator=generator)

    def _initialise_projection(self, generator: torch.Generator) -> None:
        """As torch starts an Embedding and two Linear layers."""
        nn.init.normal_(self.embedding, generator=generator)
        for weight, bias in ((self.inner, self.inner_bias), (self.outer, self.outer_bias)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def _of_text(self) -> Tensor:
        """(P, L * 2 * H * D): the base's own keys and values of the tokens, repeated or cut to P."""
        ids = self.settings.init_ids
        if ids is None:
            what = "the text of the prefix has not been made into tokens"
            raise AdapterError(what, "give init_ids", key="adapter.init")
        length = self.settings.num_virtual_tokens
        tokens = torch.tensor([repeated(ids, length)])  # (1, P)
        with calling(replace(current_call(), bypassed=True)):
            found = keys_and_values(self.net, self.places, tokens)
        rows = [part.transpose(0, 1).reshape(length, -1) for pair in found for part in pair]  # (P, H * D) each
        return torch.cat(rows, dim=1)

    def exported(self) -> Tensors:
        return {IN_FILES: self._computed().detach()}

    def file_fields(self) -> PeftConfig:
        facts = _facts(self.net, self.places)
        return {**facts, "encoder_hidden_size": self.settings.encoder_hidden_size or facts["token_dim"]}


def _facts(net: nn.Module, places: list[SelfAttention]) -> dict[str, int]:
    """What PEFT's configuration says of the base."""
    heads, width = places[0].heads, places[0].width
    return dict(zip(SHAPES, (heads * width, heads, len(places), 2 if is_encoder_decoder(net) else 1), strict=True))


def _compare(settings: PrefixSettings, net: nn.Module, places: list[SelfAttention]) -> None:
    """Raises: AdapterError with every fact of a folder that is not this base's; RecipeError for a senseless start."""
    facts = _facts(net, places)
    if isinstance(settings, FilePrefixSettings):
        wrong = [
            Problem(f"is {value}, and this base needs {facts[name]}", "name the right base with --base", key=name)
            for name, value in settings._facts
            if value != facts[name]
        ]
        if wrong:
            raise AdapterError.of(wrong)
    elif settings.first_values == "text" and is_encoder_decoder(net):
        what = "an encoder-decoder's prefix cannot be made of a text: PEFT's format gives two layers the same one"
        raise RecipeError(what, "write init: random", key="adapter.init")


def with_tokenizer(settings: PrefixSettings, tokenizer: Tokenizer) -> PrefixSettings:
    """The settings with init_text as ids, behind the token that begins texts, where the tokenizer puts one there."""
    if settings.first_values != "text" or settings.init_ids is not None:
        return settings
    ids = tokenizer.encode(settings.init_text or INIT_TEXT)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    more = ids * (settings.num_virtual_tokens // max(1, len(ids)) + 1)  # the beginning is not repeated with the text
    return settings.model_copy(update={"init_ids": tuple(begin + more)[: settings.num_virtual_tokens]})


class PrefixSide(PeftSide[FilePrefixSettings]):
    """PEFT's fields, of which some tell about the base and are compared with it later."""

    def read(self, config: PeftConfig, file: str) -> FilePrefixSettings:
        """Our settings for PEFT's fields.

        Raises: AdapterError.
        """
        settings = super().read(config, file)
        facts = {name: config[name] for name in SHAPES if config.get(name) is not None}
        wrong = [name for name, value in facts.items() if type(value) is not int]
        if wrong:
            raise AdapterError.of([Problem("must be a whole number", "", file, None, name) for name in wrong])
        settings._facts = tuple(facts.items())
        return settings


METHOD = Method(
    peft=PrefixSide(
        "PREFIX_TUNING",
        FilePrefixSettings,
        fields={"num_virtual_tokens": ("num_virtual_tokens", None)},
        # A file holds a plain prefix, however it was computed.
        fixed={
            "prefix_projection": (False, True),
            "encoder_hidden_size": (None, ANY),
            "init_weights": (None, "zero"),
            "modules_to_save": (None, []),
            **dict.fromkeys(SHAPES, (None, ANY)),
        },
        absent=ABSENT,
    ),
    model=Prefix,
    unbinding=FIRST_VALUES | {"encoder_hidden_size"},
    with_tokenizer=with_tokenizer,
)
