"""Installed, tested and lowest versions of packages, and what they say about an error that a package raised.

No package is imported, and nothing is read before it is asked for. tested_versions.txt has the versions with which all
tests passed, as a constraints file of pip.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from types import FrameType

TESTED_FILE = Path(__file__).with_name("tested_versions.txt")
_NAME = r"([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*"
_NOT_LIBRARIES = {"tunekit", "__main__", "transformers_modules"}  # the last one is a model's own code
_DEVELOPERS = r"extra == .(dev|docs)\b"
_PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python", "sklearn": "scikit-learn"}  # of modules


@dataclass(frozen=True)
class Package:
    """The versions of one package; None if unknown. `tested`: tunekit's tests passed with it. `lowest`: the oldest
    version that tunekit accepts."""

    name: str
    installed: str | None
    tested: str | None
    lowest: str | None = None

    @property
    def is_newer(self) -> bool:
        """Whether the installed version is newer than the tested one."""
        return bool(self.installed and self.tested) and _release(self.installed) > _release(self.tested)

    @property
    def is_too_old(self) -> bool:
        """Whether the installed version is older than the oldest one that tunekit accepts."""
        return bool(self.installed and self.lowest) and _release(self.installed) < _release(self.lowest)

    @property
    def differs(self) -> bool:
        """Whether the installed version may be the cause of an error."""
        return self.is_newer or self.is_too_old

    @property
    def marked(self) -> str:
        """The installed version; marked if it is newer than the tested one, or too old."""
        mark = f" (older than {self.lowest})" if self.is_too_old else " (newer)" if self.is_newer else ""
        return f"{self.installed}{mark}"

    @property
    def requirement(self) -> str:
        """What pip installs in place of the installed version."""
        if self.tested:
            return f"{self.name}=={self.tested}"
        return f"'{self.name}>={self.lowest}'" if self.lowest else self.name

    @property
    def advice(self) -> str:
        """Which version to install, and why."""
        if self.is_too_old:
            return f"tunekit needs {self.name} {self.lowest} or newer: run pip install {self.requirement}"
        return f"tunekit was tested with {self.tested}: run pip install {self.requirement}"

    def __str__(self) -> str:
        return f"{self.name} {self.installed}" if self.installed else self.name


@cache
def tested_versions() -> dict[str, str]:
    """The tested version of each package, by its normalised name. If the file has several versions of a package, for
    different systems, it is the newest."""
    versions: dict[str, str] = {}
    for line in TESTED_FILE.read_text(encoding="utf-8").splitlines():
        if pin := re.match(rf"{_NAME}==\s*([^\s;#]+)", line):
            name = normalised(pin[1])
            versions[name] = max(versions.get(name, "0"), pin[2], key=_release)
    return versions


@cache
def lowest_versions() -> dict[str, str]:
    """The oldest version of each package that tunekit itself needs, from the metadata of its installation; empty if
    tunekit is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    versions: dict[str, str] = {}
    try:
        required = requires("tunekit") or []
    except PackageNotFoundError:
        required = []
    for text in required:
        if (bound := re.match(rf"{_NAME}[^;]*?>=\s*([\w.]+)", text)) and not re.search(_DEVELOPERS, text):
            name = normalised(bound[1])
            versions[name] = min(versions.get(name, bound[2]), bound[2], key=_release)
    return versions


def differing_packages() -> dict[str, Package]:
    """All tested packages whose installed version is newer, or too old."""
    packages = (describe_package(name, _installed(name)) for name in tested_versions())
    return {each.name: each for each in packages if each.differs}


def package(module: str) -> Package:
    """The versions of the package that contains a top-level module."""
    from importlib.metadata import packages_distributions

    name = _PACKAGES.get(module, module)
    version, loaded = _installed(name), getattr(sys.modules.get(module), "__version__", None)
    if version is None and (names := packages_distributions().get(module)):
        name, version = names[0], _installed(names[0])
    return describe_package(name, str(loaded) if isinstance(loaded, str) else version)


def describe_package(name: str, installed: str | None) -> Package:
    """The versions of the package with this name."""
    normal = normalised(name)
    return Package(normal, installed, tested_versions().get(normal), lowest_versions().get(normal))


def normalised(name: str) -> str:
    """The name of a package as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version_failure(error: BaseException, called: str | None = None) -> tuple[str, str] | None:
    """What is wrong and how to mend it, if a package failed inside itself and its version is newer than the tested one,
    or too old. None for an error about the files of a model, and for a missing package.

    `called`: the package whose functions were called, also if its frames are not in the traceback.
    """
    if missing_package(error) is not None or (_is_stated(error) and not _is_import(error)):
        return None
    suspect = suspected(error, called)
    return None if suspect is None else (f"{suspect} failed inside itself ({error_words(error)})", suspect.advice)


def suspected(error: BaseException, called: str | None = None) -> Package | None:
    """The innermost package that an error passed through and whose version is newer than the tested one, or too old;
    None if there is none."""
    names = [*_libraries(error), *([called] if called else [])]
    return next((each for each in map(package, dict.fromkeys(names)) if each.differs), None)


def import_failure(error: BaseException) -> tuple[str, str] | None:
    """What is wrong and how to mend it, if a package is missing or cannot be imported; None for other errors."""
    if not _is_import(error):
        return None
    if (missing := missing_package(error) or version_failure(error)) is not None:
        return missing
    broken = package(next(_libraries(error), "tunekit"))
    how = f"run: pip install --force-reinstall {broken.requirement}; if you do not need it, remove it"
    return f"{broken} cannot be imported ({error_words(error)})", how


def needed(feature: str, how_to_install: str, error: Exception) -> tuple[str, str]:
    """What is wrong and how to mend it, for a feature of tunekit whose package is missing or cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and missing_package(error) is not None:
        name = package((error.name or "").partition(".")[0]).name
        return f"{feature} needs {name}, which is not installed", how_to_install
    what, how = import_failure(error) or (error_words(error), how_to_install)
    return f"{feature} is not possible: {what}", how


