"""SHiRA, for linear layers and Conv1D, quantized or not."""

import torch
from torch import Generator, Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.delta_product import DeltaLayer
from tunekit.adapters.folder.fields import ANY, Fixed, PeftSide, same_names
from tunekit.adapters.method import Method, always_linear
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.shira import ShiraSettings
from tunekit.records import Target


class Shira(DeltaLayer[ShiraSettings]):
    """Sparse update: y = W x + S x, with S zero except at N fixed positions.

    Shapes: x (..., I) -> y (..., O); values (N,), places (2, N) int32: rows and columns; N = R (I + O). Starts as the
    identity: values = 0. The positions are drawn without repetition, over the whole matrix. Raises: AdapterError if N
    exceeds the matrix, or a position is outside of it. Source: Bhardwaj et al. 2024.
    """

    values: nn.Parameter
    places: Tensor

    @classmethod
    def slots(cls, settings: ShiraSettings, target: Target) -> Slots:
        inputs, outputs = target.in_features, target.out_features
        count = (target.r or settings.r) * (inputs + outputs)
        if count > inputs * outputs:
            what = f"r {settings.r} needs {count} positions, but '{target.name}' has only {inputs * outputs} weights"
            limit = inputs * outputs // (inputs + outputs)
            raise AdapterError(what, f"use at most {limit}", key="adapter.r")
        places = Slot("shira_indices", (2, count), kind="saved", dtype=torch.int32)
        return {"values": Slot("shira_weight", (count,)), "places": places}

    def initialise(self, generator: Generator) -> None:
        super().initialise(generator)
        size = self.target.out_features * self.target.in_features
        chosen = torch.randperm(size, generator=generator)[: len(self.values)].sort().values
        self.places.copy_(torch.stack([chosen // self.target.in_features, chosen % self.target.in_features]))

    def check_state(self) -> None:
        highest = torch.tensor([[self.target.out_features], [self.target.in_features]], device=self.places.device)
        if bool(((self.places < 0) | (self.places >= highest)).any()):
            what = f"'{self.module_name}.shira_indices' contains positions outside of the matrix"
            raise AdapterError(what, "load the adapter over the base that it was trained on")

    def make(self, values: Tensor) -> Tensor:
        """The sparse matrix S (O, I)."""
        rows, columns = self.places.long()
        flat = values.new_zeros(self.target.out_features * self.target.in_features)
        flat = flat.index_put((rows * self.target.in_features + columns,), values, accumulate=True)
        return flat.reshape(self.target.out_features, self.target.in_features)


FIXED: Fixed = {
    "fan_in_fan_out": (False, True),  # the layer's own class decides
    "init_weights": (True, False),
    "mask_type": ("random", ANY),  # this and the next field say how the positions in the file were drawn
    "random_seed": (None, ANY),
}
ABSENT = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})
METHOD = Method(
    peft=PeftSide("SHIRA", ShiraSettings, same_names(r=32), FIXED, absent=ABSENT),
    layer=Shira,
    tensors=("shira_weight", "shira_indices"),
    is_linear=always_linear,
)
