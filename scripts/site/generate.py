"""The pages of the documentation that the code writes: keys, methods, formats, metrics, commands, errors, other tools.

usage: python scripts/site/generate.py FOLDER      the written pages are copied there, the generated ones beside them
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
    """Write every page into the folder, in which nothing else stays."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SITE / "pages", folder)
    for page in folder.rglob("*.md"):
        page.write_text(with_recipes(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Every generated page by its file."""
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
    }


def with_recipes(page: str) -> str:
    """A page with the shipped recipes that it names, as they are."""

    def shown(found: re.Match[str]) -> str:
        text = shipped_recipes()[found[1]].read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(SCHEMA_MARK)]
        return "\n".join([f'```yaml title="{found[1]}.yaml"', *lines, "```"])

    return SHOWN_RECIPE.sub(shown, page)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; a cell is one line."""
    cells = [[cell_text(cell) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell_text(cell: str) -> str:
    """A cell in one line; in code a bar needs HTML, since a backslash before it would be shown."""
    cell = " ".join(cell.split())
    if cell.startswith("`"):
        return f"<code>{html.escape(cell.strip('`'), quote=False).replace('|', '&#124;')}</code>"
    return cell.replace("|", "\\|")


def keys_table(keys: list[Key]) -> str:
    """Keys with type, default and meaning."""
    rows = [[f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", escaped(key.meaning)] for key in keys]
    return table(["key", "value", "default", "meaning"], rows)


def escaped(text: str) -> str:
    """Text whose signs are no Markdown, but for code between backticks: as HTML, since a cell may begin with it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"([*_\[\]])", r"\\\1", html.escape(text, quote=False)))


def recipe_page() -> str:
    """Every key of every section but the two that take a method."""
    parts = [
        "# Every key of a recipe\n\nA recipe is a YAML file with these sections. `model.name_or_path`, `data.train` "
        "and `output.dir` must be written; every other key has a default. The settings of `adapter` are "
        "listed with the [methods](methods.md), those of `objective` with the [objectives](objectives.md).\n\n"
        "`tunekit schema --reference` prints the same in a terminal, `tunekit schema` as JSON Schema.\n"
    ]
    for name in Recipe.model_fields:
        if name not in DEFAULT_METHOD:
            owner = section_class(name, None)
            parts.append(f"## {name}\n\n{escaped(first_line(owner))}\n\n{keys_table(reference_keys(owner))}")
        if name == "data":
            parts.append(f"### A source: data.train and data.eval\n\n{keys_table(reference_keys(Source))}")
    return "\n".join(parts)


def shipped_page() -> str:
    """The recipes that come with it."""
    rows = [[f"`{name}`", escaped(first_comment(file))] for name, file in shipped_recipes().items()]
    head = "# The recipes that come with tunekit\n\n`tunekit recipes NAME --copy my.yaml` copies one with its data.\n"
    return f"{head}\n{table(['name', 'what it shows'], rows)}"


def shared_keys() -> dict[str, Key]:
    """The keys of every method whose layers can be chosen."""
    return {key.name: key for key in reference_keys(TargetedSettings) if key.name != "method"}


def methods_page() -> str:
    """Every adapter method with what it has beside the shared keys, and every initialisation of LoRA."""
    from tunekit.adapters.method import load_method

    shared = shared_keys()
    parts = [
        "# Adapter methods\n\n`adapter: {method: NAME}` takes any of these; without the section it is `lora`. Keys "
        "that most of them have are listed once, here; a method's own table has what is special to it.\n",
        keys_table(list(shared.values())),
    ]
    for name in known_names("adapters"):
        owner = settings_class("adapters", name)
        title = (facts_of("adapters", name).__doc__ or "").splitlines()[0].partition(" settings of ")[2]
        kind = load_method(name).peft.peft_type
        lines = [f"\n## {name}\n", f"{escaped(title)} {f'In PEFT: `{kind}`.' if kind else 'Not an adapter in PEFT.'}"]
        rate = getattr(owner, "default_learning_rate", None)
        if rate is not None:
            lines.append(f"\n`training.learning_rate` is {rate.value:g} unless it is written ({escaped(rate.source)}).")
        own = [key for key in reference_keys(owner) if key.name != "method" and shared.get(key.name) != key]
        lines.append(f"\n{keys_table(own)}" if own else "\nIt has no keys of its own.\n")
        parts.append("\n".join(lines))
    parts.append(
        "\n## Initialisations of LoRA\n\n`adapter: {method: lora, start: NAME}`, or a mapping `{method: NAME, ...}` "
        "with the keys below.\n"
    )
    return "\n".join([*parts, *named_sections("starts", "###")])


def objectives_page() -> str:
    """Every objective with its keys."""
    head = "# Objectives\n\n`objective: NAME`, or a mapping with its keys: `objective: {method: dpo, beta: 0.1}`.\n"
    return "\n".join([head, *named_sections("objectives", "##")])


def named_sections(kind: SettingsKind, level: str) -> Iterator[str]:
    """Each name of a kind, what it is, and its keys."""
    for name in known_names(kind):
        owner = settings_class(kind, name)
        own = [key for key in reference_keys(owner) if key.name != "method"]
        yield f"\n{level} {name}\n\n{escaped(first_line(owner))}\n\n{keys_table(own) if own else ''}"


def formats_page() -> str:
    """What a row may look like."""
    rows = []
    for name in known_names("formats"):
        facts = facts_of("formats", name)
        needed = escaped(", ".join(facts.REQUIRED))
        rows.append([f"`{name}`", escaped(facts.DESCRIPTION), needed, str(facts.EXAMPLE)])
    head = (
        "# Data formats\n\nThe format of a source is found from the fields of its first row, and printed with the "
        "reason. `format: NAME` in the source says it instead, and `columns: {question: prompt}` says that the "
        "file's column `question` is the format's field `prompt`. Files may be JSONL, JSON, CSV, Parquet or text, or a "
        "data set of the hub.\n"
    )
    return f"{head}\n{table(['format', 'a row', 'needs', 'for objectives that learn from'], rows)}"


def metrics_page() -> str:
    """What can be measured."""
    rows = []
    for name in known_names("metrics"):
        facts = facts_of("metrics", name)
        better = "higher" if facts.HIGHER_IS_BETTER else "lower"
        source = "the model's answers" if hasattr(facts, "score") else "the model's scores of the rows"
        rows.append([f"`{name}`", escaped(facts.DESCRIPTION), better, source])
    head = (
        "# Metrics\n\nNamed in `evaluation: {metrics: [...]}` or by `tunekit eval TARGET --metric NAME`. `loss` is "
        "always measured. Metrics of answers need `evaluation: {generate: true}` during training.\n"
    )
    return f"{head}\n{table(['metric', 'what it is', 'better', 'computed from'], rows)}"


def commands_page() -> str:
    """Every command with its arguments and options."""
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
    """As the help shows it."""
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
    """Every command that does something, below a group, with the words that call it."""
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
        "recipe are printed together. In the lines below, words in braces stand for names or numbers from your "
        "files. `tunekit --debug ...` adds the traceback, which helps in a report of a bug in tunekit.\n"
    ]
    for name in CLASSES:
        rows = [[escaped(what), escaped(how)] for kind, what, how in found if kind == name]
        owner = getattr(errors, name)
        code = "128 + the signal's number" if name == "Stopped" else str(owner.exit_code)
        summary = (owner.__doc__ or "").partition("`")[0].strip()  # without fields, which only code reads
        summary = summary if name != "TunekitError" else "What is none of those below."
        if rows:
            parts.append(f"\n## {name}\n\n{escaped(summary)} Exit code {code}.\n")
            parts.append(table(["what is said", "how it is mended"], rows))
    return "\n".join(parts)


def said_errors() -> Iterator[tuple[str, str, str]]:
    """(class, what, how) of every error and problem whose words stand in the source; a Problem is a RecipeError."""
    for file in sorted((REPOSITORY / "tunekit").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        words = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            kind = "RecipeError" if name in BEFORE_WHAT else name
            what, how = (
                text_of(part, words) for part in (*node.args, NOTHING, NOTHING)[BEFORE_WHAT.get(name, 0) :][:2]
            )
            if kind in CLASSES and re.search(r"[a-z]{2}", re.sub(r"\{[^}]*\}", "", what)):
                yield kind, what, how


def text_of(node: ast.expr, words: dict[str, ast.expr], depth: int = 0) -> str:
    """A text of the source; what is put in at run time as {words}."""
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
    """A short name for what is put into a message."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute | ast.Name)]
    names = [part.attr if isinstance(part, ast.Attribute) else part.id for part in parts]
    return next((name for name in names if name not in NO_NAMES), "…").strip("_").replace("_", " ")


def other_tools_page() -> str:
    """What the keys of other tools become."""
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
            "## Keys by what they become\n",
            table(["here", "there"], rows),
            "## PEFT's names inside `adapter:`\n",
            table(["there", "here"], inside),
            "## Keys that write nothing here\n\nThey change no result, or only one value of them can be obeyed; any "
            "other value is an error that says what to write.\n",
            ", ".join(f"`{name}`" for name in nothing) + "\n",
            *tool_parts(),
        ]
    )


def tool_parts() -> Iterator[str]:
    """Of each tool by itself: names that only it has, and what it takes where a key is not written."""
    own = {tools.TORCHTUNE: torchtune.TABLE, tools.UNSLOTH: unsloth.SECTIONS, tools.SCRIPT: unsloth.OPTIONS}
    for tool, values in tools.DEFAULTS.items():
        yield f"## {tool}\n"
        if tool in own:
            named = [(name, alias.target) for name, alias in sorted(own[tool].items()) if alias.target]
            rows = [[f"`{name}`", f"`{dotted(target)}`"] for name, target in named]
            yield table(["there", "here"], rows)
        yield "What it takes where a key is not written, and `import` therefore writes:\n"
        yield table(["key", "value"], [[f"`{key}`", f"`{yaml_scalar(value)}`"] for key, value in values.items()])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
