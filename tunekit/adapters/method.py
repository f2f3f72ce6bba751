"""What a method is: its METHOD, the facts that other rooms ask of it, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from tunekit.adapters.base import LayerAdapter, ModelAdapter, SharedPart
from tunekit.adapters.folder.fields import PeftSide
from tunekit.contracts import Tokenizer
from tunekit.records import Target


@dataclass(frozen=True)
class Misfit:
    """A setting that does not fit the layers: the recipe key, what is wrong, how to mend it."""

    key: str
    what: str
    how: str


def no_misfits(settings: Any, targets: Sequence[Target], file: bool) -> tuple[Misfit, ...]:
    """The default of Method.misfits."""
    return ()


def no_run_misfits(settings: Any, steps: int) -> tuple[Misfit, ...]:
    """The default of Method.run_misfits."""
    return ()


def no_names(settings: Any) -> tuple[str, ...]:
    """The default of Method.parameters."""
    return ()


def saved_modules(settings: Any) -> Sequence[str]:
    """The default of Method.copies: modules trained whole."""
    names: Sequence[str] = getattr(settings, "modules_to_save", ())
    return names


def as_written(settings: Any, tokenizer: Tokenizer) -> Any:
    """The default of Method.with_tokenizer."""
    return settings


@dataclass(frozen=True)
class Method:
    """What a method's file declares as METHOD: the classes it is made of, and its side of PEFT's format."""

    peft: PeftSide
    layer: type[LayerAdapter] | None = None
    shared: type[SharedPart] | None = None
    repeats_shared: bool = False  # PEFT's files repeat the shared tensors under each layer
    parameter: type[Any] | None = None  # a ParameterAdapter
    model: type[ModelAdapter] | None = None
    parameters: Callable[[Any], Sequence[str]] = no_names  # settings -> names of fused 3-D parameters
    copies: Callable[[Any], Sequence[str]] = saved_modules  # settings -> names of modules trained as full copies
    places: Callable[[Mapping[str, nn.Module], Any], Mapping[str, tuple[str, ...] | None]] | None = None
    # of a method that is nothing but copies: the base's modules, settings -> module name and its parameters (None: all)
    copy: type[Any] | None = None  # a TrainedCopy, the class of its copies, where their names in the file differ
    misfits: Callable[[Any, Sequence[Target], bool], Sequence[Misfit]] = no_misfits  # True: settings of a file
    run_misfits: Callable[[Any, int], Sequence[Misfit]] = no_run_misfits  # settings, optimizer steps of the run
    with_tokenizer: Callable[[Any, Tokenizer], Any] = as_written  # the recipe's settings with its texts as token ids
    read_as: str | None = None  # the method as which its folder is read, where the two differ only in training


def load_method(name: str) -> Method:
    """METHOD of adapters/NAME.py; the recipe has checked that the name is one of ours."""
    method: Method = import_module(f"tunekit.adapters.methods.{name}").METHOD
    return method