def missing_package(error: BaseException) -> tuple[str, str] | None:
    """What is wrong and how to mend it, if an import did not find a package, or a library states that it lacks one."""
    for each in _causes(error):
        name = (each.name or "").partition(".")[0] if isinstance(each, ModuleNotFoundError) else ""
        if name and sys.modules.get(name) is None and find_spec(name) is None:
            missing = package(name)
            return f"the package {missing.name} is not installed", f"run: pip install {missing.requirement}"
    text = str(error)
    command = re.search(r"pip install ([\w.-]+\w)", text) if isinstance(error, ImportError) else None
    if command is None:
        return None
    stated = re.search(r"\w+ requires the [\w-]+ library", text)
    what = stated[0] if stated else f"the package {command[1]} is not installed"
    return what, f"run: pip install {package(command[1]).requirement}"


def error_words(error: BaseException) -> str:
    """An error in one line. The text of an ImportError, which names paths and modules of Python, is never shown."""
    if not isinstance(error, ImportError):
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first}" if first else type(error).__name__
    if (missing := missing_package(error)) is not None:
        return missing[0]
    text = str(error)
    if _is_ours(error):
        return text
    if absent := re.search(r"cannot import name '(\w+)' from (?:partially initialized module )?'([\w.]+)'", text):
        return f"{package(absent[2].partition('.')[0])} has no {absent[1]}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{package(error.name.partition('.')[0])} has no module {error.name}"
    if native := re.search(r"[\w.+-]+\.(?:so|dll|dylib)\b[\w.]*", text):
        return f"the native library {native[0]} cannot be loaded"
    return "its import failed"


def _is_stated(error: BaseException) -> bool:
    """Whether a library raised the error on purpose, such as for a model's files: a builtin class for this, or a class
    of its own."""
    return isinstance(error, OSError | ValueError) or type(error).__module__ != "builtins"


def _is_import(error: BaseException) -> bool:
    """Whether an import failed, with an error of any class."""
    if isinstance(error, ImportError):
        return not _is_ours(error)
    return any(is_import for _, is_import in _frames(error))


def _is_ours(error: ImportError) -> bool:
    """Whether tunekit itself raised the error, to refuse an import; Python names the module in those that it raises."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return error.name is None and bool(frames) and _top(frames[-1]) == "tunekit"


def _libraries(error: BaseException) -> Iterator[str]:
    """The top-level modules of libraries that an error passed through after it left the code of tunekit and of models,
    from the innermost one. A module that lacks a name comes first."""
    if isinstance(error, ImportError) and error.name:
        yield error.name.partition(".")[0]
    if isinstance(error, AttributeError) and error.obj is not None:
        owner = error.obj if isinstance(error.obj, type(sys)) else type(error.obj)
        yield from _as_library(str(getattr(owner, "__module__", None) or getattr(owner, "__name__", "")))
    for module, _ in _frames(error):
        yield module


def _frames(error: BaseException) -> Iterator[tuple[str, bool]]:
    """The libraries' frames of an error and of the errors that caused it, from the innermost one to the first frame of
    other code: the top-level module, and whether it was being imported."""
    for each in _causes(error):
        for frame in reversed([frame for frame, _ in walk_tb(each.__traceback__)]):
            module = _top(frame)
            if module in _NOT_LIBRARIES:
                break
            for name in _as_library(module):
                yield name, frame.f_code.co_name == "<module>"


def _causes(error: BaseException) -> list[BaseException]:
    """The error and the errors that it names as its causes, the first cause first."""
    chain = [error]
    while (cause := chain[0].__cause__) is not None and cause not in chain:
        chain.insert(0, cause)
    return chain


def _top(frame: FrameType) -> str:
    """The top-level module of a frame's code."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _as_library(module: str) -> list[str]:
    name = module.partition(".")[0]
    return [] if not name or name in sys.stdlib_module_names or name in _NOT_LIBRARIES else [name]


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except (PackageNotFoundError, ValueError):  # the second: no name
        return None


def _release(version: str | None) -> tuple[int, ...]:
    """The numbers of a version, without its build and without final zeros: 2.13.0+cpu is (2, 13)."""
    numbers = [int(number) for number in re.findall(r"\d+", (re.match(r"\d+(?:\.\d+)*", version or "") or [""])[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
