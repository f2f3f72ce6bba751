"""What a name of another tool means: a key of ours and how its value is translated, or why there is none."""

from dataclasses import dataclass

from tunekit.recipe.foreign.values import Translate, always_so, same
from tunekit.recipe.reading.draft import KeyPath


@dataclass(frozen=True)
class Alias:
    """Where a foreign key goes and how its value is translated; no target: it never writes anything."""

    target: KeyPath | None
    translate: Translate
    why: str = "it changes nothing here"  # a value that says nothing says nothing


def to(dotted_key: str, *names: str, by: Translate = same) -> dict[str, Alias]:
    """Names of one of our keys."""
    return dict.fromkeys(names, Alias(tuple(dotted_key.split(".")), by))


def same_names(section: str, *names: str) -> dict[str, Alias]:
    """Keys of one of our sections that bear our names there too."""
    return {name: Alias((section, name), same) for name in names}


def nowhere(by: Translate, *names: str) -> dict[str, Alias]:
    """Names of keys that say nothing here, or cannot be obeyed."""
    return dict.fromkeys(names, Alias(None, by))


def dropped(why: str, *names: str) -> dict[str, Alias]:
    """Names of keys of which no result depends, whatever their values."""
    return dict.fromkeys(names, Alias(None, always_so, why))
