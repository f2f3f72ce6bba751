"""Checks that a step's backward passes reach every trained tensor."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.errors import AdapterError, listed
from tunekit.machine.devices import Devices

SHOWN = 4


@contextmanager
def watching_gradients(adapter: AttachedAdapter, reached: set[str]) -> Iterator[None]:
    """A context manager: the kinds of trained tensors that get a gradient in the block are added to `reached`.

    Raises: AdapterError if the loss depends on no trained tensor.
    """
    trained = adapter.trained()
    with ExitStack() as hooks:
        for name, parameter in trained.items():
            note = partial(_note, reached, _kind(name))
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(note))  # type: ignore[no-untyped-call]
        try:
            yield
        except RuntimeError as error:
            if reached or "does not require grad" not in str(error):
                raise
            raise _unreached(list(trained)) from error


def require_gradients(adapter: AttachedAdapter, reached: set[str], devices: Devices) -> None:
    """Check that every trained tensor got a gradient on at least one rank; the gradient may be 0.

    In a layer with experts, one expert with a gradient is enough, because other experts may get no tokens. If the base
    itself is trained, nothing is checked: it may contain tensors that its code never reads.
    Raises: AdapterError with the names of tensors without a gradient.
    """
    everywhere = set(devices.gather(sorted(reached)))
    missing = [name for name in adapter.trained() if _kind(name) not in everywhere]
    if missing:
        raise _unreached(missing)


def _note(reached: set[str], kind: str, parameter: Tensor) -> None:
    reached.add(kind)


def _unreached(names: list[str]) -> AdapterError:
    what = f"no gradient reaches {listed(names, SHOWN)}: the model never uses these adapted modules"
    how = "exclude these modules with adapter.exclude_modules, or adapt other layers"
    return AdapterError(what, how, key="adapter.target_modules")


def _kind(name: str) -> str:
    """The tensor's name without its numbers, except the first number. So the tensors of all experts in a layer have the
    same name: the first number is the layer's, later numbers are the experts'."""
    pieces = name.split(".")
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), 0)
    return ".".join(piece for place, piece in enumerate(pieces) if place <= first or not piece.isdigit())
