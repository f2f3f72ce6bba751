"""Low-rank parts of a matrix.  Comes in: a matrix.  Goes out: singular values and vectors.  Next: the starts."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

OVERSAMPLING = 10  # Halko et al. 2011, section 4.2: 5 or 10


def largest_parts(
    matrix: Tensor, rank: int, iterations: int | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R,), V^T (R, I) of the R largest singular values of `matrix` (O, I).

    With `iterations`, by a random sketch that so many power iterations sharpen (Halko et al. 2011, algorithms 4.4 and
    5.1); None: exactly.
    """
    if iterations is None or rank + OVERSAMPLING >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    sketch = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator)  # (I, R + 10)
    q = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q  # (O, R + 10)
    for _ in range(iterations):
        q = torch.linalg.qr(matrix.t() @ q).Q  # (I, R + 10)
        q = torch.linalg.qr(matrix @ q).Q  # (O, R + 10)
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank]
