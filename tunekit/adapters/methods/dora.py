"""DoRA, for linear layers, Conv1D and embeddings, quantized or not."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tunekit.adapters.base import Slot, Slots
from tunekit.adapters.blocks.lora_fields import lora_side, start_conflicts
from tunekit.adapters.method import Conflict
from tunekit.adapters.methods.lora import METHOD as LORA
from tunekit.adapters.methods.lora import Lora
from tunekit.recipe.adapters.dora import DoraSettings
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.records import Target


class Dora(Lora):
    """Magnitude and direction: y = (m / n) (W + s B A) x + bias, n = |W + s B A| per output.

    Shapes: those of LoRA; m (O,), n (O,), for an embedding (D,). Starts as the identity: B = 0 and m = |W|. n is
    computed in float32 from the stored matrix, and the gradient treats it as a constant (section 4.3). Weight decay
    never applies to m. Dropout acts only on the update's input.
    Source: Liu et al. 2024, eq. 5 and 11.
    """

    magnitude: nn.Parameter

    @classmethod
    def slots(cls, settings: LowRankSettings, target: Target) -> Slots:
        magnitude = Slot("lora_magnitude_vector", (target.out_features,), decays=False)
        return {**super().slots(settings, target), "magnitude": magnitude}

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        self._set_magnitude()

    def initialise_from(self, generator: torch.Generator, evidence: object) -> None:
        super().initialise_from(generator, evidence)
        if evidence is not None:
            self._set_magnitude()

    def _set_magnitude(self) -> None:
        """Set m = n, so that the adapted layer computes (W + s B A) x at the start."""
        if self.base_weight().device.type == "meta":  # the values are loaded afterwards
            self.magnitude.data.fill_(1)
        else:
            self.magnitude.data.copy_(self.norm())

    def _norm(self, weight: Tensor) -> Tensor:
        """|weight| (O,) over inputs; for an embedding (V, D) over the vocabulary, as in PEFT."""
        return torch.linalg.vector_norm(weight, dim=0 if self.target.kind == "embedding" else 1)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """n, (O,) float32, without gradient."""
        weight = self.base_weight().read()
        return self._norm(weight.add_(self.delta().to(weight.device)))

    def adapted(self, x: Tensor) -> Tensor:
        y = self.base_output(x)  # (..., O)
        scale, bias = self.magnitude / self.norm(), self.effective_bias()  # (O,)
        unbiased = y if bias is None else y - bias.to(y.dtype)
        return y + unbiased * (scale - 1).to(y.dtype) + self.update(x).to(y.dtype) * scale.to(y.dtype)

    def low_rank(self, base_matrix: Callable[[], Tensor]) -> None:
        """Always None, because the magnitudes rescale the whole matrix."""

    def merged_weight(self, weight: Tensor) -> Tensor:
        merged = super().merged_weight(weight)
        scale = self.magnitude.to(weight.device) / self._norm(merged)
        return merged * (scale if self.target.kind == "embedding" else scale[:, None])


def _conflicts(settings: DoraSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    problems = start_conflicts(settings, targets, file)
    if settings.target_parameters:
        what = "a fused parameter has no output to scale, and PEFT's files cannot store its magnitudes"
        problems.append(Conflict("target_parameters", what, "use the method lora for it"))
    return problems


PEFT = lora_side(DoraSettings, claims={"use_dora": True})
METHOD = replace(LORA, peft=PEFT, layer=Dora, parameter=None, kernel=None, conflicts=_conflicts)
