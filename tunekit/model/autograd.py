"""The context that torch passes to an autograd function's `forward` and `backward`."""

from typing import Protocol, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Context(Protocol[Value]):
    """The `ctx` argument of an autograd function. `extra`: values that are not tensors, saved for the backward pass."""

    extra: Value
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Save tensors for the backward pass."""

    def set_materialize_grads(self, value: bool) -> None:
        """If False, the gradient of an unused output is None instead of zeros."""
