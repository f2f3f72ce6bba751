"""Generate the pages of the documentation that list models, keys, methods, formats, metrics, commands and errors.

usage: python scripts/site/generate.py FOLDER      copies the written pages to FOLDER, and adds the generated pages
"""

from __future__ import annotations

import ast
import html
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parent
REPOSITORY = SITE.parent.parent
sys.path.insert(0, str(REPOSITORY))

from tunekit import errors  # noqa: E402
from tunekit.recipe.bases.section import TargetedSettings  # noqa: E402
from tunekit.recipe.data import Source  # noqa: E402
from tunekit.recipe.foreign import tools, torchtune, unsloth  # noqa: E402
from tunekit.recipe.foreign.table import IN_ADAPTER, TOP_LEVEL, alias_target  # noqa: E402
from tunekit.recipe.reading.draft import dotted  # noqa: E402
from tunekit.recipe.reading.dump import yaml_scalar  # noqa: E402
from tunekit.recipe.reading.names import SettingsKind, facts_of, known_names, settings_class  # noqa: E402
from tunekit.recipe.reading.schema import Key, first_line, reference_keys  # noqa: E402
from tunekit.recipe.reading.sections import section_class  # noqa: E402
from tunekit.recipe.reading.shipped import SCHEMA_MARK, first_comment, shipped_recipes  # noqa: E402
from tunekit.recipe.recipe import DEFAULT_METHOD, Recipe  # noqa: E402

SHOWN_RECIPE = re.compile(r"^<!-- recipe: ([\w-]+) -->$", re.MULTILINE)
CLASSES = [
    name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.TunekitError)
]
BEFORE_WHAT = {"Problem": 0, "NotExact": 0, "problem": 1, "_complain": 2}  # arguments that come before the words
NOTHING = ast.Constant("")
NO_NAMES = {"join", "list", "listed", "map", "repr", "show", "shown", "sorted", "str", "tuple", "type", "dotted", "len"}


