"""Regular expressions over module names, with a bound on the work: a hostile pattern is refused, it never hangs.

Comes in: a pattern and module names.  Goes out: whether the whole name matches, as re.fullmatch would say.
Next: targets.py.  Python's own matcher, which peft and others run on the same patterns, backtracks without a limit.
This one carries the positions that each part of the pattern can reach, with the number of ways to reach them: that
takes little time itself, and tells how long a backtracking matcher would take, which is what is limited.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tunekit.errors import AdapterError, InputError

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

MAX_PATTERN_CHARACTERS = 100_000
MAX_STEPS = 100_000  # for one pattern against one name; an everyday pattern takes a few hundred
MAX_STEPS_TOGETHER = 20_000_000  # for all patterns of one adapter against all names: a few seconds
REFUSED_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.LOCALE | re.ASCII
SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
Ways = dict[int, int]  # position -> in how many ways a backtracking matcher would come there
CLASSES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda character: character.isalnum() or character == "_",
}


@dataclass
class Budget:
    """Steps that the patterns of one adapter have taken together, the patterns already parsed, and where they stand."""

    steps: int = 0
    error: type[InputError] = AdapterError
    file: str | None = None
    key: str | None = None
    parsed: dict[str, Pattern] = field(default_factory=dict)

    def pattern(self, text: str) -> Pattern:
        """The pattern of `text`, parsed once, counted here."""
        if text not in self.parsed:
            self.parsed[text] = Pattern(text, self)
        return self.parsed[text]


class Pattern:
    """One compiled pattern. `matches` asks for the whole name, `matches_ending` for the name from any dot on.

    Raises: the budget's error where the pattern is not a regular expression, uses what is not offered (back
    references, flags, atomic groups), or needs too many steps.
    """

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self.text = text
        self.budget = budget or Budget()
        self.shown = text if len(text) <= 80 else text[:77] + "..."
        if len(text) > MAX_PATTERN_CHARACTERS:
            raise self._error(f"is longer than {MAX_PATTERN_CHARACTERS} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # FutureWarning about nested sets; the meaning is today's
                self.parsed = parser.parse(text)
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise self._error(f"is not a regular expression ({type(error).__name__}: {error})") from error
        if self.parsed.state.flags & REFUSED_FLAGS:
            raise self._error("sets flags such as (?i)")
        self.steps = 0

    def _error(self, why: str) -> InputError:
        budget, mend = self.budget, "use a simpler pattern, or list the module names"
        return budget.error(f"the pattern '{self.shown}' {why}", mend, file=budget.file, key=budget.key)

    def matches(self, name: str) -> bool:
        """re.fullmatch(pattern, name)."""
        return self._reaches_end(name, [0])

    def matches_ending(self, name: str) -> bool:
        """re.match(rf"(.*\\.)?({pattern})$", name): how rank and alpha patterns match in PEFT."""
        return self._reaches_end(name, [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")])

    def _reaches_end(self, name: str, starts: Iterable[int]) -> bool:
        self.steps = 0
        try:
            return len(name) in self._sequence(self.parsed, name, dict.fromkeys(starts, 1))
        except RecursionError as error:
            raise self._error("is nested too deeply") from error
        finally:
            self.budget.steps += self.steps

    def _spend(self, steps: int, name: str) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS or self.budget.steps + self.steps > MAX_STEPS_TOGETHER:
            raise self._error(f"takes too many steps to compare with the name '{name}'")

    def _sequence(self, items: Iterable[Any], name: str, starts: Ways) -> Ways:
        """Where the items, one after the other, can end when they begin at `starts`, and in how many ways."""
        for code, argument in items:
            if not starts:
                return starts
            self._spend(sum(starts.values()), name)
            starts = self._item(str(code), argument, name, starts)
        return starts

    def _item(self, code: str, argument: Any, name: str, starts: Ways) -> Ways:
        if code in SINGLE:
            accepts = _single(code, argument)
            return {i + 1: ways for i, ways in starts.items() if i < len(name) and accepts(name[i])}
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, items = argument
            if len(items) == 1 and str(items[0][0]) in SINGLE:
                return self._run(least, int(most), _single(str(items[0][0]), items[0][1]), name, starts)
            return self._repeat(least, int(most), items, name, starts)
        if code == "SUBPATTERN":
            _, added, removed, items = argument
            if added or removed:
                raise self._error("sets flags inside a group")
            return self._sequence(items, name, starts)
        if code == "BRANCH":
            return _together(self._sequence(items, name, starts) for items in argument[1])
        if code == "AT":
            return {i: ways for i, ways in starts.items() if self._holds(str(argument), name, i)}
        if code in ("ASSERT", "ASSERT_NOT"):
            direction, items = argument
            wanted = code == "ASSERT"
            return {i: ways for i, ways in starts.items() if self._looks(direction, items, name, i, ways) == wanted}
        raise self._error("uses back references, conditions or atomic groups")

    def _run(self, least: int, most: int, accepts: Callable[[str], bool], name: str, starts: Ways) -> Ways:
        """A repeated single character."""
        reached: Ways = {}
        for start, ways in starts.items():
            end = start
            while end < len(name) and end - start < most and accepts(name[end]):
                end += 1
            self._spend(ways * (end - start), name)
            for position in range(start + least, end + 1):
                reached[position] = reached.get(position, 0) + ways
        return reached

    def _repeat(self, least: int, most: int, items: Any, name: str, starts: Ways) -> Ways:
        """A repeated group. Rounds that match nothing are not counted, but any number of them can fill up `least`."""
        reached: Ways = dict(starts) if least == 0 else {}
        current = {(start, False): ways for start, ways in starts.items()}  # position, whether an empty round was seen
        for done in range(min(most, len(name) + 1)):
            following: dict[tuple[int, bool], int] = {}
            for (start, free), ways in current.items():
                ends = self._sequence(items, name, {start: ways})
                if start in ends and not free:
                    free = True
                    if done < least:
                        reached[start] = reached.get(start, 0) + ways
                for end, more in ends.items():
                    if end > start:
                        following[end, free] = following.get((end, free), 0) + more
            current = following
            for (end, free), ways in current.items():
                if done + 1 >= least or free:
                    reached[end] = reached.get(end, 0) + ways
            if not current:
                break
        return reached

    def _holds(self, place: str, name: str, position: int) -> bool:
        if place in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return position == 0
        if place == "AT_END_STRING":
            return position == len(name)
        if place == "AT_END":
            return position == len(name) or name[position:] == "\n"
        word = CLASSES["CATEGORY_WORD"]
        before = position > 0 and word(name[position - 1])
        after = position < len(name) and word(name[position])
        return (before != after) == (place == "AT_BOUNDARY")

    def _looks(self, direction: int, items: Any, name: str, position: int, ways: int) -> bool:
        if direction > 0:
            return bool(self._sequence(items, name, {position: ways}))
        return any(position in self._sequence(items, name, {start: ways}) for start in range(position + 1))


def _together(many: Iterable[Ways]) -> Ways:
    found: Ways = {}
    for ways in many:
        for position, number in ways.items():
            found[position] = found.get(position, 0) + number
    return found


def _single(code: str, argument: Any) -> Callable[[str], bool]:
    """The test of one character for a literal, a dot or a set."""
    if code == "LITERAL":
        return lambda character: ord(character) == argument
    if code == "NOT_LITERAL":
        return lambda character: ord(character) != argument
    if code == "ANY":
        return lambda character: character != "\n"
    return lambda character: _in_set(argument, character)


def _in_set(items: Any, character: str) -> bool:
    negated, found = False, False
    for code, argument in items:
        kind = str(code)
        if kind == "NEGATE":
            negated = True
        elif kind == "LITERAL":
            found |= ord(character) == argument
        elif kind == "RANGE":
            found |= argument[0] <= ord(character) <= argument[1]
        else:
            category = str(argument)
            positive = category.replace("_NOT_", "_")
            found |= CLASSES[positive](character) == (positive == category)
    return found != negated
