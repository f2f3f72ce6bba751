"""`start: loftq`: A and B make up for what quantization took from each matrix (Li et al. 2023)."""

from tunekit.recipe.bases.section import StartSettings


class LoftqSettings(StartSettings):
    """The best correction of rank r of a quantized base."""

    summary = "the r largest singular values of W - dequantized(W)"
    divides_by_scaling = True
    looks_at = "original"
