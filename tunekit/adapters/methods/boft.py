"""BOFT, for linear layers and Conv1D, quantized or not."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot, Slots
from tunekit.adapters.blocks.rotations import cayley, rotate_blocks
from tunekit.adapters.folder.fields import ANY, LAYER_FIXED, Fixed, PeftFields, PeftSide
from tunekit.adapters.method import Method
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.boft import BoftSettings
from tunekit.records import Target


class Boft(LayerAdapter[BoftSettings]):
    """Butterfly rotation: y = s * (W R^T x) + bias, R = F_m ... F_1, each F_i a block rotation of permuted inputs.

    Shapes: x (..., I) -> y (..., O); Q (m, blocks, b, b), blocks * b = I (only the skew-symmetric part of Q is used); s
    (O, 1). F_i joins halves of blocks that are 2^(i - 1) blocks apart, so that m factors mix b 2^(m - 1) inputs. Starts
    as the identity: Q = 0, s = 1. Weight decay does not apply to s. Raises: AdapterError if blocks do not fit.
    Source: Liu et al. 2024, eq. 4 and figure 3.
    """

    q: nn.Parameter
    s: nn.Parameter

    @classmethod
    def slots(cls, settings: BoftSettings, target: Target) -> Slots:
        inputs, factors = target.in_features, settings.butterfly_factors
        size = settings.block_size or (inputs // settings.blocks if inputs % settings.blocks == 0 else 0)
        reach = size * 2 ** (factors - 1)
        if not reach or inputs % reach or (factors > 1 and size % 2):
            what = f"'{target.name}' has {inputs} inputs, which cannot be divided into these blocks"
            how = f"the block size times 2^{factors - 1} must divide {inputs}" + (
                ", and be even" if factors > 1 else ""
            )
            raise AdapterError(what, how, key="adapter.block_size" if settings.block_size else "adapter.blocks")
        return {
            "q": Slot("boft_R", (factors, inputs // size, size, size)),
            "s": Slot("boft_s", (target.out_features, 1), decays=False, first=1.0),
        }

    def rotate(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x R; x R^T if `transposed`."""
        factors, blocks, size, _ = self.q.shape
        rotations = cayley((self.q - self.q.transpose(-1, -2)) / 2).to(x.dtype)  # (m, blocks, b, b)
        for index in range(factors) if transposed else reversed(range(factors)):
            order = butterfly(blocks * size, size, index, x.device)
            rotation = rotations[index].transpose(-1, -2) if transposed else rotations[index]
            x = rotate_blocks(x[..., order.argsort()], rotation)[..., order]
        return x

    def adapted(self, x: Tensor) -> Tensor:
        y = self.base_output(self.rotate(x))  # (..., O)
        bias = self.base_weight().bias
        plain = y if bias is None else y - bias.to(y.dtype)
        return y + plain * (self.s[:, 0] - 1).to(y.dtype)  # exactly y where s = 1

    def merged_weight(self, weight: Tensor) -> Tensor:
        return (self.rotate(weight.to(self.q.device), transposed=True) * self.s).to(weight.device)


def butterfly(inputs: int, size: int, index: int, device: torch.device) -> Tensor:
    """The order of the inputs in which the blocks of factor `index` (from 0) are consecutive: (I,) int64.

    Groups of b 2^index consecutive inputs are cut into halves of blocks. Halves with even numbers come first, then
    halves with odd numbers.
    """
    if index == 0 and size % 2:
        return torch.arange(inputs, device=device)
    halves = torch.arange(2 ** (index + 1), device=device)  # the halves of one run; a run of the first factor has two
    order = torch.cat([halves[::2], halves[1::2]])
    run = torch.arange(size * 2**index, device=device).reshape(len(halves), size // 2)[order].flatten()
    starts = torch.arange(0, inputs, len(run), device=device)
    return (starts[:, None] + run).flatten()


def stored_factors(settings: BoftSettings, shapes: Mapping[str, tuple[int, ...]]) -> BoftSettings:
    """The settings with one butterfly factor, if the file contains one. Without its CUDA extension PEFT computes only
    one factor, but its configuration states the requested number."""
    stored = {shape[0] for name, shape in shapes.items() if name.endswith(".boft_R") and len(shape) == 4}
    return settings.model_copy(update={"butterfly_factors": 1}) if stored == {1} else settings


FIELDS: PeftFields = {
    "boft_block_size": ("block_size", 4),
    "boft_block_num": ("blocks", 0),
    "boft_n_butterfly_factor": ("butterfly_factors", 1),
}
FIXED: Fixed = {**LAYER_FIXED, "boft_dropout": (0.0, ANY)}  # used only in peft's training
METHOD = Method(peft=PeftSide("BOFT", BoftSettings, FIELDS, FIXED, stored=stored_factors), layer=Boft)
