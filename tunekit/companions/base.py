"""Makes an objective's companions: models or functions that its loss needs, such as a teacher or reward models."""

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from tunekit.contracts import Companion, CompanionSpec, Objective
from tunekit.errors import TunekitError


def make_companions(specs: Sequence[CompanionSpec]) -> dict[str, Companion]:
    """Make the companions from these specs, by recipe key. Their weights are not loaded yet.

    Raises: TypeError if two companions have the same protocol, because a loss finds a companion by its protocol.
    """
    companions, taken = dict[str, Companion](), dict[type, str]()
    for spec in specs:
        companion = importlib.import_module(f"tunekit.companions.{spec.kind}").make(spec)
        for protocol in (kind for kind in type(companion).__mro__ if kind not in Companion.__mro__):
            if protocol in taken:
                raise TypeError(f"{taken[protocol]} and {spec.key} are both a {protocol.__name__}")
            taken[protocol] = spec.key
        companions[spec.key] = companion
    return companions


def load_companions(objective: Objective, device: torch.device) -> dict[str, Companion]:
    """Make and load the companions of an objective, by recipe key."""
    companions = make_companions(objective.companions)
    for companion in companions.values():
        companion.load(device)
    return companions


@contextmanager
def about_model(key: str) -> Iterator[None]:
    """A context in which errors name the keys of a companion's model instead of the keys of the model section."""
    try:
        yield
    except TunekitError as error:
        moved = [
            replace(problem, key=re.sub(r"^model\.", f"{key}.", problem.key)) if problem.key else problem
            for problem in error.problems
        ]
        raise type(error).of(moved) from error
