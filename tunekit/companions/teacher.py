"""A teacher: a model beside the trained one, of which an objective reads hidden states and head.

Comes in: its model section.  Goes out: TunedModel, or why it cannot teach this student.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tunekit.contracts import TEACHER, Objective
from tunekit.errors import Problem, TunekitError
from tunekit.memory.streaming import base_obstacle, host_obstacle, layer_weights, stream_base
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.model.storage.gguf import parsed_once
from tunekit.model.text.tokenizer import LoadedTokenizer, load_tokenizer
from tunekit.recipe.memory import MemorySection
from tunekit.recipe.model import ModelSection
from tunekit.tuned.model import TunedModel

KEY = "objective.teacher"


def teacher_of(objective: Objective) -> ModelSection | None:
    """The section of the teacher that an objective needs, if any."""
    if objective.reference != TEACHER:
        return None
    found: ModelSection = objective.settings.teacher  # type: ignore[attr-defined]
    return found


def tier_of(objective: Objective) -> str:
    """Where the layers of an objective's teacher wait: off is on the device."""
    return getattr(objective.settings, "teacher_streaming", "off")  # type: ignore[attr-defined]


def load_teacher(objective: Objective, device: torch.device) -> TunedModel | None:
    """The objective's teacher on the device, frozen; None where it has none. Raises: ModelError, about its section."""
    section = teacher_of(objective)
    if section is None:
        return None
    with _about_teacher():
        base = load_model(section, device=device, streamed=tier_of(objective) != "off")
    return as_teacher(base, tier_of(objective))


def read_teacher(section: ModelSection, device: torch.device) -> tuple[LoadedModel, LoadedTokenizer]:
    """A teacher without weights, and its tokenizer. Raises: ModelError, about its section."""
    with _about_teacher(), parsed_once(section.name_or_path):
        return make_meta_model(section, device=device), load_tokenizer(section)


@contextmanager
def _about_teacher() -> Iterator[None]:
    """What is said of a model section is said of the teacher's."""
    try:
        yield
    except TunekitError as error:
        moved = [
            replace(problem, key=re.sub(r"^model\.", f"{KEY}.", problem.key)) if problem.key else problem
            for problem in error.problems
        ]
        raise type(error).of(moved) from error


def as_teacher(base: LoadedModel, tier: str) -> TunedModel:
    """A loaded base, or one without weights, that is only read; its layers wait where the tier says."""
    base.net.requires_grad_(False)
    return TunedModel(base, None, slots=stream_base(base, layer_weights(base), tier))


def teacher_problems(
    teacher: LoadedModel,
    theirs: LoadedTokenizer,
    own: Any,
    memory: MemorySection,
    objective: Objective,
    device: torch.device,
) -> Iterator[Problem]:
    """Why a model cannot teach a student with the tokenizer `own` on this device."""
    if memory.streamed_head:
        what = "a divergence reads the whole of the student's head at a time"
        yield Problem(what, "write false", key="memory.streamed_head")
    if teacher.family.name != "causal":
        yield Problem("the teacher is no causal language model", "name one", key=KEY)
        return
    tier, section = tier_of(objective), teacher_of(objective)
    assert section is not None
    obstacle = None if tier == "off" else base_obstacle(teacher, section)
    obstacle = obstacle or (host_obstacle(device) if tier == "host" else None)
    if obstacle is not None:
        yield Problem(f"the teacher's layers cannot wait on {tier}: {obstacle}", "write off", key=f"{KEY}_streaming")
    wanted, there = own.native.get_vocab(), theirs.native.get_vocab()
    different = sorted((text for text in wanted if there.get(text) != wanted[text]), key=lambda text: wanted[text])
    if different:
        what = f"{len(different):,} of the student's {len(wanted):,} tokens have another id or none in the teacher"
        how = f"the first is {different[0]!r}, id {wanted[different[0]]}; name a teacher with the student's tokenizer"
        yield Problem(what, how, key=KEY)
