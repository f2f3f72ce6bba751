"""The meaning of another tool's key: tunekit's key and a translation of the value, or the reason why there is none."""

from dataclasses import dataclass

from tunekit.recipe.foreign.values import Translate, always_so, same
from tunekit.recipe.reading.draft import KeyPath


@dataclass(frozen=True)
class Alias:
    """The translation of another tool's key. `target`: tunekit's key; None if tunekit has no such key."""

    target: KeyPath | None
    translate: Translate
    why: str = "it has no effect in tunekit"  # printed for values without effect


def to(dotted_key: str, *names: str, by: Translate = same) -> dict[str, Alias]:
    """Table entries that translate to one of tunekit's keys. `names`: other tools' names for this key. `by`: translates
    the values."""
    return dict.fromkeys(names, Alias(tuple(dotted_key.split(".")), by))


def same_names(section: str, *names: str) -> dict[str, Alias]:
    """Table entries for keys that have the same name in other tools and in this section of a recipe."""
    return {name: Alias((section, name), same) for name in names}


def nowhere(by: Translate, *names: str) -> dict[str, Alias]:
    """Table entries for keys without a counterpart. `by`: decides whether a value has no effect or is a problem."""
    return dict.fromkeys(names, Alias(None, by))


def dropped(why: str, *names: str) -> dict[str, Alias]:
    """Table entries for keys that change no result, with any value. `why`: the reason, printed with the rewrite."""
    return dict.fromkeys(names, Alias(None, always_so, why))
