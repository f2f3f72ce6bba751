"""The importance of a matrix's columns: the mean squares of the activations that they are multiplied by.

llama.cpp's quantizer weighs the error of each weight by it. Source: llama.cpp, tools/imatrix/imatrix.cpp.
"""

import gc
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tunekit.contracts import Array
from tunekit.model.quantized.weights import layer_kind
from tunekit.targets.target import TargetSpec, load_target


@torch.no_grad()
def column_squares(target: TargetSpec, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
    """The mean square of each input (I,) of every linear layer over all tokens of the rows, by module name."""
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
    for row in rows:
        loaded.family.scores(loaded.net, loaded.family.inputs_of(torch.tensor(row)[None]))
    del loaded
    gc.collect()
    return {name: (total / counts[name]).numpy() for name, total in sums.items()}
