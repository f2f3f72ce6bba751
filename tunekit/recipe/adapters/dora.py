"""`adapter: {method: dora}`: settings of DoRA (Liu et al. 2024)."""

from tunekit.recipe.bases.low_rank import LowRankSettings


class DoraSettings(LowRankSettings):
    """A low-rank update changes the direction of the weights; a trained vector changes their magnitude. The base may be
    quantized."""

    summary = "a low-rank direction and a trained magnitude of each output"
