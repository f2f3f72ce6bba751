"""The context of an autograd function, as torch hands it to `forward` and `backward`."""

from typing import Protocol, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Context(Protocol[Value]):
    """`beside`: what a function keeps that is no tensor."""

    beside: Value
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""

    def set_materialize_grads(self, value: bool) -> None:
        """False: an output without a gradient gives None, not zeros."""
