"""RoAd, for linear layers and Conv1D, quantized or not."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunekit.adapters.base import LayerAdapter, Slot, Slots
from tunekit.adapters.blocks.divisors import divisor_conflicts
from tunekit.adapters.folder.fields import ANY, PeftSide, same_names
from tunekit.adapters.method import Conflict, Method
from tunekit.recipe.adapters.road import RoadSettings
from tunekit.records import Target

NUMBERS_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}  # number of angles per pair, and number of scales


class Road(LayerAdapter[RoadSettings]):
    """Rotated and scaled pairs of outputs: y = R (W x + b), R (p, q) = a (cos(t) p - sin(t) q, sin(t) p + cos(t) q).

    p is an output of the first half of a group, and q is its partner in the second half. The scale a and the angle t
    are shared by a pair (road_1), separate for its two results (road_2), or separate for the four terms (road_4).
    Shapes: x (..., I) -> y (..., O). Starts as the identity: t = 0, a = 1. Computed in float32, like IA3's scale.
    Source: Liao and Monz 2024, eq. 3 and 4.
    """

    theta: nn.Parameter
    alpha: nn.Parameter

    @classmethod
    def slots(cls, settings: RoadSettings, target: Target) -> Slots:
        size = target.out_features // 2 * NUMBERS_PER_PAIR[settings.variant]
        alpha = Slot("road_alpha", (size,), decays=False, first=1.0)
        return {"theta": Slot("road_theta", (size,), decays=False), "alpha": alpha}

    def columns(self) -> tuple[Tensor, Tensor]:
        """Two factors (O,) for each output: one for the output itself, one for its partner."""
        half = self.settings.group_size // 2
        theta: Tensor = self.theta
        alpha: Tensor = self.alpha
        if self.settings.variant == "road_4":
            theta, alpha = theta.reshape(-1, 2, 2 * half), alpha.reshape(-1, 2, 2 * half)
            return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
        if self.settings.variant == "road_1":  # the same for both halves of a group
            theta, alpha = (t.reshape(-1, 1, half).expand(-1, 2, -1).flatten() for t in (theta, alpha))
        return alpha * theta.cos(), alpha * theta.sin()

    def rotate(self, y: Tensor) -> Tensor:
        """R y over the last dimension, in y's dtype."""
        factor, partner_factor = self.columns()
        halves = y.reshape(*y.shape[:-1], -1, 2, self.settings.group_size // 2)
        swapped = torch.stack((-halves[..., 1, :], halves[..., 0, :]), dim=-2).reshape(y.shape)
        return (y * factor + swapped * partner_factor).to(y.dtype)

    def adapted(self, x: Tensor) -> Tensor:
        return self.rotate(self.base_layer(x))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            rotated = self.rotate(weight.to(self.theta.device).t()).t().contiguous().to(weight.device)
            return rotated, None if bias is None else self.rotate(bias.float().to(self.theta.device)).to(weight.device)


def _conflicts(settings: RoadSettings, targets: Sequence[Target], file: bool) -> list[Conflict]:
    if settings.group_size % 2:
        return [Conflict("group_size", f"{settings.group_size} is odd", "write an even number")]
    return divisor_conflicts("group_size", settings.group_size, targets, inputs=False)


ABSENT = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})
METHOD = Method(
    peft=PeftSide(
        "ROAD", RoadSettings, same_names(variant="road_1", group_size=64), {"init_weights": (True, ANY)}, absent=ABSENT
    ),
    layer=Road,
    conflicts=_conflicts,
)
