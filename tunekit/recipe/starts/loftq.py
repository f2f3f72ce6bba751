"""`start: loftq`: A and B correct the quantization error of each matrix (Li et al. 2023)."""

from tunekit.recipe.bases.section import StartSettings


class LoftqSettings(StartSettings):
    """B A is the best correction of rank r for the quantization error of each matrix."""

    summary = "the r largest singular values and vectors of W - dequantized(W)"
    divides_by_scaling = True
    looks_at = "original"
