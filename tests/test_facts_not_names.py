"""Shared folders ask for facts: no name of an objective, a family or a method decides anything in them.

A name may be written where it is only shown to the user. It may not be compared with, looked up or used as a key; no
class of a single objective may be tested; no setting that only one objective has may be read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunekit.contracts import Objective
from tunekit.recipe.bases.section import ObjectiveSettings
from tunekit.recipe.reading.names import known_names, objective_class

PACKAGE = Path(__file__).resolve().parent.parent / "tunekit"
FOLDERS = (
    *("planning", "training", "tuned", "targets", "evaluation", "artifacts", "console", "memory", "data"),
    "talking",
)
NAMES = {*known_names("objectives"), *known_names("families"), *known_names("adapters")}
WORDS = {
    "prompt",
    "prefix",
    "full",
    "rerank",
    "reward",
    "speech",
}  # also ordinary words; counted if what they meet is a name
NAMED = {"name", "method", "family", "objective"}
SINGLE_FILES = ("tunekit.recipe.objectives.", "tunekit.recipe.adapters.", "tunekit.model.families.")
SHARED_FILES = ("family", "structure", "stacks", "heads", "stages", "pipeline", "routers")  # of families


def settings_of_one_objective() -> set[str]:
    """Keys that some objectives have and not all. `loss`, which every Objective has too, is left out."""
    fields = {field for name in known_names("objectives") for field in objective_class(name).model_fields}
    return fields - set(ObjectiveSettings.model_fields) - set(Objective.__dataclass_fields__)


def constants(node: ast.AST) -> Iterator[str]:
    """Texts of a node, or of the tuple, list or set that it is."""
    for part in node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else (node,):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def names_something(node: ast.AST) -> bool:
    """Whether an expression is the name of something: x.method, family.name, objective."""
    last = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return last in NAMED


def decided_by_name(text: str) -> Iterator[str]:
    """Each place of a source text where a name, a class or a setting of one objective, family or method decides."""
    own_settings = settings_of_one_objective()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = [word for side in sides for word in constants(side)]
            if any(word in NAMES - WORDS or (word in WORDS and any(map(names_something, sides))) for word in words):
                yield f"line {node.lineno}: compares with {words}"
        elif isinstance(node, ast.Dict):
            keys = [word for key in node.keys if key is not None for word in constants(key)]
            if any(word in NAMES - WORDS for word in keys):
                yield f"line {node.lineno}: a table of {keys}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(SINGLE_FILES):
            if (node.module or "").split(".")[3] not in SHARED_FILES:
                yield f"line {node.lineno}: imports {node.module}"
        elif isinstance(node, ast.Attribute) and node.attr in own_settings and is_objective(node.value):
            yield f"line {node.lineno}: reads objective.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            words = [word for word in constants(node.args[1]) if word in own_settings and is_objective(node.args[0])]
            yield from (f"line {node.lineno}: reads objective.{word}" for word in words)


def is_objective(node: ast.AST) -> bool:
    """Whether an expression is the objective section of a recipe: recipe.objective."""
    return (isinstance(node, ast.Attribute) and node.attr == "objective") or getattr(node, "id", "") == "objective"


def test_no_shared_folder_decides_by_a_name() -> None:
    faults = [
        f"tunekit/{file.relative_to(PACKAGE)}, {fault}"
        for folder in FOLDERS
        for file in sorted((PACKAGE / folder).rglob("*.py"))
        for fault in decided_by_name(file.read_text("utf-8"))
    ]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        'if base.family.name == "diffusion": pass',
        'if objective.name in ("grpo", "rloo"): pass',
        'KINDS = {"dpo": 1}',
        'if settings.method == "full": pass',
        "from tunekit.recipe.objectives.reward import RewardSettings",
        "from tunekit.model.families.audio_classifier import CLASSIFIER",
        "column = recipe.objective.reward",
        'teacher = getattr(recipe.objective, "teacher", None)',
    ],
)
def test_a_decision_by_name_is_found(text: str) -> None:
    assert list(decided_by_name(text))


@pytest.mark.parametrize(
    "text",
    [
        'record = {"prompt": 1}',
        'if "prompt" in record: pass',
        'raise InputError("choose lora")',
        "from tunekit.model.families.family import Family",
        "family = recipe.objective.family",
    ],
)
def test_a_word_is_not(text: str) -> None:
    assert not list(decided_by_name(text))