def write(folder: Path) -> None:
    """Write all pages into the folder; its earlier content is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SITE / "pages", folder)
    for page in folder.rglob("*.md"):
        page.write_text(with_recipes(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """All generated pages: file name -> text."""
    return {
        "reference/recipe.md": recipe_page(),
        "reference/recipes.md": shipped_page(),
        "reference/methods.md": methods_page(),
        "reference/objectives.md": objectives_page(),
        "reference/formats.md": formats_page(),
        "reference/metrics.md": metrics_page(),
        "reference/commands.md": commands_page(),
        "reference/errors.md": errors_page(),
        "reference/other-tools.md": other_tools_page(),
        "reference/models.md": (REPOSITORY / "scripts" / "results" / "models.md").read_text(encoding="utf-8"),
    }


def with_recipes(page: str) -> str:
    """The page, with the text of each shipped recipe in place of the mark that names the recipe."""

    def shown(found: re.Match[str]) -> str:
        text = shipped_recipes()[found[1]].read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(SCHEMA_MARK)]
        return "\n".join([f'```yaml title="{found[1]}.yaml"', *lines, "```"])

    return SHOWN_RECIPE.sub(shown, page)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; each cell becomes one line."""
    cells = [[cell_text(cell) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell_text(cell: str) -> str:
    """The text of a cell in one line. Bars in code are written in HTML, because Markdown would show their backslash."""
    cell = " ".join(cell.split())
    if cell.startswith("`"):
        return f"<code>{re.sub(r' ?[|] ?', ' &#124; ', html.escape(cell.strip('`'), quote=False))}</code>"
    return cell.replace("|", "\\|")


def keys_table(keys: list[Key]) -> str:
    """A table of keys with their types, defaults and meanings."""
    rows = [[f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", escaped(key.meaning)] for key in keys]
    return table(["key", "value", "default", "meaning"], rows)


def escaped(text: str) -> str:
    """The text with escaped Markdown signs. Code between backticks becomes HTML, because a cell can begin with code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"([*_\[\]])", r"\\\1", html.escape(text, quote=False)))


def recipe_page() -> str:
    """The page of all keys, except those of `adapter` and `objective`, which have their own pages."""
    parts = [
        "# Every key of a recipe\n\nA recipe is a YAML file with these sections. `model.name_or_path`, `data.train` "
        "and `output.dir` are required; every other key has a default. The keys of `adapter` are listed with "
        "the [methods](methods.md), and the keys of `objective` with the [objectives](objectives.md).\n\n"
        "`tunekit schema --reference` prints this list in a terminal; `tunekit schema` prints it as JSON Schema.\n"
    ]
    for name in Recipe.model_fields:
        if name not in DEFAULT_METHOD:
            owner = section_class(name, None)
            parts.append(f"## {name}\n\n{escaped(first_line(owner))}\n\n{keys_table(reference_keys(owner))}")
        if name == "data":
            parts.append(f"### A source: data.train and data.eval\n\n{keys_table(reference_keys(Source))}")
    return "\n".join(parts)


def shipped_page() -> str:
    """The page of the recipes that come with tunekit."""
    rows = [[f"`{name}`", escaped(first_comment(file))] for name, file in shipped_recipes().items()]
    head = (
        "# The recipes that come with tunekit\n\n`tunekit recipes NAME --copy my.yaml` copies a recipe with its data.\n"
    )
    return f"{head}\n{table(['name', 'what it shows'], rows)}"


def shared_keys() -> dict[str, Key]:
    """The keys that all methods with selectable layers have, by name."""
    return {key.name: key for key in reference_keys(TargetedSettings) if key.name != "method"}


def methods_page() -> str:
    """The page of adapter methods: the shared keys, the other keys of each method, and LoRA's initialisations."""
    from tunekit.adapters.method import load_method

    shared = shared_keys()
    parts = [
        "# Adapter methods\n\n`adapter: {method: NAME}` selects a method; without the section `adapter`, the method "
        "is `lora`. This table lists the keys that most methods have. The table of a method lists its other keys.\n",
        keys_table(list(shared.values())),
    ]
    for name in known_names("adapters"):
        owner = settings_class("adapters", name)
        title = (facts_of("adapters", name).__doc__ or "").splitlines()[0].partition(" settings of ")[2]
        kind = load_method(name).peft.peft_type
        named = f"Its `peft_type`: `{kind}`." if kind else "Not an adapter in PEFT."
        lines = [f"\n## {name}\n", f"{escaped(title)} {named}"]
        rate = getattr(owner, "default_learning_rate", None)
        if rate is not None:
            lines.append(f"\nThe default of `training.learning_rate` is {rate.value:g} ({escaped(rate.source)}).")
        own = [key for key in reference_keys(owner) if key.name != "method" and shared.get(key.name) != key]
        lines.append(f"\n{keys_table(own)}" if own else "\nThis method has only the shared keys.\n")
        parts.append("\n".join(lines))
    parts.append(
        "\n## Initialisations of LoRA\n\n`adapter: {method: lora, start: NAME}`, or a mapping `{method: NAME, ...}` "
        "with the keys below.\n"
    )
    return "\n".join([*parts, *named_sections("starts", "###")])


def objectives_page() -> str:
    """The page of all objectives with their keys."""
    head = "# Objectives\n\n`objective: NAME`, or a mapping with its keys: `objective: {method: dpo, beta: 0.1}`.\n"
    return "\n".join([head, *named_sections("objectives", "##")])


def named_sections(kind: SettingsKind, level: str) -> Iterator[str]:
    """A section for each name of a kind of settings: its description and its keys."""
    for name in known_names(kind):
        owner = settings_class(kind, name)
        own = [key for key in reference_keys(owner) if key.name != "method"]
        yield f"\n{level} {name}\n\n{escaped(first_line(owner))}\n\n{keys_table(own) if own else ''}"


def formats_page() -> str:
    """The page of the data formats."""
    rows = []
    for name in known_names("formats"):
        facts = facts_of("formats", name)
        needed = escaped(", ".join(facts.REQUIRED))
        rows.append([f"`{name}`", escaped(facts.DESCRIPTION), needed, str(facts.EXAMPLE)])
    head = (
        "# Data formats\n\ntunekit recognises the format of a source by the fields of its first row, and prints the "
        "format with the reason. `format: NAME` in the source sets the format instead. `columns: {question: prompt}` "
        "states that the file's column `question` is the format's field `prompt`. A source can be a file (JSONL, JSON, "
        "CSV, Parquet or text), a folder or a pattern of such files, or a data set of the hub.\n"
    )
    return f"{head}\n{table(['format', 'a row', 'required fields', 'kind of example'], rows)}"


def metrics_page() -> str:
    """The page of all metrics."""
    rows = []
    for name in known_names("metrics"):
        facts = facts_of("metrics", name)
        better = "higher" if facts.HIGHER_IS_BETTER else "lower"
        source = "the model's answers" if hasattr(facts, "score") else "the model's scores of the rows"
        rows.append([f"`{name}`", escaped(facts.DESCRIPTION), better, source])
    head = (
        "# Metrics\n\n`evaluation: {metrics: [...]}` or `tunekit eval TARGET --metric NAME` selects metrics. `loss` "
        "is always measured. Metrics of answers need `evaluation: {generate: true}` during training.\n"
    )
    return f"{head}\n{table(['metric', 'what it is', 'better', 'computed from'], rows)}"


def commands_page() -> str:
    """The page of all commands, with their arguments and options."""
    from typer.main import get_command

    from tunekit.cli import app

    root = get_command(app)
    parts = [(SITE / "commands.md").read_text(encoding="utf-8"), options_of(root)]
    for path, command in commands_of(root, ()):
        arguments = " ".join(shown_argument(part) for part in command.params if part.param_type_name == "argument")
        usage = " ".join(["tunekit", *path, arguments]).strip()
        said = escaped(" ".join((command.help or "").split()))
        parts.append(f"\n## {' '.join(path)}\n\n`{usage}`\n\n{said}\n\n{options_of(command)}")
    exits = (root.epilog or "").removeprefix("Exit codes: ")
    return "\n".join([*parts, f"\n## Exit codes\n\n{exits}\n"])


def shown_argument(argument: Any) -> str:
    """The argument, written as in the command's help."""
    name = str(argument.metavar or argument.name.upper())
    return name if argument.required or name.startswith("[") else f"[{name}]"


def options_of(command: Any) -> str:
    """A table of arguments and options."""
    rows = []
    for part in command.params:
        hidden = getattr(part, "hidden", False) or not part.help
        if not hidden:
            names = ", ".join(part.opts) if part.param_type_name == "option" else shown_argument(part)
            value = str(part.metavar or "") if part.param_type_name == "option" else ""
            rows.append([f"`{f'{names} {value}'.strip()}`", escaped(part.help)])
    return table(["argument or option", "what it does"], rows) if rows else ""


def commands_of(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands of a group and of its subgroups, each with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands_of(command, (*path, name))
        else:
            yield (*path, name), command


def errors_page() -> str:
    """The page of all errors, read from the code that raises them: problem and repair."""
    found = sorted(set(said_errors()), key=lambda each: (CLASSES.index(each[0]), each[1].lower()))
    parts = [
        "# Errors and how to repair them\n\nAn error is one line: `file:line: key: problem; repair`. All problems of a "
        "recipe are printed together. On this page, words in braces stand for names or numbers from your "
        "files. `tunekit --debug ...` adds the traceback; add it to a bug report.\n"
    ]
    for name in CLASSES:
        rows = [[escaped(what), escaped(how)] for kind, what, how in found if kind == name]
        owner = getattr(errors, name)
        code = "128 + the signal's number" if name == "Stopped" else str(owner.exit_code)
        summary = (owner.__doc__ or "").partition("`")[0].strip()  # without fields, which only code reads
        summary = summary if name != "TunekitError" else "Errors that belong to no other section of this page."
        if rows:
            parts.append(f"\n## {name}\n\n{escaped(summary)} Exit code {code}.\n")
            parts.append(table(["problem", "repair"], rows))
    return "\n".join(parts)


def said_errors() -> Iterator[tuple[str, str, str]]:
    """(class, problem, repair) of every error whose text is in the source code. A Problem counts as a RecipeError."""
    for file in sorted((REPOSITORY / "tunekit").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        # ast.walk lists an inner function after the function around it, so a node belongs to its innermost function
        scopes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.FunctionDef)]
        owners = {node: scope for scope in scopes for node in ast.walk(scope)}
        assigned: dict[ast.AST, list[ast.Assign]] = {}
        for node, scope in owners.items():
            if isinstance(node, ast.Assign):
                assigned.setdefault(scope, []).append(node)
        for node, scope in owners.items():
            if not isinstance(node, ast.Call):
                continue
            before = [each for each in assigned.get(scope, []) if each.lineno < node.lineno]
            before = [*assigned.get(tree, []), *sorted(before, key=lambda each: each.lineno)]
            words = dict(pair for each in before for pair in named_values(each))
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            kind = "RecipeError" if name in BEFORE_WHAT else name
            what, how = (
                text_of(part, words) for part in (*node.args, NOTHING, NOTHING)[BEFORE_WHAT.get(name, 0) :][:2]
            )
            if kind in CLASSES and re.search(r"[a-z]{2}", re.sub(r"\{[^}]*\}", "", what)):
                yield kind, what, how


def named_values(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    """The names that an assignment sets, with their values: `what, how = "...", "..."` sets two."""
    (target,) = node.targets[:1]
    if isinstance(target, ast.Name):
        yield target.id, node.value
    elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        for each, value in zip(target.elts, node.value.elts, strict=False):
            yield from [(each.id, value)] if isinstance(each, ast.Name) else []


def text_of(node: ast.expr, words: dict[str, ast.expr], depth: int = 0) -> str:
    """The text of an expression in the source code; values that are inserted at run time appear as {name}."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        parts = (text_of(part, {}, 1) if isinstance(part, ast.Constant) else "{…}" for part in node.values)
        return "".join(
            f"{{{braced(part.value)}}}" if isinstance(part, ast.FormattedValue) else text
            for part, text in zip(node.values, parts, strict=True)
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, words, depth) + text_of(node.right, words, depth)
    if isinstance(node, ast.IfExp):
        return " / ".join(filter(None, (text_of(node.body, words, depth), text_of(node.orelse, words, depth))))
    if isinstance(node, ast.Name) and node.id in words and not depth:
        return text_of(words[node.id], words, 1)
    return ""


def braced(node: ast.expr) -> str:
    """A short name for a value that is inserted into a message."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Name)]
    names = [part.attr if isinstance(part, ast.Attribute) else part.id for part in parts]
    return next((name for name in names if name not in NO_NAMES), "…").strip("_").replace("_", " ")


def other_tools_page() -> str:
    """The page that maps the keys of other tools to keys of a recipe."""
    by_target: dict[str, list[str]] = {}
    nothing: list[str] = []
    for name in sorted(TOP_LEVEL):
        target = alias_target(name)
        if target:
            by_target.setdefault(dotted(target), []).append(name)
        else:
            nothing.append(name)
    order = {name: number for number, name in enumerate(Recipe.model_fields)}
    ordered = sorted(by_target.items(), key=lambda pair: (order.get(pair[0].partition(".")[0], 99), pair[0]))
    rows = [[f"`{ours}`", escaped(", ".join(theirs))] for ours, theirs in ordered]
    inside = [
        [f"`{name}`", f"`{dotted(target)}`" if (target := alias_target(name)) else "no effect, or refused"]
        for name in sorted(IN_ADAPTER)
    ]
    intro = (SITE / "other-tools.md").read_text(encoding="utf-8")
    return "\n".join(
        [
            intro,
            "## Keys of other tools, by their key in a recipe\n",
            table(["key of a recipe", "keys of other tools"], rows),
            "## PEFT's names inside `adapter:`\n",
            table(["name in PEFT", "key of a recipe"], inside),
            "## Keys without an equivalent\n\nThese keys change no result, or tunekit supports only one of their "
            "values; any other value is an error that says what to write.\n",
            ", ".join(f"`{name}`" for name in nothing) + "\n",
            *tool_parts(),
        ]
    )


def tool_parts() -> Iterator[str]:
    """A section for each tool: the names that only this tool has, and its default values."""
    own = {tools.TORCHTUNE: torchtune.TABLE, tools.UNSLOTH: unsloth.SECTIONS, tools.SCRIPT: unsloth.OPTIONS}
    for tool, values in tools.DEFAULTS.items():
        yield f"## {tool}\n"
        if tool in own:
            named = [(name, alias.target) for name, alias in sorted(own[tool].items()) if alias.target]
            rows = [[f"`{name}`", f"`{dotted(target)}`"] for name, target in named]
            yield table(["name in the tool", "key of a recipe"], rows)
        yield "The tool's default values. `import` writes them if the file does not set these keys:\n"
        yield table(["key", "value"], [[f"`{key}`", f"`{yaml_scalar(value)}`"] for key, value in values.items()])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
