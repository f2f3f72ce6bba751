"""LoftQ initialisation of LoRA: A and B compensate the quantization error of W."""

from torch import Tensor

from tunekit.adapters.starts.decompose import largest_parts
from tunekit.adapters.starts.start import StartLayer


def make_start(settings: object, layer: StartLayer[Tensor]) -> tuple[Tensor, Tensor]:
    """s B A = the R largest singular components of D = W - dequantized(W), with D = U S V^T.

    A (R, I) = sqrt(S / s) V^T, B (O, R) = U sqrt(S / s). This is the first round of the paper's algorithm. Further
    rounds would quantize W - s B A again. Here the quantized base does not change, because other adapters share it.
    Evidence: W (O, I). Source: Li et al. 2023, algorithm 1.
    """
    packed = layer.weight()
    error = layer.evidence.to(packed.device, packed.dtype) - packed  # (O, I)
    u, s, vh = largest_parts(error, layer.rank, None, layer.generator)
    root = (s / layer.scaling).sqrt()  # (R,)
    return root[:, None] * vh, u * root
