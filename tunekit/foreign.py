"""`tunekit import`: converts the configuration of another fine-tuning tool to a recipe, and prints the result for each
key."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunekit.console import Console
from tunekit.errors import Problem, RecipeError, TunekitError, first_lines, listed
from tunekit.recipe.foreign.tools import PEFT
from tunekit.recipe.load import check_draft, read_draft, read_file
from tunekit.recipe.reading.dump import as_comments, dump_draft, yaml_lines
from tunekit.recipe.reading.yaml_reader import read_recipe_file

ROWS, RUN = "train.jsonl", "runs/imported"  # placeholders, because an adapter's configuration contains neither
TASKS = {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify", "SEQ_2_SEQ_LM": "seq2seq"}  # task_type -> objective
MAX_NAMED = 20  # lost keys in the last line
# the recipe's text, a line for each key, and problems with keys that are lost
Translation = tuple[str, list[str], Sequence[Problem]]


def import_verb(path: str, output: str | None) -> None:
    """Write the recipe to `output`, or to standard output. An existing file is never overwritten.

    Raises: RecipeError if a key has no exact translation. The recipe is written anyway, with that key in a comment.
    """
    is_adapter = Path(path).suffix == ".json" and "peft_type" in read_recipe_file(Path(path)).values
    text, notes, problems = _of_adapter(Path(path)) if is_adapter else _of_recipe(path, output)
    if output is not None:
        try:
            with Path(output).open("x", encoding="utf-8") as opened:
                opened.write(f"# from {Path(path).name}\n{text}")
        except FileExistsError:
            raise RecipeError("exists already", "name another file", file=output) from None
    else:
        print(text, end="")
    if problems:
        where = (
            f"wrote {output}, with these keys as comments:" if output else "these keys are lost, or need a decision:"
        )
        error = RecipeError.of(problems, [*notes, where])
        keys = dict.fromkeys((each.key or each.what).removesuffix(")").rpartition("(written ")[2] for each in problems)
        error.verdict = f"lost: {listed(list(keys), MAX_NAMED)}"
        raise error
    console = Console()
    for line in notes:
        console.error(line)
    if output is not None:
        console.result(f"wrote {output}; check it with: tunekit validate {shlex.quote(output)}")
    console.error("nothing is lost")


def _of_recipe(path: str, output: str | None) -> Translation:
    """The translation of a configuration that describes a training run of another tool."""
    folder = Path(output or path).absolute().parent
    draft, tool = read_draft(path, imported=True)
    whose = [f"{path}: a configuration of {tool}"] if tool else []
    try:
        loaded = check_draft(draft, tool)
    except RecipeError as error:
        if not draft.values.keys() & {"model", "data"}:
            raise  # the file is not a training configuration
        text = as_comments(error.problems, read_file(Path(path))) + dump_draft(draft, error.problems, folder)
        return text, [*whose, *_by_kind(draft.rewrites)], error.problems
    changed = {line.partition(": ")[0] for line in loaded.rewrites}
    kept = [f"{path}:{line}: {key}" for key, line in loaded.lines.items() if f"{path}:{line}" not in changed]
    text = dump_draft(draft, (), folder)
    return text, [*whose, *_by_kind(loaded.rewrites), *_titled("kept:", kept), *loaded.defaults], ()


def _of_adapter(path: Path) -> Translation:
    """The recipe for PEFT's configuration of an adapter. It contains the base and the method; the rows and the run
    folder are placeholders.

    Raises: RecipeError if the method is not known.
    """
    from tunekit.adapters.folder.config import HEAD_TASKS, HEADS, method_of
    from tunekit.files.untrusted import parse_json, read_small

    fields, problems = parse_json(read_small(path), str(path)), list[Problem]()
    while True:
        try:
            method = method_of(fields, str(path))
            settings = method.peft.read(fields, str(path))
            break
        except TunekitError as error:
            lost = {problem.key for problem in error.problems if problem.key != "peft_type"} & fields.keys()
            if not lost:
                raise RecipeError.of(error.problems, [f"{path}: a configuration of {PEFT}", "lost:"]) from error
            fields = {name: value for name, value in fields.items() if name not in lost}
            problems += error.problems
    task, place = fields.get("task_type"), read_recipe_file(path).place(("task_type",))
    if task in HEAD_TASKS and isinstance(fields.get("modules_to_save"), list):  # an objective with a head trains it
        fields = {
            **fields,
            "modules_to_save": [name for name in fields["modules_to_save"] if name not in HEADS] or None,
        }
        settings = method.peft.read(fields, str(path))
    if task not in (None, "CAUSAL_LM", *TASKS):
        how = f"known: CAUSAL_LM, {', '.join(TASKS)}"
        problems.append(Problem(f"no objective trains {task}", how, file=str(path), line=place.line, key="task_type"))
    settings_of = {name: setting for name, (setting, _) in method.peft.fields.items()}
    written = settings.model_dump(mode="json", exclude_defaults=True)
    adapter = {"method": settings.method, **{name: value for name, value in written.items() if name != "method"}}
    base = {"name_or_path": fields.get("base_model_name_or_path") or "BASE"}
    if fields.get("revision"):
        base["revision"] = fields["revision"]
    values: dict[str, Any] = {"model": base, "data": {"train": ROWS}, "adapter": adapter}
    if task in TASKS:
        values["objective"] = TASKS[task]
    values["output"] = {"dir": RUN}
    identity_fields = ("peft_type", *method.peft.claims)  # fields that identify the method
    from_base = {
        "base_model_name_or_path": "model",
        "revision": "model",
        **({"task_type": f"objective: {TASKS.get(task, 'sft')}"} if task in (*TASKS, "CAUSAL_LM") else {}),
        **dict.fromkeys(identity_fields, "adapter.method"),
    }
    kept_lines = [f"{path}: {name} -> adapter.{settings_of[name]}" for name in fields if name in settings_of]
    kept_lines += [f"{path}: {name} -> {to}" for name, to in from_base.items() if name in fields]
    others = [f"{path}: {name} -> nothing" for name in fields if name not in settings_of and name not in from_base]
    missing = f"write data.train (now {ROWS}) and output.dir yourself: an adapter's configuration contains neither"
    if task == "SEQ_CLS":
        missing += "; for a reward model, write objective: reward"
    lines = [
        f"{path}: a configuration of {PEFT}",
        *_titled("kept:", kept_lines),
        *_titled("without effect here:", others),
    ]
    text = as_comments(problems, read_recipe_file(path)) + "\n".join(yaml_lines(values)) + "\n"
    return text, [*lines, missing], problems


def _by_kind(rewrites: Sequence[str]) -> list[str]:
    """Groups the rewrites under three titles: changed keys, keys without effect in tunekit, and the other tool's
    defaults."""
    without = [line for line in rewrites if " -> nothing" in line]
    defaults = [line for line in rewrites if ": default of " in line]
    others = {*without, *defaults}
    changed = [line for line in rewrites if line not in others]
    written = _titled("defaults of the other tool, now written in the recipe:", defaults)
    return [*_titled("changed:", changed), *_titled("without effect here:", without), *written]


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in first_lines(lines))] if lines else []
