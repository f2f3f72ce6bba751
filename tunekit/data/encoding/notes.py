"""Notes for the user about a source: its format, remarks on its rows, and the dropped rows.

Notes that begin with "warning: " need attention.
"""

from collections.abc import Container, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from tunekit.data.encoding.encode import NO_TARGET_LEFT, TOO_LONG, SourceCounts
from tunekit.data.reading.first import NAMED, read_columns
from tunekit.recipe.data import Source
from tunekit.recipe.reading.names import facts_of

WARNING = "warning: "
MANY_DROPPED = 0.05  # share of a source's rows
NEARLY = 0.85  # minimum similarity of a column's name to a field that it may misspell


def format_note(
    name: str, format_name: str, reason: str, columns: Sequence[str], caller_columns: Container[str] = ()
) -> str:
    """A note with the source's format and its unread columns; a warning if an unread column is perhaps a misspelled
    field.

    `reason`: why the source has this format. `caller_columns`: columns that the caller reads.
    """
    facts = facts_of("formats", format_name)
    known = read_columns(format_name, columns)
    others = [column for column in columns if column not in known and column not in caller_columns]
    unread = ", ".join(f"'{column}'" for column in others)
    note = f"{name}: format {format_name} ({reason})" + (f", which does not read {unread}" if unread else "")
    absent = [field for field in facts.FIELDS if field not in columns]
    for column in others:
        for meant in get_close_matches(column, absent, n=1, cutoff=NEARLY):
            return f"{WARNING}{note}; did you mean '{meant}' by '{column}'?"
    if not unread or format_name != "text" or reason == NAMED:
        return note
    return f"warning: {note}; map columns to the fields of a format with `columns`, or confirm with format: text"


def filled_columns(values: Mapping[str, Any]) -> list[str]:
    """The columns of a row that are not None."""
    return [name for name, value in values.items() if value is not None]


def drawn_notes(name: str, source: Source) -> list[str]:
    """A note that says which rows max_rows selects from a source; empty without max_rows."""
    if source.max_rows is None:
        return []
    if source.draw_seed is None:
        return [f"{name}: only its first {source.max_rows:,} rows are read (max_rows, draw_seed: null)"]
    how = "draw_seed: null takes the first rows"
    return [f"{name}: {source.max_rows:,} rows, drawn from all rows (max_rows, draw_seed: {source.draw_seed}; {how})"]


def counted_note(name: str, number: int, what: str) -> str:
    """A note about `number` rows of a source. `what`: the remark. It begins with a plural, or with "warning: " and a
    plural.
    """
    start, what = (WARNING, what.removeprefix(WARNING)) if what.startswith(WARNING) else ("", what)
    if number == 1:
        counted, _, text = what.partition(" ")
        what = f"{counted.removesuffix('s')} {text}"
    return f"{start}{name}: {number:,} {what}"


def dropped_notes(name: str, counts: SourceCounts, *, evaluation: bool) -> list[str]:
    """Warnings about dropped rows, with advice. Dropped training rows are mentioned only if there are many."""
    longer = f"raise data.max_length (the longest row has {counts.longest_tokens:,} tokens)"
    cures = {TOO_LONG: f"{longer}, or set data.excess_length: truncate or split", NO_TARGET_LEFT: longer}
    cures |= {
        reason: f"{longer}, or lower the other length" for reason in counts.dropped if reason.startswith(f"{TOO_LONG} ")
    }
    return [
        f"warning: {name}: {number:,} of {counts.read:,} rows {'is' if number == 1 else 'are'} dropped: {reason}; "
        + cures.get(reason, "correct these rows, or remove them from the file")
        for reason, number in sorted(counts.dropped.items())
        if evaluation or number > MANY_DROPPED * counts.read
    ]
