"""`start: loftq`: A and B correct the quantization error of each matrix (Li et al. 2023)."""

from tunekit.recipe.bases.section import StartSettings


class LoftqSettings(StartSettings):
    """The best correction of rank r for the error of a quantized base."""

    summary = "the r largest singular values of W - dequantized(W)"
    divides_by_scaling = True
    looks_at = "original"
