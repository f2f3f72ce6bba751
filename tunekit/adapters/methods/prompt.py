"""Prompt tuning, of any network with a token embedding."""

from __future__ import annotations

from torch import Generator, nn

from tunekit.adapters.base import Slot
from tunekit.adapters.blocks.virtual_tokens import (
    ABSENT,
    FIELDS,
    FIRST_VALUES,
    START_FIELDS,
    ClassifierCopy,
    VirtualTokens,
    started,
    with_text_ids,
)
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.prompt import PromptSettings


class PromptTuning(VirtualTokens[PromptSettings]):
    """The vectors themselves are trained; of an encoder-decoder the encoder has them.

    Shapes: (P, D).    Starts away from the base: something stands before each row.    Source: Lester et al. 2021.
    """

    @classmethod
    def slots(cls, settings: PromptSettings, net: nn.Module) -> dict[str, Slot]:
        return cls.file_slots(settings, net)

    def initialise(self, generator: Generator) -> None:
        self.prompt.data.copy_(started(self.net, self.settings, self.prompt.shape[0], generator))


METHOD = Method(
    peft=PeftSide("PROMPT_TUNING", PromptSettings, FIELDS, START_FIELDS, absent=ABSENT),
    model=PromptTuning,
    copy=ClassifierCopy,
    unbinding=FIRST_VALUES,
    with_tokenizer=with_text_ids,
)
