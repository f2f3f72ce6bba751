"""A chat template, and properties derived from it: the tokens that end an answer, and the form of tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tunekit.model.load import LoadedModel
from tunekit.model.text.generation import find_stop_ids
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.talking.grammar import Grammars
from tunekit.talking.tools import ToolFormat, find_tool_format, reads_tools


@dataclass
class ChatTemplate:
    """A chat template and its tokenizer. `text`: None for the tokenizer's own template; `stop_ids`: the tokens that end
    an answer."""

    tokenizer: LoadedTokenizer
    text: str | None
    stop_ids: frozenset[int]
    vocabulary_size: int

    @property
    def reads_tools(self) -> bool:
        """Whether the template puts definitions of tools into the prompt."""
        return reads_tools(self.text or self.tokenizer.chat_template)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """The format of the template's tool calls; None if it does not write them as JSON."""
        return find_tool_format(self.tokenizer, self.text)

    @cached_property
    def grammars(self) -> Grammars:
        """Makes functions that restrict answers to a JSON schema."""
        return Grammars(self.tokenizer, self.vocabulary_size, self.stop_ids)


def make_template(model: LoadedModel, tokenizer: LoadedTokenizer, text: str | None) -> ChatTemplate:
    """A ChatTemplate for a loaded model. `text`: None for the tokenizer's own template."""
    assert model.text is not None  # make_speaker checked it
    stop_ids = frozenset(find_stop_ids(model, tokenizer, text))
    return ChatTemplate(tokenizer, text, stop_ids, model.text.vocabulary_size)
