"""`adapter: {method: fourierft}` settings of FourierFT (Gao et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, CountOrZero, Positive, TargetedSettings


class FourierftSettings(TargetedSettings):
    """A few trained coefficients of the update's two-dimensional Fourier spectrum. 5000 coefficients and a scale of 300
    are those of PEFT's MetaMathQA comparison (Llama-3.2-3B), which measured .120 at its general rate of
    1e-4: try a higher one."""

    summary = "a sparse Fourier spectrum of the update"

    n_frequency: Count = Field(5000, description="trained coefficients per layer (PEFT's MetaMathQA comparison)")
    scaling: Positive = Field(300.0, description="scale of the update (PEFT's MetaMathQA comparison)")
    random_loc_seed: CountOrZero = Field(777, description="seed of the coefficients' places, as PEFT draws them")
