"""What `tunekit init` writes for an objective into a first recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Line = tuple[str, str]  # a line of YAML, and the comment beside it


@dataclass(frozen=True)
class FirstRecipe:
    """`order`: init asks of the first row whether it is of the objective's kind, smallest numbers first; `model`: None
    for one at hand; `target_modules`: None for the adapter's default; `objective`, `training`: lines of that section.
    The values are those of a shipped recipe.
    """

    order: int
    model: str | None = None
    model_comment: str = "a folder, a .gguf file or a hub name"
    target_modules: str | None = None
    learning_rate: str = "2e-4"
    eval_share: str = "0.05"
    objective: Sequence[Line] = ()
    training: Sequence[Line] = ()
