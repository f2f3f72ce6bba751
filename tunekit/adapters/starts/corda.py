"""CorDA initialisation of LoRA: A and B from W and the covariance of its inputs."""

import torch
from torch import Tensor

from tunekit.adapters.starts.start import LayerActivations, StartLayer
from tunekit.errors import NumericsError
from tunekit.machine.devices import as_float64
from tunekit.recipe.starts.corda import CordaSettings
from tunekit.records import Target

DAMPING, WORST_INVERSE = 0.01, 0.05  # the authors' values
MAX_DAMPING = 1e6


class CordaStatistics:
    """The covariance C (I, I) of a layer's inputs: the mean over rows of X^T X. As in the authors' code, each row's X
    (T, I) is first divided by its largest element."""

    def __init__(self, settings: CordaSettings, target: Target) -> None:
        self.count = 0
        self.covariance = torch.zeros(0)

    def add(self, activations: LayerActivations) -> None:
        """Add one micro-batch."""
        for row in set(activations.rows.tolist()):
            x = activations.inputs[activations.rows == row]  # (T, I)
            largest = x.max().abs()
            x = x / torch.where(largest > 0, largest, x.abs().max().clamp(min=torch.finfo(x.dtype).tiny))
            product = x.t() @ x
            self.covariance = product if not self.count else self.covariance.add_(product)
            self.count += 1

    def finish(self) -> Tensor:
        """The mean C (I, I) over all rows."""
        return self.covariance / max(self.count, 1)


def statistics_bytes(settings: CordaSettings, target: Target) -> int:
    """Bytes of CordaStatistics for one layer."""
    return torch.float32.itemsize * target.in_features**2


def make_start(settings: CordaSettings, layer: StartLayer[Tensor]) -> tuple[Tensor, Tensor]:
    """s B A = the R largest (`ipm`) or smallest (`kpm`) singular components of W C = U S V^T, multiplied by C^-1.

    A (R, I) = sqrt(S / s) V^T C^-1, B (O, R) = U sqrt(S / s); C is damped until it is invertible. The computation is in
    float64. Source: Yang et al. 2024, eq. 3 to 6.
    """
    weight = as_float64(layer.weight())
    covariance, inverse = _invertible(layer.evidence.to(weight.device, weight.dtype), layer.name)
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    chosen = slice(None, layer.rank) if settings.mode == "ipm" else slice(len(s) - layer.rank, None)
    root = (s[chosen] / layer.scaling).sqrt()  # (R,)
    return root[:, None] * (vh[chosen] @ inverse), u[:, chosen] * root


def _invertible(covariance: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """C + d mean(diag C) 1 (I, I) and its inverse; d doubles until the inverse is accurate."""
    one = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    mean, damping = covariance.diagonal().mean(), DAMPING
    while damping < MAX_DAMPING:
        damped = covariance + damping * mean * one
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, one) < WORST_INVERSE:
            return damped, inverse
        damping *= 2
    what = f"the covariance of the inputs of {name} cannot be inverted"
    raise NumericsError(what, "check the rows and the base")


STATISTICS = CordaStatistics
