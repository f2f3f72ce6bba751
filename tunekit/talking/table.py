"""Answers the rows of a table. Each row may name its own adapter; all adapters have the same base. Rows with different
adapters are answered at the same time."""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from tunekit.adapters.folder.config import TEMPLATE_NAME
from tunekit.errors import AdapterConflict, InputError, Problem
from tunekit.talking.answer import Reply, Request
from tunekit.talking.conversation import Speaker


def answer_table(speaker: Speaker, requests: Sequence[Request], places: Sequence[Path | None], slots: int) -> list[str]:
    """Returns the answer to each prepared request. `places`: the folder of the adapter for each request; None: the
    speaker's default model.

    Each answer is the same as if only its adapter were loaded. Only adapters that are in use stay in memory, so a table
    may have hundreds. Some adapters cannot be in memory together; then a request waits until all running answers have
    ended.
    Raises: InputError before the first answer, if adapters do not fit the base or prompts are too long.
    """
    names = [speaker.default if place is None else str(place) for place in places]
    for name, place in {name: place for name, place in zip(names, places, strict=True) if place is not None}.items():
        speaker.adapters.register(name, place)
    speaker.adapters.keeps_idle = False
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, name in enumerate(names):
        rows[name].append(row)
    tokens = _check(speaker, requests, rows)
    waiting = deque(chain.from_iterable(rows.values()))  # the rows of an adapter follow each other
    replies: dict[int, Reply] = {}
    conflicts = False
    with speaker.answering(min(slots, len(requests)), tokens) as answers:
        while waiting or answers.is_busy:
            conflicts = conflicts and answers.is_busy
            while waiting and answers.free_slots and not conflicts:
                row, on_end = waiting[0], partial(replies.__setitem__, waiting[0])
                try:
                    answers.put(requests[row], names[row], lambda piece: True, on_end, speaker.target.tokenizer.decode)
                    waiting.popleft()
                except AdapterConflict:
                    if not answers.is_busy:
                        raise
                    conflicts = True
            answers.step()
    return [replies[row].text for row in range(len(requests))]


def _check(speaker: Speaker, requests: Sequence[Request], rows: Mapping[str, Sequence[int]]) -> int:
    """Load each adapter once, so that errors appear before hours of generation. Returns the maximum size of an answer's
    key-value cache, in tokens.

    Raises: InputError with all problems: adapters that do not fit the base or have their own chat template, and prompts
    that are too long.
    """
    problems, tokens = list[Problem](), 0
    for name, numbers in rows.items():
        if name != speaker.default and (Path(name) / TEMPLATE_NAME).exists():
            what = "has its own chat template, but all rows are encoded with the same template"
            problems.append(Problem(what, "answer the rows of this adapter separately", name))
        try:
            speaker.adapters.load(name)
            for number in numbers:
                tokens = max(tokens, speaker.continuation(requests[number], name).columns)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError.of(problems)
    return tokens
