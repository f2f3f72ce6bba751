"""Prompt tuning, for any network with a token embedding."""

from torch import Generator, nn

from tunekit.adapters.base import Slots
from tunekit.adapters.blocks import virtual_tokens as prompts
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method
from tunekit.recipe.adapters.prompt import PromptSettings


class PromptTuning(prompts.VirtualTokens[PromptSettings]):
    """Prompt tuning: the prompt vectors are trained directly. In an encoder-decoder they come before the encoder's
    input.

    Shapes: (P, D). At the start they already change the output, because they come before each row. Source: Lester et
    al. 2021.
    """

    @classmethod
    def slots(cls, settings: PromptSettings, net: nn.Module) -> Slots:
        return cls.file_slots(settings, net)

    def initialise(self, generator: Generator) -> None:
        self.prompt.data.copy_(prompts.initial_vectors(self.net, self.settings, self.prompt.shape[0], generator))


METHOD = Method(
    peft=PeftSide("PROMPT_TUNING", PromptSettings, prompts.FIELDS, prompts.START_FIELDS, absent=prompts.ABSENT),
    model=PromptTuning,
    copy=prompts.ClassifierCopy,
    unbinding=prompts.FIRST_VALUES,
    with_tokenizer=prompts.with_text_ids,
)
