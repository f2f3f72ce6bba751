"""Answers to the rows of a table that name adapters of one base. Rows of different adapters are answered at once."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tunekit.adapters.folder.config import read_adapter_config
from tunekit.talking.answer import Reply, Request
from tunekit.talking.conversation import Speaker


def answer_table(speaker: Speaker, requests: Sequence[Request], places: Sequence[Path | None], slots: int) -> list[str]:
    """The answer to each prepared request, with the adapter in its folder (None: the speaker's own), as if it were
    alone. Only adapters that are answering stay in memory, so there may be hundreds.

    Raises: AdapterError if an adapter does not fit the base; DataError for a prompt that is too long.
    """
    names = [speaker.default if place is None else str(place) for place in places]
    for name, place in {name: place for name, place in zip(names, places, strict=True) if place is not None}.items():
        speaker.adapters.register(name, place)
    speaker.adapters.limit_bytes = 0
    virtual = {place: _virtual_tokens(place) for place in {*places}}
    tokens = max(
        virtual[place] + len(request.prompt) + request.max_new_tokens
        for request, place in zip(requests, places, strict=True)
    )
    first = {name: row for row, name in reversed(list(enumerate(names)))}
    waiting = deque(sorted(range(len(names)), key=lambda row: first[names[row]]))  # each adapter is loaded once
    replies: dict[int, Reply] = {}
    with speaker.answering(min(slots, len(requests)), tokens) as answers:
        while waiting or answers.is_busy:
            while waiting and answers.free_slots:
                row = waiting.popleft()
                answers.put(requests[row], names[row], lambda piece: True, partial(replies.__setitem__, row))
            answers.step()
    return [replies[row].text for row in range(len(requests))]


def _virtual_tokens(place: Path | None) -> int:
    """The number of positions that the adapter puts before a prompt."""
    config = None if place is None else read_adapter_config(place)
    return 0 if config is None or config.method.model is None else config.method.model.virtual_tokens(config.settings)
