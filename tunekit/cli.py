"""The program: help, exit codes and error messages. The commands are in commands/."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand
from typer.models import CommandInfo

from tunekit import __version__
from tunekit.commands import adapters, recipes, results, talk, targets, training
from tunekit.commands.order import InOrderOfUse
from tunekit.console import Console
from tunekit.console.loudness import LOUDNESS, is_quiet
from tunekit.errors import EXIT_FAULT, InputError, ResourceError, TunekitError, exit_message, redact
from tunekit.machine.variables import variables

EXIT_BROKEN_PIPE = 141
VERBOSE = {"TORCH_CPP_LOG_LEVEL": "WARNING", "TRANSFORMERS_VERBOSITY": "warning"}
UsageError: Any = typer.BadParameter.__base__  # typer does not export it
LIGHT = ("validate", "import", "recipes", "init", "schema", "runs", "launch")  # commands that import no torch
IN_EACH_RANK = (*LIGHT, "train", "eval", "generate", "plan", "doctor")  # several processes may run these commands


@contextmanager
def _one_line() -> Iterator[None]:
    """Print a wrong use of the command line as one line, which names the command whose help lists what it accepts."""
    try:
        yield
    except UsageError as error:
        text = error.format_message().rstrip(".")
        if "\n" in text:  # the whole help, if no argument was given
            raise
        if "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0":  # all ranks have the same options
            path = error.ctx.command_path if error.ctx else "tunekit"
            Console().error(f"{text}; for help: {path} -h")
        raise typer.Exit(error.exit_code) from None


class CommandLine(InOrderOfUse):
    """The group of all commands. Errors of use in any command pass through it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> object:
        with _one_line():
            return super().invoke(ctx)


app = typer.Typer(
    name="tunekit",
    cls=CommandLine,
    help="Fine-tune models from a YAML recipe.",
    epilog="Exit codes: 0 success; 1 a bug in tunekit; 2 the recipe or an input is wrong; 3 a loss is not finite, "
    "or audit computed different numbers; 4 memory, disk or another resource ran out; "
    "129, 130, 138, 143 stopped by SIGHUP, SIGINT, SIGUSR1, SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tunekit {__version__}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print only results, warnings and errors")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="also print the seconds of each part, and log messages of libraries")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fine-tune models from a YAML recipe."""
    context.obj = debug
    if quiet or verbose:
        os.environ[LOUDNESS] = "verbose" if verbose else "quiet"
    for name, value in (variables() | (VERBOSE if verbose else {})).items():
        os.environ.setdefault(name, value)


class Verb(TyperCommand):
    """A command of the program. Its errors are printed on standard error, and they decide the exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. If an option of the program is written after the command, the error says to write it
        before. If an option is unknown, the error says how to write a key of the recipe."""
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            root, name, error.ctx = ctx.find_root(), getattr(error, "option_name", None), error.ctx or ctx
            if name in [each for option in root.command.params for each in option.opts]:
                words = ctx.command_path.removeprefix(root.info_name).strip()
                error.message = f"{name} belongs before the command, as in: tunekit {name} {words}"
                error.possibilities = None  # similar names among this command's options would mislead
            elif hasattr(error, "possibilities") and any(each.metavar == "KEY=VALUE" for each in self.params):
                similar = [each for each in error.possibilities or () if each.startswith(str(name)[:4])]
                error.possibilities = similar
                error.message += "" if similar else "; write a key of the recipe without dashes, as KEY=VALUE"
            raise

    def invoke(self, ctx: Any) -> NoReturn:
        """Import the module of the command, and run the command."""
        if self.name not in LIGHT or ctx.params.get("train"):  # init --train
            from tunekit.machine.threads import thread_settings

            os.environ.update(thread_settings(os.environ))  # read when torch loads its OpenMP library
            if sys.stderr.isatty() and not is_quiet() and os.environ.get("RANK", "0") == "0":
                print("loading ...", file=sys.stderr, flush=True)
        code, several = 0, os.environ.get("WORLD_SIZE", "1") != "1" and "LOCAL_RANK" in os.environ
        try:
            if several and self.name not in IN_EACH_RANK:
                words = ctx.command_path.removeprefix(ctx.find_root().info_name).strip()
                raise InputError(f"{words} computes in one process", "start it without torchrun")
            code = super().invoke(ctx) or 0
            sys.stdout.flush()
        except typer.BadParameter:  # printed by the program
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter's last flush prints another error
            code = EXIT_BROKEN_PIPE
        except (Exception, KeyboardInterrupt) as error:
            if several:
                _tell_ranks(error)
            if ctx.obj:
                print(redact(traceback.format_exc()), file=sys.stderr)
            code = _say(error)
        raise typer.Exit(code)


def _tell_ranks(error: BaseException) -> None:
    """Tell the other ranks about an error of this rank, if it has not joined them yet."""
    from tunekit.machine.devices import Devices
    from tunekit.machine.meeting import tell_early

    if isinstance(error, TunekitError) and error.alone is None and Devices.peers is None:
        error.alone = tell_early(error)


def _say(error: BaseException) -> int:
    """Print an error, and return its exit code. Ranks other than the main rank do not print errors that the main rank
    prints anyway."""
    (text, code), rank = exit_message(error), os.environ.get("RANK", "0")
    if code == EXIT_FAULT and not isinstance(error, TunekitError):
        text, code = _library_message(error) or (text, code)
    alone = getattr(error, "alone", None)
    if alone is None:
        alone = code in (EXIT_FAULT, ResourceError.exit_code)
    if rank == "0" or alone:
        Console().error(text if rank == "0" else f"rank {rank}: {text}")
    return code


def _library_message(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of an error that a library, not tunekit, may be to blame for: it cannot be
    imported, or it failed inside itself in a version with which tunekit was not tested."""
    from tunekit.machine.versions import import_failure, version_failure

    if failure := import_failure(error):
        return "; ".join(failure), InputError.exit_code
    if failure := version_failure(error):
        return f"{'; '.join(failure)}; `tunekit --debug ...` shows the traceback", EXIT_FAULT
    return None


def _commands(group: typer.Typer) -> Iterator[CommandInfo]:
    """All commands of a group, including those of its subgroups."""
    yield from group.registered_commands
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            yield from _commands(inner.typer_instance)


for module in (recipes, training, targets, talk, results, adapters):
    app.add_typer(module.app)
for command in _commands(app):
    command.cls = Verb


def main() -> None:
    """Run the command line."""
    if sys.stdout is None or sys.stderr is None:  # closed by the caller (`>&-`)
        silent = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
        sys.stdout, sys.stderr = sys.stdout or silent, sys.stderr or silent
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal cannot show is not an error
    app()
