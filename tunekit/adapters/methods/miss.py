"""MiSS, for linear layers and Conv1D, quantized or not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.blocks.delta_product import delta_product
from tunekit.adapters.folder.fields import PeftFields, PeftSide
from tunekit.adapters.method import Method
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.miss import MissSettings
from tunekit.records import Target


class Miss(LayerAdapter[MissSettings]):
    """Shared shards: y = W x + S^T (sum over the blocks of x), with x cut into blocks of R (the last one padded with
    zeros).

    Shapes: x (..., I) -> y (..., O); S (R, O); variant `mini`: (R, mini_r), repeated; variant `bat`: (O / R, R, R).
    `bat` cuts W into blocks W_ij (R, R) and adds W_ij S_i + S_i to each. Starts as the identity: S = 0.
    Raises: AdapterError if a variant's blocks do not divide the matrix. Source: Kang and Yin 2024, eq. 3 and 5.
    """

    s: nn.Parameter

    @classmethod
    def slots(cls, settings: MissSettings, target: Target) -> Slots:
        rank, inputs, outputs = target.r or settings.r, target.in_features, target.out_features
        if settings.variant == "balance":
            return {"s": Slot("miss_block", (rank, outputs))}
        bat = settings.variant == "bat"
        if (inputs % rank or outputs % rank) if bat else outputs % settings.mini_r:
            key, size = ("r", rank) if bat else ("mini_r", settings.mini_r)
            what = f"{key} {size} does not divide '{target.name}' ({outputs} x {inputs})"
            raise AdapterError(what, "choose a divisor, or variant: balance", key=f"adapter.{key}")
        shape = (outputs // rank, rank, rank) if bat else (rank, settings.mini_r)
        return {"s": Slot("miss_block", shape)}

    def shard(self) -> Tensor:
        """The matrix S (R, O)."""
        return self.s.repeat(1, self.target.out_features // self.s.shape[1])

    def update(self, x: Tensor) -> Tensor:
        if self.settings.variant == "bat":
            return delta_product(x, self.bat, self.s)
        x = F.pad(self.apply_dropout(x), (0, -x.shape[-1] % self.s.shape[0]))
        x = x.reshape(*x.shape[:-1], -1, self.s.shape[0]).sum(-2)  # (..., R)
        return x @ self.shard().to(x.dtype)

    def bat(self, s: Tensor) -> Tensor:
        """The update (O, I) of this layer's matrix W, in the variant `bat`."""
        return _bat(self.base_weight().read(s.dtype), s)

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> tuple[Tensor, Tensor] | None:
        if self.settings.variant == "bat":
            return None
        shard, inputs = self.shard(), self.target.in_features
        blocks = torch.eye(len(shard), device=shard.device).repeat(1, -(-inputs // len(shard)))  # sums the blocks of x
        return blocks[:, :inputs], shard.t()

    def merged_weight(self, weight: Tensor) -> Tensor:
        if self.settings.variant == "bat":
            return weight + _bat(weight, self.s.to(weight.device))
        shard = self.shard().t().to(weight.device)  # (O, R)
        return weight + shard.repeat(1, -(-weight.shape[1] // shard.shape[1]))[:, : weight.shape[1]]


def _bat(weight: Tensor, s: Tensor) -> Tensor:
    """W_ij S_i + S_i of all blocks, as one matrix (O, I)."""
    rank = s.shape[-1]
    blocks = weight.reshape(-1, rank, weight.shape[1] // rank, rank).transpose(1, 2)  # (O / R, I / R, R, R)
    return (blocks @ s[:, None] + s[:, None]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class MissSide(PeftSide[MissSettings]):
    """Converts to and from PEFT's fields. PEFT's `init_weights` names the variant: `true` is MiSS without a variant;
    `false` differs from `true` only in the initialisation."""

    def write(self, settings: MissSettings) -> PeftConfig:
        written = super().write(settings)
        return written | {"init_weights": True if settings.variant == "balance" else settings.variant}

    def read(self, config: PeftConfig, file: str) -> MissSettings:
        variant = config.get("init_weights", True)
        return super().read({**config, "init_weights": "balance" if isinstance(variant, bool) else variant}, file)


FIELDS: PeftFields = {
    "r": ("r", 64),
    "init_weights": ("variant", "balance"),
    "mini_r": ("mini_r", 1),
    "miss_dropout": ("dropout", 0.0),
}
METHOD = Method(
    peft=MissSide("MISS", MissSettings, FIELDS, {"bias": ("none",)}),
    layer=Miss,
    tensors=("miss_block",),
    is_linear=lambda settings: settings.variant != "bat",
)
