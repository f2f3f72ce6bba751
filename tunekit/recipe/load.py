"""Reads recipe.yaml and the overrides of the command line, and makes a Recipe. All problems are reported together."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from tunekit.basics import JsonObject
from tunekit.errors import Problem, RecipeError
from tunekit.recipe.bases.label_settings import PROBLEM_TYPES
from tunekit.recipe.bases.section import Section
from tunekit.recipe.data import DataSection
from tunekit.recipe.foreign.command_line import ENDING, read_command_line
from tunekit.recipe.foreign.rewrite import rewrite_aliases
from tunekit.recipe.foreign.samples import count_prompts
from tunekit.recipe.foreign.tools import (
    AXOLOTL,
    FACTORY,
    PEFT,
    TRL,
    WHOLE,
    drop_dropout,
    drop_empty,
    drop_overruled,
    drop_unknown,
    tool_of,
    trains_base,
    write_defaults,
)
from tunekit.recipe.foreign.trainer import settle_axolotl, settle_factory, settle_trl
from tunekit.recipe.reading import checks
from tunekit.recipe.reading.draft import COMMAND_LINE, Draft, Place
from tunekit.recipe.reading.dump import dump_recipe
from tunekit.recipe.reading.names import adapter_class, known_names
from tunekit.recipe.reading.overrides import apply_overrides
from tunekit.recipe.reading.paths import resolve_paths
from tunekit.recipe.reading.problems import SECTION_EXAMPLES, missing_key, problems_of, unknown_key
from tunekit.recipe.reading.sections import kind_of, section_class
from tunekit.recipe.reading.shorthands import expand_shorthands
from tunekit.recipe.reading.suggest import did_you_mean, show
from tunekit.recipe.reading.yaml_reader import read_recipe_file
from tunekit.recipe.recipe import DEFAULT_METHOD, Recipe
from tunekit.recipe.sweep import SweepSection

__all__ = [
    "LoadedRecipe",
    "check_draft",
    "dump_recipe",
    "load_recipe",
    "load_target_overrides",
    "make_recipe",
    "override_data",
    "place_order",
    "read_draft",
    "read_file",
]


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and how it was read.

    `lines`: the line of each key; `overrides`: KEY=VALUE and ~KEY of the command line; `overridden`: the keys that they
    wrote; `rewrites`: sentences about
    rewritten keys of other tools; `defaults`: sentences about defaults that depend on other keys; `tool`: the tool
    whose configuration the file is, None for a recipe; `sweep`: the section that only `tunekit sweep` reads.
    """

    recipe: Recipe
    path: Path
    lines: dict[str, int] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    rewrites: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)
    tool: str | None = None
    sweep: SweepSection | None = None
    overrides: tuple[str, ...] = ()

    def line_of(self, key: str) -> int | None:
        """The line of a dotted key; None if the key is not in the file."""
        return self.lines.get(key)

    def locate(self, problem: Problem) -> Problem:
        """The problem with its place added: this file and the line of its key, or `command line`."""
        if problem.key in self.overridden:
            return Problem(problem.what, problem.how, file=COMMAND_LINE, key=problem.key)
        line = self.line_of(problem.key) if problem.key else None
        return Problem(problem.what, problem.how, file=str(self.path), line=line, key=problem.key)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe. Raises: RecipeError with all problems, in the order of the file."""
    return replace(check_draft(*read_draft(path, overrides)), overrides=tuple(overrides))


def read_file(path: Path) -> Draft:
    """The values of a recipe or of another tool's configuration. Raises: RecipeError if the file cannot be read."""
    return read_command_line(path) if path.suffix == ENDING else read_recipe_file(path)


