"""Replaces the placeholder of each image in a rendered conversation by the text that the model's processor writes for
this image."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tunekit.data.rendering.turns import Conversation, TurnSpan
from tunekit.errors import DataError


@dataclass(frozen=True)
class ImageTexts:
    """The texts of a conversation's images. `placeholder`: the text that the chat template writes for an image.
    `expansions`: the text that replaces it, for each image."""

    placeholder: str
    expansions: Sequence[str]


def expanded(
    conversation: Conversation, images: ImageTexts, around: tuple[str, str]
) -> tuple[Conversation, list[TurnSpan]]:
    """The conversation with all placeholders replaced, and the characters of each image: its expansion, and the texts
    `around` it that the template writes with the placeholder. A placeholder that the data spells is not replaced: it
    stays text.

    Raises: DataError if the template has not written one placeholder for each image.
    """
    matches = list(re.finditer(re.escape(images.placeholder), conversation.neutral))
    if len(matches) != len(images.expansions):
        what = (
            f"the chat template writes {len(matches)} placeholders ({images.placeholder}) for "
            f"{len(images.expansions)} images"
        )
        raise DataError(what, "name a template in data.chat_template that writes one for each image")
    growth = [len(text) - len(images.placeholder) for text in images.expansions]
    before, ends = [0, *accumulate(growth)], [match.end() for match in matches]

    def replaced(text: str) -> str:
        starts = [match.start() for match in matches]
        pieces = [text[stop:start] for stop, start in zip([0, *ends], [*starts, len(text)], strict=True)]
        return "".join(part for pair in zip(pieces, [*images.expansions, ""], strict=True) for part in pair)

    def moved(span: TurnSpan) -> TurnSpan:
        return TurnSpan(*(place + before[bisect_right(ends, place)] for place in (span.start, span.end)))

    first, last = around
    places = list[TurnSpan]()
    for match, shift, text in zip(matches, before, images.expansions, strict=False):
        start, stop = match.start() + shift, match.start() + shift + len(text)
        start -= len(first) * conversation.neutral.endswith(first, 0, match.start())
        places.append(TurnSpan(start, stop + len(last) * conversation.neutral.startswith(last, match.end())))
    changed = replace(
        conversation,
        text=replaced(conversation.text),
        neutral=replaced(conversation.neutral),
        spans=tuple(map(moved, conversation.spans)),
        reasoning=tuple(map(moved, conversation.reasoning)),
    )
    return changed, places
