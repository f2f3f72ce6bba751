"""Silences and patches transformers, huggingface_hub and bitsandbytes within blocks, and restores them afterwards."""

import importlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

import torch

from tunekit.console.loudness import is_verbose
from tunekit.errors import ModelError, TunekitError
from tunekit.machine.versions import import_failure, suspected, version_failure
from tunekit.recipe.model import ModelSection

# Modules of transformers that look for the package `kernels` when a GGUF file is loaded.
KERNEL_USERS = ("transformers.integrations.gguf.kernels", "transformers.quantizers.quantizer_gguf")
# The functions of the package `kernels` that download code or run downloaded code, by the module that has them. The
# second module has a name of its own for the first function.
FETCHERS = {
    "kernels": ("get_kernel", "get_locked_kernel", "load_kernel", "has_kernel", "install_kernel", "kernelize"),
    "transformers.integrations.hub_kernels": ("get_kernel", "get_kernel_hub"),
}
CODE_ARGUMENT = "trust_remote_code"  # appears in the error for a folder that contains code

T = TypeVar("T")
_quiet_lock, _quiet_blocks, _silence = threading.RLock(), list[None](), ExitStack()  # of all threads
NOISY = ("transformers", "huggingface_hub", "bitsandbytes", "accelerate", "torch", "gguf", "diffusers")


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: silence the libraries, except with --verbose. Errors are still raised.

    Blocks of several threads may overlap. The libraries print again after the last block ends.
    """
    if is_verbose():
        yield
        return
    with _quiet_lock:
        if not _quiet_blocks:
            _silence.enter_context(_silenced())
        _quiet_blocks.append(None)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_blocks.pop()
            if not _quiet_blocks:
                _silence.close()


def adafactor() -> Callable[..., torch.optim.Optimizer]:
    """transformers' Adafactor. torch's own always scales an update by the size of the parameter."""
    from transformers import Adafactor

    return Adafactor


@contextmanager
def _silenced() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in NOISY}
    try:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), _no_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable every tqdm bar, because the libraries' own switches do not disable all bars."""
    from tqdm import tqdm  # the class of which all others inherit

    original, stored = tqdm.__init__, vars(tqdm)["__init__"]  # the latter may be a partial method of another library

    def disabled(self: object, *positional: object, **named: object) -> None:
        original(self, *positional, **{**named, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = stored


@contextmanager
def replaced(namespace: MutableMapping[str, T], **values: T) -> Iterator[None]:
    """Context manager: replace values of another library, and restore them afterwards, also after an error.

    `namespace`: `vars(module)`, or any other mapping of names; a name that did not exist is removed again.
    Blocks of two threads must not overlap.
    """
    before = {name: namespace[name] for name in values if name in namespace}
    namespace.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            namespace.pop(name, None)
        namespace.update(before)


@contextmanager
def no_fetched_code(*, gguf: bool = False) -> Iterator[None]:
    """Context manager: the package `kernels`, which downloads code, can be imported, but its functions raise an error.

    transformers' own switch (USE_HUB_KERNELS) is off too. `gguf`: also tell transformers' GGUF reader that `kernels` is
    not installed, so that it does not ask for a kernel."""
    with ExitStack() as stack:
        stack.enter_context(replaced(os.environ, USE_HUB_KERNELS="NO"))
        for name, functions in FETCHERS.items():
            if (module := _imported(name)) is not None:
                present = {function: _refuse_fetch for function in functions if hasattr(module, function)}
                stack.enter_context(replaced(vars(module), **present))
        for module in filter(None, map(_module, KERNEL_USERS if gguf else ())):
            stack.enter_context(replaced(vars(module), is_kernels_available=lambda *_versions: False))
        yield


def _imported(name: str) -> ModuleType | None:
    """The module with this name, imported now: a later import would bind the replaced functions for ever. None if the
    package is not installed or cannot be imported: the library that needs it then raises that error itself."""
    with suppress(Exception):
        return importlib.import_module(name)
    return None


def _refuse_fetch(*_arguments: object, **_named: object) -> NoReturn:
    """Stands in for every function that downloads code."""
    raise ImportError("tunekit does not run code that is downloaded from the hub")


def _module(name: str) -> ModuleType | None:
    """The module with this name, if this version of transformers has it and the module looks for `kernels`."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return module if hasattr(module, "is_kernels_available") else None


@contextmanager
def model_errors(section: ModelSection, part: str = "") -> Iterator[None]:
    """Context manager: convert errors of transformers into a one-line ModelError. `part`: words that the message puts
    before the model's name, such as "the tokenizer of "."""
    try:
        yield
    except (TunekitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name, text = f"{part}{section.name_or_path}", str(error)
        if CODE_ARGUMENT in text:
            how = "read that code, and set model.trust_remote_code: true if you trust it"
            raise ModelError(f"{name} runs remote code", how, key="model.trust_remote_code") from error
        refuse_library(error, section.name_or_path)  # without `part`: one message for a library that fails twice
        why, how = _reason(error)
        raise ModelError(f"{name} cannot be loaded: {why}", how, key="model.name_or_path") from error


def refuse_library(error: Exception, name: object) -> None:
    """Raise a ModelError if the error is the fault of a library, not of the model's files. `name`: the model, or the
    file, that was read with transformers."""
    if failure := version_failure(error, "transformers"):
        raise ModelError(f"{failure[0]} while it read {name}", failure[1], key="model.name_or_path") from error
    if failure := import_failure(error):
        what = f"{name} cannot be loaded: {failure[0]}"
        raise ModelError(what, failure[1], key="model.name_or_path") from error


def _reason(error: Exception) -> tuple[str, str]:
    """What an error of transformers means, in one line, and what to do about it."""
    if unknown := re.search(r"model type `(.+?)` but Transformers does not recognize", str(error)):
        version = sys.modules["transformers"].__version__
        return f"transformers {version} does not know {unknown[1]}", "update transformers, or choose another base"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    how, suspect = "compare its files with the model's page, or choose another base", suspected(error, "transformers")
    return lines[0], how if suspect is None else f"{suspect.advice} ({suspect} is here); if that does not help, {how}"


def refuse_code(error: Exception, file: Path) -> None:
    """Raise a ModelError if `error` means that a processor's file names remote code, which is never run."""
    if CODE_ARGUMENT in str(error):
        what = "the file names a class with remote code, but tunekit never runs the code of processors"
        raise ModelError(what, "choose another base", file=str(file), key="model.name_or_path") from error
