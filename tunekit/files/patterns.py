"""Compiles regular expressions that may be hostile: so large or so slow that they would stop the process."""

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache

import regex

MAX_PATTERN_CHARACTERS = 100_000
MAX_GROUPS = 100  # nested groups in a pattern
MAX_COPIES = 1000  # copies of a part after expansion of counted repeats
MAX_WRITTEN_OUT = 100_000  # parts of an expression after expansion of its counted repeats, as the matcher stores it
MAX_OPEN_REPEATS, MAX_OPEN_DEPTH = 16, 2  # open repeats in a pattern, and their depth of nesting
PATTERN_PIECE = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<group>\((?:\?(?:P<\w+>|<[=!]|[:=!]))?)|(?P<close>\))"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\})[?+]?)|(?P<between>\|)|(?P<one>\\.|.)",
    re.DOTALL,
)


Match = regex.Match[str]


@lru_cache(maxsize=1024)
def compile_pattern(text: str, template: str = "{}") -> regex.Pattern[str]:
    """Insert a regular expression with Python's syntax and meaning into `template`, and compile it with the package
    `regex`.

    A pattern is refused if its structure allows exponential time:

    - open repeats (*, + and {n,}) that are nested more than two deep, or more than 16 open repeats
    - counted repeats that expand a part more than 1000 times, or groups nested more than 100 deep
    - back references, flags, conditions and atomic groups
    - syntax that only `regex` knows: fuzzy counts such as {e<=1}, and POSIX classes

    The matcher remembers where a repeat has failed, so almost no other pattern is slow. Callers also set a timeout.
    The timeout counts processor seconds of this process, so it does not depend on the load of the machine.
    Raises: ValueError with the reason for a refusal.
    """
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"is longer than {MAX_PATTERN_CHARACTERS} characters")
    _refuse_costly(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a FutureWarning about nested sets, whose present meaning is correct here
            re.compile(text)
        return regex.compile(template.format(text), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"is not a regular expression ({type(error).__name__}: {error})") from error


@dataclass
class _Repeats:
    """Counts for a part of a pattern: its open repeats, their nesting depth, and its copies after counted repeats are
    expanded."""

    count: int = 0
    depth: int = 0
    copies: int = 1

    def repeat(self, quantifier: str) -> None:
        """Add a quantifier: *, +, ?, {n}, {n,} or {n,m}."""
        numbers = [int(number) for number in re.findall(r"\d+", quantifier)]
        self.copies *= max([1, *numbers])
        if quantifier[0] in "*+" or quantifier.rstrip("?+").endswith(",}"):
            self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > MAX_OPEN_REPEATS or self.depth > MAX_OPEN_DEPTH or self.copies > MAX_COPIES:
            raise ValueError("can take too many steps, because it has too many repeats, or repeats inside repeats")


def _refuse_costly(text: str) -> None:
    """Refuse a pattern whose structure allows exponential time.

    Raises: ValueError. Invalid expressions are not refused here: the compiler refuses them.
    """
    parts = [[_Repeats()]]  # for each open group, its parts so far; a quantifier repeats the last part
    for piece in PATTERN_PIECE.finditer(text):
        kind, token = piece.lastgroup, piece.group()
        if kind == "group":
            parts.append([_Repeats()])
            if len(parts) > MAX_GROUPS:
                raise ValueError("is nested too deeply")
            if token == "(" and text.startswith("?", piece.end()):
                raise ValueError("sets flags such as (?i), or uses conditions or atomic groups")
        elif kind == "close" and len(parts) > 1:
            inner = parts.pop()
            count, depth = sum(part.count for part in inner), max(part.depth for part in inner)
            parts[-1].append(_Repeats(count, depth, max(part.copies for part in inner)))
        elif kind == "repeat":
            parts[-1][-1].repeat(token)
        elif token == "{" or (kind == "set" and "[:" in token):
            raise ValueError("has a brace that is not a count, or a bracket in a set: write \\ before it")
        elif re.fullmatch(r"\\[1-9]", token):
            raise ValueError("uses back references")
        else:
            parts[-1].append(_Repeats())
    if sum(part.count for group in parts for part in group) > MAX_OPEN_REPEATS:
        raise ValueError("can take too many steps, because it has too many repeats")


def compile_expression(text: str) -> regex.Pattern[str]:
    """Compile an expression with Python's syntax and meaning, for searching a model's output with a timeout.

    Everything that `re` compiles is allowed, since the timeout ends slow searches; only the size is limited.
    Raises: ValueError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)
            return regex.compile(_without_extensions(text), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression ({type(error).__name__}: {error})") from error


def _without_extensions(text: str) -> str:
    """The same expression with a backslash before syntax that only `regex` knows: fuzzy counts and POSIX classes.

    Raises: ValueError if its counted repeats expand to too many parts.
    """
    pieces, sizes = list[str](), [[0]]  # for each open group, the sizes of its parts
    for piece in PATTERN_PIECE.finditer(text):
        kind, token = piece.lastgroup, piece.group()
        if kind == "group":
            sizes.append([0])
        elif kind == "close" and len(sizes) > 1:
            inner = sum(sizes.pop())
            sizes[-1].append(inner + 1)
        elif kind == "repeat":
            sizes[-1][-1] *= max([1, *map(int, re.findall(r"\d+", token))])
        else:
            sizes[-1].append(1)
        if token == "{":
            token = r"\{"
        elif kind == "set":
            token = "[" + re.sub(
                r"(?s)\\.|\[(?=:)", lambda found: found[0].replace("[", r"\[", found[0] == "["), token[1:]
            )
        pieces.append(token)
    if sum(map(sum, sizes)) > MAX_WRITTEN_OUT:
        raise ValueError(f"has more than {MAX_WRITTEN_OUT:,} parts after expansion of its counted repeats")
    return "".join(pieces)
