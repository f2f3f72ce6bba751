"""The largest singular values of a matrix with their vectors, exact or approximate."""

import torch
from torch import Generator, Tensor

MIN_OVERSAMPLING = 10  # Halko et al. 2011, section 4.2; or the rank if that is larger


def largest_parts(
    matrix: Tensor, rank: int, iterations: int | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The R largest singular values S (R,) of `matrix` (O, I), with their vectors U (O, R) and V^T (R, I); returns U,
    S, V^T.

    `iterations`: the number of power iterations of a random sketch (Halko et al. 2011, algorithms 4.4 and 5.1); None:
    exact.
    """
    width = rank + max(rank, MIN_OVERSAMPLING)  # P
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
