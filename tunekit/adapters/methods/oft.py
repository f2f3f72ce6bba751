"""OFT, for linear layers and Conv1D, quantized or not."""

from dataclasses import dataclass

from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, PeftConfig, Slot, Slots
from tunekit.adapters.blocks.rotations import cayley, cayley_neumann, rotate_blocks, skew_of
from tunekit.adapters.folder.fields import ANY, LAYER_FIXED, Fixed, PeftFields, PeftSide, same_names
from tunekit.adapters.method import Method
from tunekit.errors import AdapterError
from tunekit.recipe.adapters.oft import OftSettings
from tunekit.records import Target


class Oft(LayerAdapter[OftSettings]):
    """Rotated inputs: y = W R^T x, R block-diagonal, each block the Cayley transform of a skew-symmetric Q.

    Shapes: x (..., I) -> y (..., O); upper triangles of Q (blocks, b (b - 1) / 2), blocks * b = I; one triangle with
    block_share. Starts as the identity: Q = 0, R = I. R is computed in float32 and cast to x's dtype. The matrix W is
    never read. Source: Qiu et al. 2023, eq. 4; Qiu et al. 2025, eq. 5 (the series).
    """

    q: nn.Parameter

    @classmethod
    def slots(cls, settings: OftSettings, target: Target) -> Slots:
        size = block_size(settings, target.in_features)
        blocks = 1 if settings.block_share else target.in_features // size
        return {"q": Slot("oft_R.weight", (blocks, size * (size - 1) // 2))}

    def rotation(self) -> Tensor:
        """The blocks of R, (blocks or 1, b, b)."""
        q = skew_of(self.q, block_size(self.settings, self.target.in_features))
        if self.settings.use_cayley_neumann:
            return cayley_neumann(q, self.settings.num_cayley_neumann_terms)
        return cayley(q)

    def adapted(self, x: Tensor) -> Tensor:
        return self.base_output(rotate_blocks(x, self.rotation().to(x.dtype)))

    def merged_weight(self, weight: Tensor) -> Tensor:
        return rotate_blocks(weight, self.rotation().to(weight.device).transpose(-1, -2))


def block_size(settings: OftSettings, inputs: int) -> int:
    """The block size b, as in peft: the divisor of `inputs` that is nearest to the setting (if two are equally near,
    the smaller one)."""
    wanted = min(settings.block_size or settings.blocks, inputs)
    divisor = min((d for d in range(1, inputs + 1) if inputs % d == 0), key=lambda d: (abs(d - wanted), d))
    return divisor if settings.block_size else inputs // divisor


FIELDS: PeftFields = {
    "r": ("blocks", 0),
    "oft_block_size": ("block_size", 32),
    **same_names(block_share=False, use_cayley_neumann=True, num_cayley_neumann_terms=5),
}
FIXED: Fixed = {
    **LAYER_FIXED,
    "coft": (False,),
    "eps": (6e-5, ANY),  # of coft
    "module_dropout": (0.0, ANY),  # used only in peft's training
}


@dataclass(frozen=True)
class OftSide(PeftSide[OftSettings]):
    """Converts to and from PEFT's fields. Before version 0.16, which added `use_cayley_neumann`, PEFT computed a
    different method under the same name."""

    def read(self, config: PeftConfig, file: str) -> OftSettings:
        if "use_cayley_neumann" not in config:
            what = "was written by peft before 0.16, whose OFT has other tensors and another formula"
            raise AdapterError(
                what, "merge the adapter into its base with the peft release that wrote it", file=file, key="peft_type"
            )
        return super().read(config, file)


METHOD = Method(peft=OftSide("OFT", OftSettings, FIELDS, FIXED), layer=Oft, tensors=("oft_R.weight",))
