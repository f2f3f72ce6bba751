"""Prompt tuning, of any network with a token embedding."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot
from tunekit.adapters.blocks.virtual_tokens import (
    ABSENT,
    BASE_FIELDS,
    FIELDS,
    FIRST_VALUES,
    IN_FILES,
    START_FIELDS,
    ClassifierCopy,
    VirtualTokens,
    started,
    total_vectors,
    width_of,
    with_text_ids,
)
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.prompt import PromptSettings


class Prompt(VirtualTokens):
    """The vectors themselves are trained; of an encoder-decoder the encoder has them.

    Shapes: (P, D).    Starts away from the base: something stands before each row.    Source: Lester et al. 2021.
    """

    settings: PromptSettings
    prompt: nn.Parameter

    @classmethod
    def slots(cls, settings: PromptSettings, net: nn.Module) -> dict[str, Slot]:
        return {"prompt": Slot(IN_FILES, (total_vectors(settings, net), width_of(net)), decays=False)}

    @classmethod
    def file_slots(cls, settings: PromptSettings, net: nn.Module) -> dict[str, Slot]:
        return cls.slots(settings, net)

    def initialise(self, generator: Generator) -> None:
        self.prompt.data.copy_(started(self.net, self.settings, self.prompt.shape[0], generator))

    def vectors(self, tasks: Tensor | None) -> Tensor:
        return self.prompt

    def finished_state(self) -> Tensor:
        return self.prompt.detach()


METHOD = Method(
    peft=PeftSide("PROMPT_TUNING", PromptSettings, FIELDS, {**BASE_FIELDS, **START_FIELDS}, absent=ABSENT),
    model=Prompt,
    copy=ClassifierCopy,
    unbinding=FIRST_VALUES,
    with_tokenizer=with_text_ids,
)
