"""What every objective shares.

Comes in: a settings object.  Goes out: an Objective (protocols.py), found by its name: `objective: sft` is sft.py.
"""

from __future__ import annotations

import importlib
from typing import Any

from tunekit.protocols import Objective


def make_objective(settings: Any, *, logits_chunk_tokens: int) -> Objective:
    """The objective named by `settings.method`, whose file has a function `make`."""
    module = importlib.import_module(f"tunekit.objectives.{settings.method}")
    objective: Objective = module.make(settings, logits_chunk_tokens)
    return objective
