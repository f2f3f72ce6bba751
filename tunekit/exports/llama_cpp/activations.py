"""The importance of a matrix's columns: the mean squares of the activations that the columns are multiplied by.

llama.cpp's quantizer weighs the error of each weight by this importance. Source: llama.cpp, tools/imatrix/imatrix.cpp.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunekit.adapters.expert_parameters import ChangedParameter
from tunekit.contracts import Array
from tunekit.model.quantized.weights import layer_kind
from tunekit.targets.target import TargetSpec, load_target


@torch.no_grad()
def column_squares(target: TargetSpec, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
    """The mean square of each input over all tokens of the rows. Linear layers: (I,) by module name. Fused experts:
    (E, I) by parameter name; an expert that no token reaches has ones, as in llama.cpp."""
    loaded = load_target(target, torch.device("cpu")).model.base
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        sums[name] = sums.get(name, torch.zeros(values.shape[1])) + values.square().sum(0)
        counts[name] = counts.get(name, 0) + len(values)

    for name, module in loaded.net.named_modules():
        if layer_kind(getattr(module, "base_layer", module)) in ("linear", "conv1d"):
            module.register_forward_pre_hook(partial(add, name))
    with ExpertInputs(loaded.net) as experts:
        for row in rows:
            loaded.family.scores(loaded.net, loaded.family.inputs_of(torch.tensor(row)[None]))
    del loaded
    gc.collect()
    return {name: (total / counts[name]).numpy() for name, total in sums.items()} | experts.mean_squares()


class ExpertInputs(TorchFunctionMode):
    """Intercepts F.linear(x, parameter[expert]), which computes a fused expert, and sums the squares of the inputs
    x."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        fused = {id(tensor): name for name, tensor in net.named_parameters() if tensor.dim() == 3}
        self.names = {number: name.replace(".base_layer.", ".") for number, name in fused.items()}
        self.sums: dict[str, Tensor] = {}  # (E, I)
        self.counts: dict[str, Tensor] = {}  # (E, 1)
        choose: Callable[[str], None] | None = getattr(net, "set_experts_implementation", None)
        if fused and choose is not None:
            choose("eager")  # the other implementations multiply all experts at once

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        x, weight = (*args, None, None)[:2]
        if func is F.linear and isinstance(x, Tensor) and isinstance(weight, Tensor | ChangedParameter):
            self._add(x, weight)
        return func(*args, **(kwargs or {}))

    def _add(self, x: Tensor, weight: Tensor | ChangedParameter) -> None:
        parameter: Tensor | None = weight.adapter.parameter if isinstance(weight, ChangedParameter) else weight._base
        index = (
            weight.index if isinstance(weight, ChangedParameter) else weight.storage_offset() // max(1, weight.numel())
        )
        name = self.names.get(id(parameter))
        if parameter is None or name is None or isinstance(index, slice):
            return
        values = x.reshape(-1, x.shape[-1]).float()
        if name not in self.sums:
            self.sums[name] = torch.zeros(len(parameter), values.shape[1])
            self.counts[name] = torch.zeros(len(parameter), 1)
        self.sums[name][index] += values.square().sum(0)
        self.counts[name][index] += len(values)

    def mean_squares(self) -> dict[str, Array]:
        """The mean squares (E, I) by parameter name."""
        return {
            name: torch.where(self.counts[name] > 0, total / self.counts[name].clamp(min=1), 1.0).numpy()
            for name, total in self.sums.items()
        }
