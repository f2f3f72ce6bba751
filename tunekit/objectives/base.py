"""How an objective is found: `objective: sft` is sft.py, whose function `make` gives it.

Comes in: a settings object, what encodes rows, and what a folder or a run says of it.  Goes out: an Objective.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tunekit.contracts import Objective, Processor


def make_objective(settings: Any, processor: Processor, facts: Mapping[str, Any] | None = None) -> Objective:
    """The objective named by `settings.method`; `facts` are those that it gave when it was made before."""
    module = importlib.import_module(f"tunekit.objectives.{settings.method}")
    objective: Objective = module.make(settings, processor, facts or {})
    return objective
