"""Encodes text so that only the chat template makes control tokens. A control token spelled in data stays text."""

import re
from collections.abc import Mapping, Sequence

from tunekit.contracts import Tokenizer
from tunekit.errors import DataError

PLACEHOLDER = "\ue000"  # a private-use character, which no special token contains


class ControlTokens:
    """The special tokens of a tokenizer, and a search for texts that spell a special token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = frozenset(tokenizer.special_ids)
        texts = sorted((tokenizer.decode([token_id]) for token_id in self.ids), key=lambda text: (-len(text), text))
        spelled = [re.escape(text) for text in texts if text.strip()]
        self._pattern = re.compile("|".join(spelled)) if spelled else None

    def spelled_in(self, value: object) -> bool:
        """Whether a text in `value` spells a control token."""
        return self._pattern is not None and self.neutralized(value) != value

    def without_last(self, text: str) -> str:
        """`text`, with a control token at its end removed."""
        return text if self._pattern is None else re.sub(rf"(?:{self._pattern.pattern})\Z", "", text)

    def neutral_fields(self, values: Mapping[str, object]) -> dict[str, object]:
        """The fields of an object, with `neutralized` values."""
        return {str(self.neutralized(key)): self.neutralized(part) for key, part in values.items()}

    def neutralized(self, value: object) -> object:
        """`value` with every character of a spelled control token replaced by a placeholder."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda match: PLACEHOLDER * len(match.group()), value)
        if isinstance(value, Mapping):
            return {self.neutralized(key): self.neutralized(part) for key, part in value.items()}
        if isinstance(value, Sequence):
            return [self.neutralized(part) for part in value]
        return value


def encode_trusted(
    text: str, neutral: str, tokenizer: Tokenizer, control: ControlTokens
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of `text`. Only the control tokens that are also in `neutral` are encoded as control tokens.

    `neutral`: the text, with placeholders where the data spells control tokens.
    Raises: DataError if the template rewrote text that spells a control token, so that the texts cannot be compared.
    """
    if neutral == text:
        return tokenizer.encode_with_offsets(text)
    pairs = zip(text, neutral, strict=False)
    if len(neutral) != len(text) or any(blotted not in (own, PLACEHOLDER) for own, blotted in pairs):
        what = "the row spells a special token of the tokenizer, and the chat template rewrites it"
        raise DataError(what, "remove that text from the row")
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []

    def add_plain(start: int, stop: int) -> None:
        if start < stop:
            more, places = tokenizer.encode_with_offsets(text[start:stop], special_tokens_in_text=False)
            ids.extend(more)
            offsets.extend((start + first, start + last) for first, last in places)

    position = 0
    for token_id, (start, stop) in zip(*tokenizer.encode_with_offsets(neutral), strict=True):
        if token_id in control.ids:
            add_plain(position, start)
            ids.append(token_id)
            offsets.append((start, stop))
            position = stop
    add_plain(position, len(text))
    return ids, offsets
