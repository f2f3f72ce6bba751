"""Suggests known names ("did you mean"), and shortens wrong values for messages."""

from collections.abc import Iterable

from tunekit.errors import redact


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to `word`; None if no name is similar."""
    from difflib import get_close_matches  # imported only if there is a mistake

    names = {name.lower(): name for name in known}
    word = word.lower().replace("-", "_")
    found = get_close_matches(word, names, cutoff=0.7)
    found.sort(key=lambda name: sorted(name) != sorted(word))  # names with the same letters come first
    return names[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean 'epochs'?`, or `otherwise: a, b, c` if no known name is similar."""
    names = list(known)
    found = nearest(word, names)
    return f"did you mean '{found}'?" if found else f"{otherwise}: {', '.join(names)}"


def show(value: object) -> str:
    """The text of a value in a message: short, and without secrets."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = redact(str(value)) if not isinstance(value, int) or abs(value) < 10**40 else "a very long number"
    if isinstance(value, str):
        text = repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
