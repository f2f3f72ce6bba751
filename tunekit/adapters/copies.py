"""A module whose parameters are trained as they are: heads, embeddings, norms, biases.

Comes in: a module of the base and the names of the parameters to train.  Goes out: a wrapper that uses float32 copies
and keeps the original for bypass.  Next: attach.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Generator, Tensor, nn
from torch.func import functional_call

from tunekit.adapters.base import Part, Slot, Wrapper, slot_count
from tunekit.adapters.method import Method
from tunekit.adapters.module_names import base_modules, is_within, named_copies, plain_entries
from tunekit.adapters.tokens import token_slots
from tunekit.errors import AdapterError
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import weight_of
from tunekit.records import Target

Copies = dict[str, tuple[str, ...] | None]


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


def wrong_entries(modules: Mapping[str, nn.Module], entries: Sequence[str], in_file: bool) -> list[tuple[str, str]]:
    """What is wrong, and how to mend it. PEFT's own files name heads on suspicion: there an entry may match nothing."""
    wrong = []
    for entry in entries:
        if not named_copies(modules, [entry]) and not in_file:
            last = sorted({name.rpartition(".")[2] for name in modules})
            near = difflib.get_close_matches(entry.rpartition(".")[2], last, n=3, cutoff=0.5)
            how = f"did you mean {' or '.join(map(repr, near))}?" if near else "name a module of the base"
            wrong.append((f"'{entry}' matches no module of the base", how))
    copies = named_copies(modules, entries)
    if copies and plain_entries(copies, modules) is None:
        wrong.append((f"{', '.join(entries)} cannot be told from other modules in PEFT's format", "leave them out"))
    return wrong


def copied_places(modules: Mapping[str, nn.Module], method: Method, settings: Any, targets: Sequence[Target]) -> Copies:
    """Every module to copy. With bias: all these are also all owners of a bias that is not an adapted layer's."""
    whole = named_copies(modules, method.copies(settings))
    places: Copies = dict.fromkeys(whole)
    if getattr(settings, "bias", "none") == "all":
        adapted = {target.name for target in targets}
        for name, module in modules.items():
            owns = any(own == "bias" for own, _ in module.named_parameters(recurse=False))
            if owns and name not in adapted and not is_within(name, whole):
                places[name] = ("bias",)
    places |= method.places(modules, settings) if method.places else {}
    return dict(sorted(places.items()))
