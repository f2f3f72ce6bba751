"""A user's reward function: loads the function, calls it as TRL does, and hashes the files that affect its results."""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from tunekit.errors import RewardError
from tunekit.objectives.rows.prompts import Completion
from tunekit.recipe.bases.sample_settings import RewardSource

RESERVED = ("prompt", "completion", "completion_ids")  # columns of rows with these names are not passed


class UserFunction:
    """A function from a user's file, called with the arguments that its signature names. `parameters`: the names of its
    arguments.

    During loading and calls, the function can import modules from the folder of its file.
    """

    def __init__(self, source: RewardSource) -> None:
        self.folder, self._named = source.code_file.parent, imported_files(source.code_file)
        before = set(sys.modules)
        self._function = _load(source)
        self._modules = sorted(set(sys.modules) - before)
        parameters = inspect.signature(self._function).parameters.values()
        self.takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self.parameters = {parameter.name for parameter in parameters}

    def __call__(self, completions: Sequence[Completion]) -> Sequence[Any]:
        """Call the function, and return its result unchecked. If the result is a generator, all its values are read
        here."""
        columns = {name: None for completion in completions for name in completion.columns if name not in RESERVED}
        values: dict[str, Any] = {
            **{name: [completion.columns.get(name) for completion in completions] for name in columns},
            "prompts": [completion.prompt for completion in completions],
            "completions": [completion.formatted for completion in completions],
        }
        if all(completion.ids is not None for completion in completions):
            values["completion_ids"] = [list(completion.ids or ()) for completion in completions]
        arguments = {name: value for name, value in values.items() if self.takes_all or name in self.parameters}
        with _importing_from(self.folder):
            rewards: Sequence[Any] = self._function(**arguments)
            return list(rewards) if isinstance(rewards, Iterator) else rewards

    def unnamed_modules(self) -> bytes:
        """The contents of modules in the file's folder that the file loaded without an import statement (for example
        with importlib)."""
        files = [path for name in self._modules for path in _places(self.folder, name) if path.is_file()]
        return _content({path: _read(path) for path in files if path not in self._named}, self.folder)


def code_content(source: RewardSource) -> bytes:
    """The contents of a function's file, and of all modules that the file imports from its folder. No code is run.
    Raises: RewardError."""
    files = imported_files(source.code_file)
    return files.pop(source.code_file) + _content(files, source.code_file.parent)


def imported_files(file: Path) -> dict[Path, bytes]:
    """The contents of a file, and of the modules in its folder that it imports directly or indirectly. Keys are
    paths."""
    contents, pending = dict[Path, bytes](), [file]
    while pending:
        path = pending.pop()
        if path not in contents:
            contents[path] = _read(path)
            names = _imports(contents[path], path.relative_to(file.parent).parent.parts)
            pending += [place for name in names for place in _places(file.parent, name) if place.is_file()]
    return contents


def _imports(code: bytes, package: Sequence[str]) -> set[str]:
    """Dotted names of the modules that the code may import, also inside functions, and of their parent packages."""
    try:
        statements = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError):  # reported when the file is run
        return set()
    names = {alias.name for statement in statements if isinstance(statement, ast.Import) for alias in statement.names}
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            above = package[: len(package) + 1 - statement.level] if statement.level else ()
            module = [*above, *(statement.module or "").split(".")]
            names |= {".".join(filter(None, [*module, alias.name])) for alias in statement.names}
    parts = [name.split(".") for name in names]
    return {".".join(some[:count]) for some in parts for count in range(1, len(some) + 1)}


def _places(folder: Path, module: str) -> tuple[Path, Path]:
    """The two paths where Python would find a module of the folder: MODULE.py, and MODULE/__init__.py."""
    path = folder.joinpath(*module.split("."))
    return path.parent / f"{path.name}.py", path / "__init__.py"


def _content(files: dict[Path, bytes], folder: Path) -> bytes:
    return b"".join(f"\0{path.relative_to(folder)}\0".encode() + sha256(files[path]).digest() for path in sorted(files))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"the file cannot be read: {error.strerror or error}"
        raise RewardError(what, "write FILE.py:NAME", file=str(path), key="objective.reward") from None


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """A context in which modules of the folder can be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _load(source: RewardSource) -> Callable[..., Any]:
    """Import the file as a module, and return its function."""
    code, file, name = _read(source.code_file), source.code_file, source.function_name
    module_name = f"tunekit_reward_{sha256(code).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # classes of the file look up their module here
    try:
        with _importing_from(file.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise RewardError(f"cannot be run: {error_line(error, file)}", "correct the file", file=str(file)) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RewardError(f"has no function {name}", f"it has: {', '.join(names) or 'none'}", file=str(file))
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"{name} is an async function", "write a normal function", file=str(file))
    return function


def error_line(error: BaseException, code_file: Path) -> str:
    """The error as one line of text, with its line number in the user's file."""
    words = " ".join(str(error).split())[:200]
    trace, place = error.__traceback__, ""
    while trace is not None:
        mine = trace.tb_frame.f_code.co_filename == str(code_file)
        place = f" (line {trace.tb_lineno})" if mine else place
        trace = trace.tb_next
    return f"{type(error).__name__}: {words}{place}" if words else f"{type(error).__name__}{place}"
