"""Prefix tuning: each layer attends to P trained keys and values, which come before the keys and values of its tokens.

o_t = softmax(q_t [K_prefix; K_1..t]^T) [V_prefix; V_1..t], with the tokens at the positions P, P + 1 and so on.
Shapes: (P, L * 2 * H * D) for L layers of H key heads of width D. A row contains the keys and values of one virtual
token, layer by layer. A prefix that is initialised from a text starts as the base after this text.
Source: Li and Liang 2021.

With a projection the trained state is an embedding E (P, H * D) and two layers: prefix = W2 tanh(W1 E + b1) + b2;
checkpoints contain this state. PEFT's files contain only the resulting prefix, and are read without a projection.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import ModelAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.blocks.virtual_tokens import ABSENT, FIRST_VALUES, IN_FILES, cycled_ids, is_encoder_decoder
from tunekit.adapters.folder.fields import ANY, TRAINED_VALUE, PeftSide
from tunekit.adapters.method import Method
from tunekit.contracts import Tensors, Tokenizer
from tunekit.errors import AdapterError, Problem, RecipeError
from tunekit.model.attention.earlier_keys import enter, keys_and_values
from tunekit.model.attention.self_attention import SelfAttention, decoder, self_attentions
from tunekit.model.call import calling, current_call
from tunekit.recipe.adapters.prefix import INIT_TEXT, PrefixSettings

# facts about the base in PEFT's configuration
SHAPES = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")


class FilePrefixSettings(PrefixSettings):
    """The settings of a folder, and the properties of the base that the folder states. These are later compared with
    the real base."""

    _facts: tuple[tuple[str, int], ...] = ()


class Prefix(ModelAdapter[PrefixSettings]):
    """Trained keys and values of all layers, in one tensor."""

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
        self._computed_prefix: Tensor | None = None
        # Recomputed layers use its result.
        before = decoder(net).register_forward_pre_hook(lambda *_: self._prepare())
        self.hooks = [before, *enter(net, self.places, self.settings.num_virtual_tokens, self.keys_values)]

    @property
    def projected(self) -> bool:
        """Whether the prefix is computed by a projection."""
        return "prefix" not in self.declared

    def _prepare(self) -> None:
        self._computed_prefix = self._compute() if self.projected and not current_call().bypassed else None

    def _compute(self) -> Tensor:
        """The prefix (P, L * 2 * H * D), in the form that files contain."""
        if not self.projected:
            return self.prefix
        return F.linear(torch.tanh(F.linear(self.embedding, self.inner, self.inner_bias)), self.outer, self.outer_bias)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, each (H, P, D).

        In an encoder-decoder, PEFT gives the entries of the prefix alternately to self-attention and cross-attention,
        and ignores the entries of cross-attention. So layer i uses entry 2 i (modulo the number of layers).
        """
        prefix = self._computed_prefix
        if prefix is None or (torch.is_grad_enabled() and not prefix.requires_grad):  # computed without a gradient
            prefix = self._compute()
        row = 2 * layer % len(self.places) if self.shared_rows else layer
        place = self.places[layer]
        rows = prefix.view(prefix.shape[0], len(self.places), 2, place.heads, place.width)[:, row]
        keys, values = rows.permute(1, 2, 0, 3)
        return keys, values

    def initialise(self, generator: torch.Generator) -> None:
        start = self.settings.first_values
        if start == "text":
            with torch.no_grad():
                self.prefix.copy_(self._from_text())
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
        """Initialise like torch's Embedding and two Linear layers."""
        nn.init.normal_(self.embedding, generator=generator)
        for weight, bias in ((self.inner, self.inner_bias), (self.outer, self.outer_bias)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def _from_text(self) -> Tensor:
        """The keys and values (P, L * 2 * H * D) that the base computes for the tokens of the text. The tokens are
        repeated or cut to P."""
        ids = self.settings.init_ids
        if ids is None:
            what = "the prefix's text has not been tokenized"
            raise AdapterError(what, "write init_ids", key="adapter.init")
        length = self.settings.num_virtual_tokens
        tokens = torch.tensor([cycled_ids(ids, length)])  # (1, P)
        with calling(replace(current_call(), bypassed=True)):
            pairs = keys_and_values(self.net, self.places, tokens)
        rows = [part.transpose(0, 1).reshape(length, -1) for pair in pairs for part in pair]  # (P, H * D) each
        return torch.cat(rows, dim=1)

    def file_tensors(self) -> Tensors:
        return {IN_FILES: self._compute().detach()}

    def file_fields(self) -> PeftConfig:
        facts = _facts(self.net, self.places)
        return {**facts, "encoder_hidden_size": self.settings.encoder_hidden_size or facts["token_dim"]}


def _facts(net: nn.Module, places: list[SelfAttention]) -> dict[str, int]:
    """Properties of the base that PEFT's configuration contains."""
    heads, width = places[0].heads, places[0].width
    return dict(zip(SHAPES, (heads * width, heads, len(places), 2 if is_encoder_decoder(net) else 1), strict=True))


def _compare(settings: PrefixSettings, net: nn.Module, places: list[SelfAttention]) -> None:
    """Raises: AdapterError with every property in the folder's configuration that does not match this base; RecipeError
    if the prefix cannot be initialised as requested."""
    facts = _facts(net, places)
    if isinstance(settings, FilePrefixSettings):
        wrong = [
            Problem(f"is {value}, but this base needs {facts[name]}", "name the right base with --base", key=name)
            for name, value in settings._facts
            if value != facts[name]
        ]
        if wrong:
            raise AdapterError.of(wrong)
    elif settings.first_values == "text" and is_encoder_decoder(net):
        what = (
            "an encoder-decoder's prefix cannot be initialised from a text, because two layers share a prefix in "
            "PEFT's format"
        )
        raise RecipeError(what, "write init: random", key="adapter.init")


def with_tokenizer(settings: PrefixSettings, tokenizer: Tokenizer) -> PrefixSettings:
    """Returns the settings with init_text encoded as token ids. If the tokenizer adds a begin token to texts, the ids
    start with this token."""
    if settings.first_values != "text" or settings.init_ids is not None:
        return settings
    ids = tokenizer.encode(settings.init_text or INIT_TEXT)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    # the begin token is not repeated with the text
    repeated_ids = ids * (settings.num_virtual_tokens // max(1, len(ids)) + 1)
    return settings.model_copy(update={"init_ids": tuple(begin + repeated_ids)[: settings.num_virtual_tokens]})


class PrefixSide(PeftSide[FilePrefixSettings]):
    """Converts to and from PEFT's fields. Some fields describe the base and are compared with the real base later."""

    def read(self, config: PeftConfig, file: str) -> FilePrefixSettings:
        """Returns the settings that correspond to PEFT's fields.

        Raises: AdapterError.
        """
        settings = super().read(config, file)
        facts = {name: config[name] for name in SHAPES if config.get(name) is not None}
        wrong = [name for name, value in facts.items() if type(value) is not int]
        if wrong:
            raise AdapterError.of(
                [Problem("must be a whole number", TRAINED_VALUE, file, None, name) for name in wrong]
            )
        settings._facts = tuple(facts.items())
        return settings


METHOD = Method(
    peft=PrefixSide(
        "PREFIX_TUNING",
        FilePrefixSettings,
        fields={"num_virtual_tokens": ("num_virtual_tokens", None)},
        # A file always contains a plain prefix, even if a projection computed it.
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
