"""`adapter: {method: dora}` settings of DoRA (Liu et al. 2024)."""

from tunekit.recipe.bases.low_rank import LowRankSettings


class DoraSettings(LowRankSettings):
    """Direction by a low-rank update, magnitude by a trained vector; the base may be quantized."""

    summary = "a low-rank direction and a trained magnitude of each output"
