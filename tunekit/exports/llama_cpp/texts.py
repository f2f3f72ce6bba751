"""Differences between llama.cpp's tokenizer and the model's: spaces, added tokens, and texts that show the
differences."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from tunekit.errors import TunekitError
from tunekit.exports.llama_cpp.vocabulary import space_scheme, strips_as_phi3
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.targets.exportable import Exportable

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces, 1234567 digits, and\n\n\ttabs; naïve café 你好 🚀",
    "def add(first, second):\n    return first + second\n",
    "She asks: 'I've been there, and WE'LL go?' ",
)
ADDED = 6  # added tokens in the compared texts
MESSAGES = ({"role": "user", "content": "Hello, who are you?"},)


class Around(NamedTuple):
    """The tokens and spaces that a tokenizer adds around a text: a first token, a last token, and a space before the
    text and after each special token. `strips`: whether it removes the spaces after added tokens, and
    llama.cpp can do the same."""

    first: bool = False
    last: bool = False
    space: bool = False
    strips: bool = False


NOTHING = Around()


def around(exportable: Exportable) -> Around:
    """The first token, last token and spaces that the tokenizer of a text model adds around a text.

    Some tokenizers add a space only at the start of a text, and none if the text starts with an added token. Then
    `space` is false if conversations start with an added token.
    """
    tokenizer = _tokenizer(exportable)
    ids, values = tokenizer.encode_source("a"), json.loads(tokenizer.backend.to_str())
    last, scheme = tokenizer.eos_id is not None and ids[-1:] == [tokenizer.eos_id], space_scheme(values)
    space = scheme == "always" or (scheme == "first" and not _opens(exportable))
    return Around(tokenizer.adds_bos, last, space, strips_as_phi3(values))


def _opens(exportable: Exportable) -> bool:
    """Whether conversations begin with an added token."""
    return _conversation(exportable).startswith(tuple(_added(_tokenizer(exportable))))


def token_notes(exportable: Exportable) -> Iterator[str]:
    """Notes on tokens that llama.cpp reads differently from the tokenizer, if metadata in a GGUF file cannot correct
    this."""
    tokenizer = _tokenizer(exportable)
    values = json.loads(tokenizer.backend.to_str())
    wrong = list(_misread(tokenizer, strips=strips_as_phi3(values)))
    if wrong:
        what = "llama.cpp keeps the spaces around the token, and also finds the token inside words"
        yield f"llama.cpp reads {wrong[0]!r} ({len(wrong)} such tokens) differently from the tokenizer: {what}"
    if space_scheme(values) == "first":
        if _opens(exportable):
            what = "outside a conversation, the tokenizer puts a space in front of a text, and llama.cpp does not"
            yield f"{what}: write the space into the text"
        else:
            yield "llama.cpp puts a space after each special token, and the tokenizer does not"


def sample_texts(exportable: Exportable) -> list[str]:
    """Texts for which llama.cpp's token ids can differ: fixed texts, texts with added tokens, and a conversation."""
    tokenizer, conversation = _tokenizer(exportable), _conversation(exportable)
    around_tokens = [f"a {token} b{token}c\n{token}\nd" for token in _added(tokenizer)[:ADDED]]
    return [*TEXTS, *around_tokens, *([conversation] if conversation else [])]


def _misread(tokenizer: LoadedTokenizer, *, strips: bool) -> Iterator[str]:
    """The added tokens that llama.cpp finds at other places of a text than the tokenizer. `strips`: whether llama.cpp
    removes the spaces after added tokens."""
    normalizer = tokenizer.backend.normalizer
    for token in tokenizer.backend.get_added_tokens_decoder().values():
        changed = token.normalized and normalizer and normalizer.normalize_str(token.content) != token.content
        if token.single_word or changed or ((token.lstrip or token.rstrip) and not strips):
            yield token.content


def _tokenizer(exportable: Exportable) -> LoadedTokenizer:
    tokenizer = exportable.processor.tokenizer
    assert isinstance(tokenizer, LoadedTokenizer)  # the formats take text models
    return tokenizer


def _added(tokenizer: LoadedTokenizer) -> list[str]:
    """The texts of the added tokens. Special tokens come last."""
    tokens = tokenizer.backend.get_added_tokens_decoder().values()
    return [token.content for token in sorted(tokens, key=lambda token: bool(token.special))]


def _conversation(exportable: Exportable) -> str:
    """A conversation in the chat template; empty if there is no template, or if it refuses the conversation."""
    tokenizer, template = _tokenizer(exportable), exportable.target.chat_template
    if not (template or tokenizer.chat_template):
        return ""
    try:
        return tokenizer.render([*MESSAGES], template=template, add_generation_prompt=True)
    except TunekitError:
        return ""
