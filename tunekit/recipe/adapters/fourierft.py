"""`adapter: {method: fourierft}`: settings of FourierFT (Gao et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases.section import Count, CountOrZero, Positive, TargetedSettings


class FourierftSettings(TargetedSettings):
    """A few trained coefficients of the update's two-dimensional Fourier spectrum. PEFT's MetaMathQA comparison
    (Llama-3.2-3B) used 5000 coefficients and a scale of 300, and measured an accuracy of .120 at its general learning
    rate of 1e-4: try a higher rate."""

    summary = "a sparse Fourier spectrum of the update"

    n_frequency: Count = Field(
        5000, description="number of trained coefficients per layer (as in PEFT's MetaMathQA comparison)"
    )
    scaling: Positive = Field(300.0, description="scale of the update (as in PEFT's MetaMathQA comparison)")
    random_loc_seed: CountOrZero = Field(777, description="seed of the coefficients' positions, drawn as in PEFT")
