"""A module whose parameters are trained as they are: heads, embeddings, norms, biases.

Comes in: a module of the base and the names of the parameters to train.  Goes out: a wrapper that uses float32 copies
and keeps the original for bypass.  Next: attach.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor, nn
from torch.func import functional_call

from tunekit.adapters.base import Method, Part, Slot, Wrapper
from tunekit.adapters.copied_places import copied_places, named_copies
from tunekit.adapters.module_names import base_modules
from tunekit.adapters.targets import slot_count
from tunekit.adapters.tokens import token_slots
from tunekit.errors import AdapterError
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import weight_of
from tunekit.records import Target


def copied_parameters(net: nn.Module, method: Method, settings: Any, targets: Sequence[Target]) -> int:
    """Trained numbers in copies and in rows of tokens, beside those of the targets; allocates nothing."""
    modules = base_modules(net)
    places = copied_places(modules, method, settings, targets)
    copied = [TrainedCopy.slots(modules[name], name, only) for name, only in places.items()]
    return sum(slot_count(slots.values()) for slots in (*copied, *token_slots(net, settings).values()))


class TrainedCopy(Wrapper, Part):
    """The module with float32 copies of its parameters (all, or those in `only`) in place of them.

    Shapes: as the module's.    Starts as the identity: copies equal the originals.    The copies are cast to the
    originals' dtype for each forward.    Weight decay spares vectors and embeddings.
    Raises: AdapterError where a matrix to train is packed.
    """

    def __init__(self, base: nn.Module, place: str, only: Sequence[str] | None = None, *, meta: bool = False) -> None:
        super().__init__(base)
        self.hold(place, self.slots(base, place, only), meta=meta)

    @classmethod
    def slots(cls, base: nn.Module, place: str, only: Sequence[str] | None = None) -> dict[str, Slot]:
        """One slot per parameter; attributes are numbered, since a parameter's own name may hold dots."""
        names = [name for name, _ in base.named_parameters() if only is None or name in only]
        weight = weight_of(base)
        packed = weight is not None and weight.kind != "dense"
        if not names or (packed and only is None):
            raise AdapterError(
                f"'{place}' is {'quantized' if packed else 'without parameters'} and cannot be trained as a copy",
                "train an adapter of it, or load the base with quantization: none",
            )
        embedding = isinstance(base, nn.Embedding)
        return {
            f"copy_{number}": Slot(name, tuple(tensor.shape), decays=tensor.dim() > 1 and not embedding)
            for number, name in enumerate(names)
            for tensor in [base.get_parameter(name)]
        }

    def initialise(self, generator: Generator) -> None:
        for attribute, slot in self.held.items():
            original = self.base_layer.get_parameter(slot.suffix).detach()
            own = getattr(self, attribute).data
            own.zero_() if original.is_meta else own.copy_(original)  # on a meta base the values are loaded afterwards

    def copied(self) -> dict[str, Tensor]:
        """The copies by the module's own parameter names, in the originals' dtype."""
        return {
            slot.suffix: getattr(self, attribute).to(self.base_layer.get_parameter(slot.suffix).dtype)
            for attribute, slot in self.held.items()
        }

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if current_call().bypassed:
            return self.base_layer(*inputs, **named)
        return functional_call(self.base_layer, self.copied(), inputs, named)


def copy_class(method: Method, settings: Any, name: str) -> type[TrainedCopy]:
    """The class of this module's copy: the method's own, but for what is trained whole beside copies of the method."""
    whole = method.places is not None and bool(named_copies({name: nn.Identity()}, method.copies(settings)))
    return TrainedCopy if whole else method.copy or TrainedCopy
