"""Reads a training command from a shell file: its options become the keys of a Draft, with their lines.

A value with a shell variable (`$NAME`) is a problem, because its content is unknown.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tunekit.errors import Problem, RecipeError
from tunekit.recipe.reading.draft import Draft, Place
from tunekit.recipe.reading.yaml_reader import read_recipe_file, read_scalar, read_text

TRL_COMMANDS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
ENDING = ".sh"
PROCESSES = ("nproc_per_node", "num_processes", "nnodes")  # options of torchrun and accelerate; their product
_END = re.compile(r"[|&;]+|\d*>.*|<")  # words that end a command; not a token such as <|im_end|>


def read_command_line(path: Path) -> Draft:
    """The options of the first training command in a file. Raises: RecipeError if the file has none."""
    file = str(path)
    draft = Draft(file)
    words = list(_words(read_text(path), file))
    for at, (word, line) in enumerate(words):
        name = Path(word).name.removesuffix(".py")
        after = words[at + 1][0] if word == "trl" and at + 1 < len(words) else name
        if "unsloth" in name and word.endswith(".py"):
            draft.program = "unsloth-cli.py"
        elif after in TRL_COMMANDS and (word == "trl" or word.endswith(".py")):
            draft.program = f"trl {after}"
            draft.set(("rl",), after, Place(file, line))
        if draft.program is not None:
            _read_options(draft, words[at + 1 + (word == "trl") :])
            _count_processes(draft, words[:at])
            return draft
    how = f"known: unsloth-cli.py, {', '.join(f'trl {name}' for name in TRL_COMMANDS)}"
    raise RecipeError("contains no known training command", how, file=file)


def _words(text: str, file: str) -> Iterator[tuple[str, int]]:
    """The words of all commands, with their line numbers. A backslash continues a line. An empty word marks a command's
    end."""
    for number, line in enumerate(text.splitlines(), 1):
        continues = line.rstrip().endswith("\\")
        try:
            for word in shlex.split(line.rstrip().removesuffix("\\"), comments=True):
                yield "" if _END.fullmatch(word) else word, number
        except ValueError as error:
            raise RecipeError(
                f"cannot be read as a command: {error}", "close the quotes", file=file, line=number
            ) from None
        if not continues:
            yield "", number


def _count_processes(draft: Draft, words: list[tuple[str, int]]) -> None:
    """Multiply the accumulation by the number of processes that the launcher starts. `words`: those before the program.
    Each process computes its own micro-batches; in tunekit, the processes share those of the recipe."""
    launcher = Draft(draft.file)
    start = max((at + 1 for at, (word, _) in enumerate(words) if not word), default=0)
    _read_options(launcher, [*words[start:], ("", 0)])
    file = ("config_file",)
    if launcher.has(file):
        _read_launcher(draft, launcher, launcher.place(file), str(launcher.remove(file)))
    key, processes = ("gradient_accumulation_steps",), 1
    for name in PROCESSES:
        count = launcher.get((name,), 1)
        if not isinstance(count, int):
            what = f"the number of processes is not known: --{name} {count}"
            draft.add_problem((name,), what, "write a number: each process computes its own micro-batches")
        else:
            processes *= count
    steps = draft.get(key, 1)
    if processes > 1 and isinstance(steps, int):
        place = draft.place(key) if draft.has(key) else Place(draft.file, words[start][1])
        draft.set(key, steps * processes, place)
        draft.rewrites.append(f"{place}: {processes} processes -> {processes} times the accumulation ({steps})")
    for name in [str(name) for name in launcher.values if name not in PROCESSES]:
        draft.rewrites.append(f"{launcher.place((name,))}: {name} -> nothing (it is an option of the launcher)")


def _read_launcher(draft: Draft, launcher: Draft, place: Place, name: str) -> None:
    """Read the number of processes from accelerate's configuration file, unless the command line has it. Without the
    file, this number is not known."""
    path = next((path for path in (Path(draft.file).parent / name, Path(name)) if path.is_file()), None)
    written = next((key for key in PROCESSES if launcher.has((key,))), None)
    others = "model.dtype decides the precision, and memory.sharding what the ranks of a run share"
    if path is not None and written is None and "num_processes" in (theirs := read_recipe_file(path)).values:
        written = f"num_processes: {theirs.values['num_processes']}"
        launcher.set(("num_processes",), theirs.values["num_processes"], place)
    if written is None:
        what = f"the number of processes is not known, because {name} {'does not say it' if path else 'is not here'}"
        how = "write --num_processes NUMBER before the script: each process computes its own micro-batches"
        draft.problems.append(Problem(what, how, file=place.file, line=place.line, key="config_file"))
        return
    draft.rewrites.append(f"{place}: config_file -> nothing ({written} is used; {others})")


def _read_options(draft: Draft, words: list[tuple[str, int]]) -> None:
    """Write the options of one command to the draft: --NAME, --NAME VALUE ... and --NAME=VALUE."""
    name, line, values = "", 0, list[str]()
    for word, number in [*words, ("", 0)]:
        if word.startswith("--") or not word:
            if name:
                _set(draft, name, values, line)
            name, equals, value = word.removeprefix("--").partition("=")
            line, values = number, [value] if equals else []
        elif name:
            values.append(word)
        if not word:
            return


def _set(draft: Draft, name: str, words: list[str], line: int) -> None:
    key, values = (name.replace("-", "_"),), [read_scalar(word) for word in words] or [True]
    draft.set(key, values[0] if len(values) == 1 else values, Place(draft.file, line))
    for word in [word for word in words if "$" in word or "`" in word][:1]:
        draft.add_problem(key, f"a shell would replace {word}", "write the value itself")
