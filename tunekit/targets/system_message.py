"""The system message of a run's training rows, to offer it where a user talks to the result."""

from collections import Counter
from itertools import islice

from tunekit.data.reading.first import format_maker, open_rows
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import is_hub_name
from tunekit.errors import TunekitError
from tunekit.targets.target import TargetSpec

READ_ROWS = 100


def trained_system(target: TargetSpec) -> str | None:
    """The system message with which most of the first training rows begin. None without one, and if the rows are not on
    this machine."""
    if target.recipe is None:
        return None
    messages, read = Counter[str](), 0
    for source in target.recipe.data.train:
        if is_hub_name(source.path):
            continue
        try:
            whole = source.model_copy(update={"max_rows": None})
            rows, _, format_name, _ = open_rows(whole, target.recipe.objective.example, Problems())
            make_example = format_maker(format_name, source.path)
            for row in islice(rows, READ_ROWS):
                read += 1
                messages.update(_system_of(make_example(row.values)))
        except (TunekitError, OSError):
            continue  # a run can be used without its rows
    (text, count), *_ = [*messages.most_common(1), ("", 0)]
    return text if count > read / 2 else None


def _system_of(example: object) -> list[str]:
    """The system message of a conversation, or of the conversation in a prompt; empty without one."""
    turns = getattr(example, "messages", None) or getattr(example, "prompt", None)
    first = turns[0] if isinstance(turns, list | tuple) and turns else None
    text = getattr(first, "content", None)
    return [text] if getattr(first, "role", "") == "system" and isinstance(text, str) and text else []
