"""Whether the backward passes of a step reach every trained tensor.

An adapter goes in, for the length of a block; an error that names what got no gradient comes out of it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from tunekit.adapters.attach import AttachedAdapter
from tunekit.errors import AdapterError, listed
from tunekit.machine.devices import Devices

SHOWN = 4


@contextmanager
def reaching_all(adapter: AttachedAdapter, devices: Devices, watched: bool = True) -> Iterator[None]:
    """A block whose backward passes must give every trained tensor a gradient, if only of 0, on one rank at least.

    Of several experts in one layer those that no token was sent to get none: it is enough that one of them does.
    A base that is trained itself may hold tensors that its own code never reads.
    Raises: AdapterError with the names of those that got none.
    """
    if not watched or adapter.settings.trains_base:
        yield
        return
    reached: set[str] = set()
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
    everywhere = set(devices.gather(sorted(reached)))
    lost = [name for name in trained if _kind(name) not in everywhere]
    if lost:
        raise _unreached(lost)


def _note(reached: set[str], kind: str, parameter: Tensor) -> None:
    reached.add(kind)


def _unreached(names: list[str]) -> AdapterError:
    what = f"no gradient reaches {listed(names, SHOWN)}: the model never calls what is adapted there"
    how = "leave it out with adapter.exclude_modules, or name other layers"
    return AdapterError(what, how, key="adapter.target_modules")


def _kind(name: str) -> str:
    """The name without its numbers but the first, which is its layer's: in the others experts differ."""
    pieces = name.split(".")
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), 0)
    return ".".join(piece for place, piece in enumerate(pieces) if place <= first or not piece.isdigit())
