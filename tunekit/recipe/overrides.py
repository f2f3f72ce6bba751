"""placeholder"""

from collections.abc import Sequence
from tunekit.recipe.draft import Draft


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    pass
