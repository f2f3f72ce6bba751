"""Did you mean: the nearest known name, and how a wrong value is shown in a message."""

from collections.abc import Iterable

from tunekit.errors import redact


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, None where nothing is close."""
    from difflib import get_close_matches  # only a mistake pays for this import

    names = {name.lower(): name for name in known}
    word = word.lower().replace("-", "_")
    found = get_close_matches(word, names, cutoff=0.7)
    found.sort(key=lambda name: sorted(name) != sorted(word))  # letters that changed places come first
    return names[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean 'epochs'?`, or `otherwise: a, b, c` where nothing is near."""
    names = list(known)
    found = nearest(word, names)
    return f"did you mean '{found}'?" if found else f"{otherwise}: {', '.join(names)}"


def show(value: object) -> str:
    """A value as a message shows it: its kind and a short, secret-free form."""
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
