"""The Call: everything that layers read in a forward, except their input tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b

import torch

from tunekit.model.attention.real_tokens import RealTokens
from tunekit.model.attention.segments import Segments
from tunekit.model.router_loss import Routing

# Seeds for random numbers drawn outside the layers: embedding dropout before them, an adapted head's dropout after
# them, and a decoder's embedding dropout between the two stacks.
OUTSIDE_LAYERS, AFTER_LAYERS, BETWEEN_STACKS = -1, -2, -3


@dataclass(frozen=True)
class Call:
    """Settings of one forward: whether adapters are bypassed, which of several adapters is used, the step and
    micro-batch (for seeds), and the document boundaries in packed rows (`segments`).

    `seeded`: whether every layer seeds its random numbers from step, micro-batch and `seed`. Evaluation and generation
    draw nothing inside layers, and must not change the generators.

    `adapter_of_row`: if rows use different adapters, the name of each row's adapter (None: the base alone).
    `real_tokens`: the real tokens of padded rows, for encoders whose layers skip padding.
    `routing`: adds up the choices of the routers of a mixture of experts.
    `fuses`: whether products with 4-bit weights may use a faster kernel that rounds differently (for generation).
    """

    bypassed: bool = False
    adapter: str | None = None  # name of one of several loaded adapters; None: the active adapter
    step: int = 0
    micro_batch: int = 0
    seed: int = 0
    seeded: bool = False
    segments: Segments | None = None
    adapter_of_row: tuple[str | None, ...] | None = None
    real_tokens: RealTokens | None = None
    routing: Routing | None = None
    fuses: bool = False


_PLAIN = Call()
_current: ContextVar[Call] = ContextVar("tunekit_call", default=_PLAIN)


def current_call() -> Call:
    """The Call of the running forward, or the default Call."""
    return _current.get()


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Context manager: make `call` the current Call."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends only on the values `parts`, their types and their order."""
    digest = blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def seed_torch(*parts: int | str) -> None:
    """Seed torch with `seed_for(*parts)`.

    Without an accelerator, seed only the CPU's generator: torch.manual_seed would take 0.4 ms to record the Python
    stack for devices that do not exist.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed_for(*parts))
    else:
        torch.default_generator.manual_seed(seed_for(*parts))


def seed_layer(call: Call, number: int) -> None:
    """Seed torch for layer `number` of this call. For code outside the layers, `number` is a constant such as
    BETWEEN_STACKS."""
    seed_torch(call.seed, call.step, call.micro_batch, number)
