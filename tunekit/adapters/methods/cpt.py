"""Context-aware prompt tuning, for decoder-only networks."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import PeftConfig, Slot, Slots
from tunekit.adapters.blocks import virtual_tokens as prompts
from tunekit.adapters.folder.fields import ANY, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.contracts import Tokenizer
from tunekit.errors import AdapterError, RecipeError
from tunekit.files.untrusted import printable
from tunekit.machine.placing import to_device
from tunekit.recipe.adapters.cpt import SLOT, CptSettings

# types of an example's tokens: input template, input, output template, output; the next example's are 4 higher
TYPES = 4
INPUT, OUTPUT = 2, 0  # types modulo 4
SMALLEST = 1e-10  # PEFT's bound for vectors that must not change
HOW = "write adapter.examples as a list of {input: ..., output: ...}"
PAPER_WIDTH = 2048  # the hidden size for which the paper gives the bounds


class Cpt(prompts.VirtualTokens[CptSettings]):
    """P = E + projected(delta), with the base's embeddings E of the examples; |delta_i| <= epsilon_i.

    Shapes: P, E, delta (P, D); epsilon (P,). At the start it already changes the output, because the examples come
    before each row. The projection passes the gradient unchanged. Vectors that must not change get gradient 0.
    Source: Blau et al. 2024, algorithm 1.
    """

    delta: nn.Parameter
    context: Tensor

    @classmethod
    def slots(cls, settings: CptSettings, net: nn.Module) -> Slots:
        shape = (cls.vector_count(settings), prompts.width_of(net))
        return {
            "delta": Slot("delta_embedding.weight", shape, decays=False),
            "context": Slot("embedding.weight", shape, kind="resume"),
        }

    @classmethod
    def virtual_tokens(cls, settings: CptSettings) -> int:
        if settings.token_ids is None:
            raise AdapterError("the examples have not been tokenized", "write token_ids", key="adapter.examples")
        return len(settings.token_ids)

    def attach(self, net: nn.Module) -> None:
        super().attach(net)
        if prompts.is_encoder_decoder(net):
            raise RecipeError("cpt is only for decoder-only models, as in PEFT", "use prompt", key="adapter.method")

    def initialise(self, generator: Generator) -> None:
        super().initialise(generator)
        self.context.copy_(prompts.embeddings_of(self.net, self.settings.token_ids or ()))

    def bounds(self) -> Tensor:
        """The maximum norm of each vector's change: (P,) float32."""
        scale = math.sqrt(prompts.width_of(self.net) / PAPER_WIDTH)
        types = torch.tensor(self.settings.token_types)  # (P,)
        within = types.remainder(TYPES)
        bounds = torch.full(types.shape, self.settings.opt_projection_format_epsilon * scale)
        bounds = torch.where(within == INPUT, self.settings.opt_projection_epsilon * scale, bounds)
        return to_device(torch.where(within == OUTPUT, SMALLEST, bounds).clamp(min=SMALLEST), self.delta.device)

    def _shrink(self) -> Tensor:
        """The factor that scales each row of delta to a norm within its bound: (P, 1), without gradient."""
        bounds = self.bounds()
        return (bounds / torch.maximum(self.delta.detach().norm(dim=1), bounds))[:, None]

    def vectors(self, tasks: Tensor | None) -> Tensor:
        if self.from_folder:
            return self.prompt
        types = to_device(torch.tensor(self.settings.token_types), self.delta.device)
        moves = (types.remainder(TYPES) != OUTPUT)[:, None]  # (P, 1)
        delta = torch.where(moves, self.delta, self.delta.detach())
        return self.context + delta + (delta * (self._shrink() - 1)).detach()

    def after_step(self, step: int, total_steps: int) -> None:
        """Scale delta to its bounds, as PEFT does before each forward."""
        with torch.no_grad():
            self.delta.mul_(self._shrink())

    def file_fields(self) -> PeftConfig:
        ids, types = list(self.settings.token_ids or ()), list(self.settings.token_types or ())
        fields = {"cpt_token_ids": ids, "cpt_tokens_type_mask": types, "cpt_mask": [1] * len(ids)}
        return {**super().file_fields(), **fields, "num_virtual_tokens": len(ids), "num_transformer_submodules": 1}


def with_context_ids(settings: CptSettings, tokenizer: Tokenizer) -> CptSettings:
    """Returns the settings with the examples encoded as token ids, and with the type of each token."""
    if settings.token_ids is not None:
        return settings
    if not settings.examples:
        raise RecipeError("cpt puts examples before each row, but there are none", HOW, key="adapter.examples")
    pieces = [(tokenizer.encode(text), kind) for text, kind in _pieces(settings) if text]
    ids = tuple(token for tokens, _ in pieces for token in tokens)
    types = tuple(kind for tokens, kind in pieces for _ in tokens)
    return settings.model_copy(update={"token_ids": ids, "token_types": types})


def _pieces(settings: CptSettings) -> Iterator[tuple[str, int]]:
    """The texts of the examples in order. Each text comes with its type."""
    for number, example in enumerate(settings.examples):
        first = TYPES * number + 1
        for template, text, kind in (
            (settings.input_template, example.input, first),
            (settings.output_template, example.output, first + 2),
        ):
            before, _, after = template.partition(SLOT)
            yield from ((before, kind), (text, kind + 1), (after, kind))


class CptSide(PeftSide[CptSettings]):
    """Converts to and from PEFT's fields. PEFT's num_virtual_tokens is the length of token_ids."""

    def read(self, config: PeftConfig, file: str) -> CptSettings:
        """Returns the settings that correspond to PEFT's fields.

        Raises: AdapterError.
        """
        settings = super().read(config, file)
        count = config.get("num_virtual_tokens")
        if settings.token_ids is None:
            raise AdapterError("is missing", "add the token ids of the prompt", file=file, key="cpt_token_ids")
        if count is not None and count != len(settings.token_ids):
            what = f"is {printable(count)}, but there are {len(settings.token_ids)} cpt_token_ids"
            raise AdapterError(what, "make the two numbers equal", file=file, key="num_virtual_tokens")
        return settings


METHOD = Method(
    peft=CptSide(
        "CPT",
        CptSettings,
        {
            "cpt_token_ids": ("token_ids", None),
            "cpt_tokens_type_mask": ("token_types", None),
            **same_names(opt_projection_epsilon=0.1, opt_projection_format_epsilon=0.1),
        },
        {
            **prompts.BASE_FIELDS,
            "num_transformer_submodules": (1,),
            "num_virtual_tokens": (None, ANY),
            "cpt_mask": (None, ANY),  # PEFT never reads it
            "opt_weighted_loss_type": ("none", ANY),  # this and the next field are only for training
            "opt_loss_decay_factor": (1.0, ANY),
            "tokenizer_name_or_path": (None, ANY),
            "modules_to_save": (None, []),
        },
        absent=prompts.ABSENT,
    ),
    model=Cpt,
    with_tokenizer=with_context_ids,
)