def read_draft(path: Path | str, overrides: Sequence[str] = (), *, imported: bool = False) -> tuple[Draft, str | None]:
    """The draft of a recipe, not checked yet, and the name of the tool if the file is another tool's configuration.

    In the draft, short forms, keys of other tools and overrides are replaced by tunekit's full keys. `imported`: keys
    that the file does not write get the tool's defaults.
    Raises: RecipeError if the file cannot be read.
    """
    path = Path(path)
    draft = read_file(path)
    _drop_compile(draft)
    tool = tool_of(draft)
    if tool == PEFT:
        how = f"convert it: `tunekit import {shlex.quote(str(path))} --output RECIPE`"
        raise RecipeError("is the configuration of a PEFT adapter, not a recipe", how, file=str(path))
    every_weight = trains_base(draft, tool)
    if tool in WHOLE:
        WHOLE[tool](draft)
    elif tool is not None:
        if tool == TRL:
            settle_trl(draft, imported=imported)
        if tool == AXOLOTL:
            settle_axolotl(draft)
        if tool == FACTORY:
            settle_factory(draft)
        drop_empty(draft)
        drop_dropout(draft, tool)
    expand_shorthands(draft)
    rewrite_aliases(draft)
    expand_shorthands(draft)
    if tool is not None and imported:
        drop_unknown(draft, tool)
        drop_overruled(draft)
        write_defaults(draft, tool, every_weight)
    apply_overrides(draft, overrides)
    count_prompts(draft, of_tool=imported and tool in (AXOLOTL, TRL))
    if "~adapter" in overrides and not draft.has(("adapter",)):
        whole = [name for name in known_names("adapters") if adapter_class(name).trains_base]
        default = f"adapter: the recipe has no such section, so {DEFAULT_METHOD['adapter']} is used with its defaults"
        draft.defaults.append(f"{default}; adapter={whole[0]} trains the base's own weights")
    if tool is not None and not imported:
        command = f"tunekit import {shlex.quote(str(path))} --output RECIPE"
        draft.rewrites.insert(0, f"{path} is a configuration of {tool}; to convert it, run `{command}`")
    return draft, tool


def _drop_compile(draft: Draft) -> None:
    """Drop training.compile from a recipe that an older version wrote: these have all keys. A run whose layers were
    compiled is refused later, through plan.json, and only if it is resumed."""
    key, folder = ("training", "compile"), Path(draft.file).parent
    if draft.has(key) and any((folder / name).exists() for name in ("plan.json", "sweep.json")):
        draft.remove(key)


def check_draft(draft: Draft, tool: str | None) -> LoadedRecipe:
    """Check a draft and make the recipe. Raises: RecipeError with all problems, in the order of the file."""
    path = Path(draft.file)
    recipe = make_recipe(draft, Path(os.path.abspath(path)).parent)
    written, sweep = draft.written_in(COMMAND_LINE), recipe.sweep
    if sweep is not None and sweep.has_trials:
        draft.defaults.append("sweep: only `tunekit sweep` trains with these values")
    recipe = recipe.model_copy(update={"sweep": None})
    return LoadedRecipe(recipe, path, draft.lines(), written, draft.rewrites, draft.defaults, tool, sweep)


@dataclass(frozen=True)
class TargetOverrides:
    """The checked overrides of eval, generate and merge. `model`, `evaluation`: the values that the user wrote.
    `rewrites`: sentences about rewritten keys of other tools. For a model whose head is from another tool, `labels` are
    the names of the head's outputs, and `problem_type` is the meaning of its scores."""

    model: JsonObject
    evaluation: JsonObject
    rewrites: list[str]
    labels: tuple[str, ...] = ()
    problem_type: str | None = None


def load_target_overrides(overrides: Sequence[str]) -> TargetOverrides:
    """Read and check the overrides of eval, generate and merge. These can change model.*, evaluation.*,
    objective.labels and objective.problem_type; keys of other sections are refused.

    Paths are relative to the working folder, because there is no recipe file.
    """
    draft = Draft(COMMAND_LINE)
    apply_overrides(draft, overrides)
    checks.settle_generation(draft)
    resolve_paths(draft, Path.cwd())
    labels, problem_type = _take_head(draft)
    model, evaluation = draft.values.get("model", {}), draft.values.get("evaluation", {})
    for name in [name for name in draft.values if name not in ("model", "evaluation")]:
        how = "override only model.*, evaluation.*, objective.labels or objective.problem_type; in eval also data.*"
        draft.add_problem((name,), "cannot be overridden here", how)
    if isinstance(model, dict):
        draft.values["model"] = {"name_or_path": "any", **model}  # required, but an override need not write it
    sections = {name: section for name in ("model", "evaluation") if (section := _make_section(name, draft))}
    checks.check_across(draft, sections)
    if draft.problems:
        raise RecipeError.of(draft.problems, draft.rewrites)
    return TargetOverrides(
        model={name: getattr(sections["model"], name) for name in model},
        evaluation={name: getattr(sections["evaluation"], name) for name in evaluation},
        rewrites=draft.rewrites,
        labels=labels,
        problem_type=problem_type,
    )


