"""Texts and llama.cpp: what its tokenizer puts around them, which tokens it reads otherwise, and texts that show it."""

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
    """What a tokenizer puts around a text: the first token, the last token, and a space in front of it and after each
    special token. `strips`: it removes spaces after tokens where llama.cpp can do so."""

    first: bool = False
    last: bool = False
    space: bool = False
    strips: bool = False


NOTHING = Around()


def around(exportable: Exportable) -> Around:
    """What the tokenizer of a text model puts around a text.

    A space only in front of a text counts unless conversations begin with an added token, after which there is none.
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
    """What llama.cpp reads as other tokens than the tokenizer, and no file can state."""
    tokenizer = _tokenizer(exportable)
    values = json.loads(tokenizer.backend.to_str())
    wrong = list(_misread(tokenizer, strips=strips_as_phi3(values)))
    if wrong:
        what = "it keeps the spaces around a token, and also finds a token inside a word"
        yield f"llama.cpp finds {wrong[0]!r} ({len(wrong)} such tokens) where the tokenizer does not: {what}"
    if space_scheme(values) == "first":
        if _opens(exportable):
            yield "the tokenizer puts a space in front of a text outside a conversation; llama.cpp needs it in the text"
        else:
            yield "llama.cpp puts a space also after each special token, where the tokenizer puts none"


def sample_texts(exportable: Exportable) -> list[str]:
    """Texts in which llama.cpp's tokens can differ: fixed ones, around added tokens, and a conversation."""
    tokenizer, conversation = _tokenizer(exportable), _conversation(exportable)
    around_tokens = [f"a {token} b{token}c\n{token}\nd" for token in _added(tokenizer)[:ADDED]]
    return [*TEXTS, *around_tokens, *([conversation] if conversation else [])]


def _misread(tokenizer: LoadedTokenizer, *, strips: bool) -> Iterator[str]:
    """The added tokens that llama.cpp finds in other places. `strips`: it removes the spaces after them."""
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
    """The added tokens, those first that are not special."""
    tokens = tokenizer.backend.get_added_tokens_decoder().values()
    return [token.content for token in sorted(tokens, key=lambda token: bool(token.special))]


def _conversation(exportable: Exportable) -> str:
    """A conversation in the chat template; empty without one, or if the template refuses it."""
    tokenizer, template = _tokenizer(exportable), exportable.target.chat_template
    if not (template or tokenizer.chat_template):
        return ""
    try:
        return tokenizer.render([*MESSAGES], template=template, add_generation_prompt=True)
    except TunekitError:
        return ""
