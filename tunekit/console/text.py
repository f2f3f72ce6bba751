"""Makes text safe to print on a terminal, and formats values and durations."""

import json
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
REORDERING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # Unicode's bidi controls
CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}
CONTROL |= {code: f"\\u{code:04x}" for code in (*REORDERING, 0x2028, 0x2029)}
WHOLE = re.compile(  # a wrapped line must not break a command or a quoted text, which the user copies
    r"`[^`\n]*`|tunekit (?:(?:adapter|data|reward|runs) )?[a-z]+(?: (?:'[^'\n]*'|[^\s']+)"
    r"(?: --?[a-z-]+(?: [^-\s]\S*)?| [\w.]+=\S+| ~[\w.]+| \S*/\S+)*)?"
)
JSON_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *REORDERING, 0x2028, 0x2029)}


def visible(text: str) -> str:
    """The text with control characters replaced by escapes. So text from data can neither control the terminal nor
    reorder letters on it."""
    return text.translate(CONTROL)


def json_line(value: object) -> str:
    """A value as JSON on one line. Characters that control a terminal or end a line are escaped; all others are
    unchanged."""
    return json.dumps(value, ensure_ascii=False).translate(JSON_ESCAPES)


def cell_text(value: object) -> str:
    """A value as text for a table cell: integers have thousands separators, fractions have four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def wrapped(text: str, columns: int, indent: str = "  ") -> str:
    """The text, with each line that is longer than `columns` broken between words. `indent`: of the continued lines.
    Words, commands and texts between backticks stay whole, also if they are longer than a line."""
    wrap = textwrap.TextWrapper(columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    joined = WHOLE.sub(lambda match: match[0].replace(" ", "\0"), text)
    lines = (wrap.fill(line) if len(line) > columns else line for line in joined.split("\n"))
    return "\n".join(lines).replace("\0", " ")


class Flow:
    """Wraps text that arrives in pieces. `columns`: the maximum width; None: no limit. The last word is held back until
    it is complete. At the start of a line it is written at once."""

    def __init__(self, columns: int | None) -> None:
        self.columns, self.at, self.word = columns, 0, ""
        self.is_inside = False  # whether the beginning of an incomplete word is written

    def add(self, text: str) -> str:
        """Add a piece of text. Returns the text that can be written now."""
        if self.columns is None:
            return text
        *words, self.word = re.split(r"(?<=\s)", self.word + text)
        written = "".join(map(self._place_word, words))
        if self.word and (self.is_inside or not self.at):
            written += self.end()
            self.is_inside = True
        return written

    def end(self) -> str:
        """The last word."""
        word, self.word = self.word, ""
        return self._place_word(word)

    def _place_word(self, word: str) -> str:
        """A word with the white space after it. If it does not fit, a line break comes first."""
        fits = self.columns is None or self.at + len(word.rstrip()) <= self.columns
        broken = self.at > 0 and not fits and not self.is_inside
        self.at = 0 if word.endswith("\n") else len(word) + (0 if broken else self.at)
        self.is_inside = False
        return f"\n{word}" if broken else word


def curve_text(values: Sequence[float], columns: int) -> str:
    """The values as one line of text bars. Each bar is the mean of equally many consecutive values."""
    means = means_of(values, columns)
    low, span = min(means, default=0.0), (max(means, default=0.0) - min(means, default=0.0)) or 1.0
    return "".join(BARS[min(int((mean - low) / span * len(BARS)), len(BARS) - 1)] for mean in means)


def means_of(values: Sequence[float], count: int) -> list[float]:
    """At most `count` means of consecutive values. Each mean is over about equally many values."""
    count = min(count, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)] if count else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def time_text(seconds: float) -> str:
    """A duration for a person: 75 -> "1m15s"."""
    total = max(round(seconds), 0)
    hours, minutes, remainder = total // 3600, total % 3600 // 60, total % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{remainder:02d}s" if minutes else f"{remainder}s"
