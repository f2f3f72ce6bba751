"""placeholder"""

from tunekit.recipe.draft import KeyPath


def alias_target(name: str) -> KeyPath | None:
    return None
