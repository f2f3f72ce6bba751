"""`adapter: {method: vblora}`: settings of VB-LoRA (Li et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, Fraction, Positive, TargetedSettings


class VbloraSettings(TargetedSettings):
    """Both factors of every layer's update are mixtures of a few vectors from one shared bank. The defaults are from
    PEFT's VBLoRAConfig, as in PEFT's MetaMathQA comparison."""

    summary = "updates mixed from the vectors of one shared bank"

    r: Count = Field(4, description="rank")
    num_vectors: Count = Field(256, description="number of vectors in the bank")
    vector_length: Count = Field(
        256, description="length of a vector; it must divide the inputs and outputs of every layer"
    )
    topk: Count = Field(2, description="number of bank vectors mixed into each sub-vector of a factor")
    dropout: Fraction = fields.DROPOUT
    init_vector_bank_bound: Positive = Field(
        0.02, description="the initial numbers of the bank are uniform between minus and plus this bound"
    )
    init_logits_std: Positive = Field(0.1, description="standard deviation of the initial mixing logits")
