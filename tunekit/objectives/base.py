"""How an objective is found: `objective: sft` is sft.py, whose function `make` composes it."""

import importlib

from tunekit.contracts import EncodeOptions, Facts, Objective, Processor, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.recipe.bases.section import ObjectiveSettings


def row_fingerprint(settings: ObjectiveSettings, processor: Processor | Tokenizer) -> str:
    """The fingerprint of rows that all settings decide."""
    return hash_of([settings.model_dump(mode="json"), processor.fingerprint])


def make_objective(
    settings: ObjectiveSettings, processor: Processor, facts: Facts | None = None, options: EncodeOptions | None = None
) -> Objective:
    """The objective named by `settings.method`.

    `facts`: those that the objective of a trained adapter had; `options`: how its rows are encoded.
    """
    module = importlib.import_module(f"tunekit.objectives.{settings.method}")
    return module.make(settings, processor, facts or {}, options or EncodeOptions())
