"""The largest singular values of a matrix with their vectors, exact or fast."""

import torch
from torch import Generator, Tensor

LEAST_OVERSAMPLING = 10  # Halko et al. 2011, section 4.2; as many as the rank where that is more


def largest_parts(
    matrix: Tensor, rank: int, iterations: int | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R,), V^T (R, I) of the R largest singular values of `matrix` (O, I).

    With `iterations`, by a random sketch that so many power iterations sharpen (Halko et al. 2011, algorithms 4.4 and
    5.1); None: exactly.
    """
    width = rank + max(rank, LEAST_OVERSAMPLING)  # P
    if iterations is None or width >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    sketch = torch.randn(matrix.shape[1], width, generator=generator)  # (I, P)
    q = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q  # (O, P)
    for _ in range(iterations):
        q = torch.linalg.qr(matrix.t() @ q).Q  # (I, P)
        q = torch.linalg.qr(matrix @ q).Q  # (O, P)
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank]
