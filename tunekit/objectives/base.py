"""Makes an objective from its name: `objective: sft` is made by the function `make` in sft.py."""

import importlib

from tunekit.contracts import EncodeOptions, Facts, Objective, Processor, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.recipe.bases.section import ObjectiveSettings


def row_fingerprint(settings: ObjectiveSettings, processor: Processor | Tokenizer) -> str:
    """A hash that identifies encoded rows, for an objective whose rows depend on all its settings."""
    return hash_of([settings.model_dump(mode="json"), processor.fingerprint])


def make_objective(
    settings: ObjectiveSettings, processor: Processor, facts: Facts | None = None, options: EncodeOptions | None = None
) -> Objective:
    """Make the objective that `settings.method` names.

    `facts`: values that the objective saved with a trained adapter, such as its labels; `options`: how rows are
    encoded.
    """
    module = importlib.import_module(f"tunekit.objectives.{settings.method}")
    return module.make(settings, processor, facts or {}, options or EncodeOptions())
