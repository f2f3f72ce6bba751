"""`tunekit init`: a first recipe to edit, with every key, its default and its meaning as comments.

Comes in: a path that does not exist yet.  Goes out: a valid recipe there.
"""

from __future__ import annotations

import os
from pathlib import Path

from tunekit.errors import RecipeError
from tunekit.recipe.schema import make_commented_recipe

WRITTEN = {
    "model.name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "data.train": "train.jsonl",
    "output.dir": "runs/first",
}


def init_verb(path: str) -> None:
    """Write the recipe. Raises RecipeError where the file exists already: nothing is overwritten."""
    target = Path(path)
    if os.path.isdir(target):
        target /= "recipe.yaml"
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(make_commented_recipe(WRITTEN))
    except FileExistsError:
        raise RecipeError("exists already", "name another file", file=str(target)) from None
    print(f"wrote {target}; put your data's path in data.train, then: tunekit validate {target}")
