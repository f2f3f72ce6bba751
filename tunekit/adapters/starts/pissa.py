"""PiSSA initialisation of LoRA: A and B are the principal part of W."""

from torch import Tensor

from tunekit.adapters.starts.decompose import largest_parts
from tunekit.adapters.starts.start import StartLayer
from tunekit.recipe.starts.pissa import PissaSettings


def make_start(settings: PissaSettings, layer: StartLayer[object]) -> tuple[Tensor, Tensor]:
    """s B A = the part of W = U S V^T with the R largest singular values.

    A (R, I) = sqrt(S / s) V^T, B (O, R) = U sqrt(S / s). Source: Meng et al. 2024, eq. 2 and 3.
    """
    u, s, vh = largest_parts(layer.weight(), layer.rank, settings.iterations, layer.generator)
    root = (s / layer.scaling).sqrt()  # (R,)
    return root[:, None] * vh, u * root