def _take_head(draft: Draft) -> tuple[tuple[str, ...], str | None]:
    """Remove objective.labels and objective.problem_type from the draft, and return them."""
    objective = draft.values.get("objective")
    if not isinstance(objective, dict) or not set(objective) <= {"labels", "problem_type"}:
        return (), None
    del draft.values["objective"]
    labels, problem_type, known = objective.get("labels"), objective.get("problem_type"), list(PROBLEM_TYPES)
    texts = [str(label) for label in labels if type(label) in (str, int)] if isinstance(labels, list) else []
    if labels is not None and (not texts or len(set(texts)) < len(labels)):
        draft.add_problem(("objective", "labels"), "must be a list of different names", "write [no, yes]")
    if problem_type not in (None, *known):
        how = did_you_mean(str(problem_type), known, "known problem types")
        draft.add_problem(("objective", "problem_type"), f"unknown problem type {show(problem_type)}", how)
    return tuple(texts), problem_type


def override_data(data: DataSection | None, overrides: Sequence[str], objective: str | None) -> DataSection:
    """Applies overrides of data.* to a data section, or to an empty section if `data` is None. If data.eval names
    sources, the result also has them as data.train, because no training rows are needed. `objective`: the name of the
    objective that measures the rows; None if it is not known yet.

    Raises: RecipeError with all problems.
    """
    draft = Draft(COMMAND_LINE)
    draft.set(("data",), {} if data is None else data.model_dump(mode="json"), Place("the recipe"))
    draft.set(("objective",), objective, Place("the recipe"))
    apply_overrides(draft, overrides)
    resolve_paths(draft, Path.cwd())
    if isinstance(draft.get(("data", "eval")), list):
        draft.set(("data", "train"), draft.get(("data", "eval")), draft.place(("data", "eval")))
    section = _make_section("data", draft)
    checks.check_across(draft, {} if section is None else {"data": section})
    if draft.problems or not isinstance(section, DataSection):
        raise RecipeError.of(draft.problems, draft.rewrites)
    return section


def make_recipe(draft: Draft, folder: Path) -> Recipe:
    """Check all sections of a draft, and make the Recipe.

    Raises: RecipeError with all problems of the draft.
    """
    checks.check_secrets(draft)
    checks.settle_pairs(draft)
    checks.settle_generation(draft)
    checks.settle_learning_rate(draft)
    resolve_paths(draft, folder)
    sections = _make_sections(draft)
    checks.check_across(draft, sections)
    if draft.problems:
        raise RecipeError.of(sorted(draft.problems, key=place_order), draft.rewrites)
    return Recipe.model_validate(sections)


def _make_sections(draft: Draft) -> dict[str, Section]:
    """The valid sections. Problems of the other sections are added to the draft."""
    sections: dict[str, Section] = {}
    draft.problems += [unknown_key((name,), draft) for name in draft.values if name not in Recipe.model_fields]
    for name, field_info in Recipe.model_fields.items():
        if name in draft.values and not (draft.values[name] is None and field_info.default is None):
            if section := _make_section(name, draft):
                sections[name] = section
        elif field_info.is_required() and name not in {key[0] for key in draft.untranslated}:
            draft.problems.append(missing_key((name,), draft))
    return sections


def _make_section(name: str, draft: Draft) -> Section | None:
    values = draft.values.get(name, {})
    owner = section_class(name, values)
    if owner is None:
        kind, method = kind_of(name), values["method"]
        how = did_you_mean(str(method), known_names(kind), f"known {kind}")
        draft.add_problem((name, "method"), f"unknown {name} {show(method)}", how)
        return None
    if not isinstance(values, dict):
        what = f"must be a mapping{' or a name' if name in ('model', *DEFAULT_METHOD) else ''}, not {show(values)}"
        how = f"write {SECTION_EXAMPLES[name]}" if name in SECTION_EXAMPLES else ""
        draft.add_problem((name,), what, how or ("remove the key to use the defaults" if values is None else ""))
        return None
    try:
        return owner.model_validate(values)
    except ValidationError as error:
        draft.problems.extend(problems_of(error, (name,), draft))
        return None


def place_order(problem: Problem) -> tuple[bool, int]:
    """The sort key of problems: problems of the file by line, then problems of the command line."""
    return (problem.file == COMMAND_LINE, problem.line or 0)
