"""Modules whose parameters are trained directly: heads, embeddings, norms, biases.

A wrapper computes with float32 copies of the parameters. It keeps the original parameters for forwards that bypass the
adapter.
"""

import difflib
from collections.abc import Sequence

from torch import Generator, nn
from torch.func import functional_call

from tunekit.adapters.base import AdapterPart, Slot, Slots, Wrapper
from tunekit.adapters.module_names import named_copies, plain_entries
from tunekit.contracts import Modules, Tensors
from tunekit.errors import AdapterError
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import weight_of


class TrainedCopy(Wrapper, AdapterPart):
    """A module that computes with trained float32 copies of its parameters. `only`: the parameters to copy; by default
    all.

    Shapes: those of the module. Starts as the identity: copies equal the originals. The copies are cast to the dtype of
    the originals for each forward. Weight decay does not apply to vectors and embeddings.
    Raises: AdapterError if a matrix to train is quantized.
    """

    def __init__(self, base: nn.Module, name: str, only: Sequence[str] | None = None, *, meta: bool = False) -> None:
        super().__init__(base)
        self.declare(name, self.slots(base, name, only), meta=meta)

    @classmethod
    def slots(cls, base: nn.Module, name: str, only: Sequence[str] | None = None) -> Slots:
        """Declares one tensor per parameter. Attributes are numbered, because a parameter's name can contain dots."""
        names = [
            parameter_name for parameter_name, _ in base.named_parameters() if only is None or parameter_name in only
        ]
        weight = weight_of(base)
        packed = weight is not None and weight.kind != "dense"
        if not names or (packed and only is None):
            raise AdapterError(
                f"'{name}' is {'quantized' if packed else 'without parameters'} and cannot be trained as a copy",
                "adapt the module instead, or load the base with quantization: none",
            )
        embedding = isinstance(base, nn.Embedding)
        return {
            f"copy_{number}": Slot(parameter_name, tuple(tensor.shape), decays=tensor.dim() > 1 and not embedding)
            for number, parameter_name in enumerate(names)
            for tensor in [base.get_parameter(parameter_name)]
        }

    def initialise(self, generator: Generator) -> None:
        for attribute, slot in self.declared.items():
            original = self.base_layer.get_parameter(slot.suffix).detach()
            copy = getattr(self, attribute).data
            # on a meta base the values are loaded afterwards
            copy.zero_() if original.is_meta else copy.copy_(original)

    def cast_copies(self) -> Tensors:
        """The copies, cast to the dtypes of the original parameters, by the parameters' names in the module."""
        return {
            slot.suffix: getattr(self, attribute).to(self.base_layer.get_parameter(slot.suffix).dtype)
            for attribute, slot in self.declared.items()
        }

    def forward(self, *inputs: object, **named: object) -> object:
        if current_call().bypassed:
            return self.base_layer(*inputs, **named)
        return functional_call(self.base_layer, self.cast_copies(), inputs, named)


def wrong_entries(modules: Modules, entries: Sequence[str], in_file: bool) -> list[tuple[str, str]]:
    """The invalid entries of modules_to_save, as pairs (problem, advice). An entry of a file may match no module,
    because PEFT lists heads that the base may not have."""
    wrong = []
    for entry in entries:
        if not named_copies(modules, [entry]) and not in_file:
            last_names = sorted({name.rpartition(".")[2] for name in modules})
            similar = difflib.get_close_matches(entry.rpartition(".")[2], last_names, n=3, cutoff=0.5)
            how = f"did you mean {' or '.join(map(repr, similar))}?" if similar else "name a module of the base"
            wrong.append((f"'{entry}' matches no module of the base", how))
    copies = named_copies(modules, entries)
    if copies and plain_entries(copies, modules) is None:
        wrong.append(
            (f"{', '.join(entries)} cannot be distinguished from other modules in PEFT's format", "remove them")
        )
    return wrong
