"""The context of an autograd function, as torch hands it to `forward` and `backward`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """A function that keeps more than tensors states the further attributes in a protocol of its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""

    def set_materialize_grads(self, value: bool) -> None:
        """False: an output without a gradient gives None, not zeros."""
