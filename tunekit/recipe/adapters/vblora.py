"""`adapter: {method: vblora}` settings of VB-LoRA (Li et al. 2024)."""

from pydantic import Field

from tunekit.recipe.bases import fields
from tunekit.recipe.bases.section import Count, Fraction, Positive, TargetedSettings


class VbloraSettings(TargetedSettings):
    """Both factors of every layer's update are made of a few vectors of one shared bank. The initial values are those
    of PEFT's VBLoRAConfig, with which its MetaMathQA comparison was run."""

    summary = "updates made of vectors of one shared bank"

    r: Count = Field(4, description="rank")
    num_vectors: Count = Field(256, description="vectors in the bank")
    vector_length: Count = Field(256, description="length of a vector; it must divide both sides of every layer")
    topk: Count = Field(2, description="vectors mixed for each piece of a factor")
    dropout: Fraction = fields.DROPOUT
    init_vector_bank_bound: Positive = Field(0.02, description="the bank starts uniform within this bound")
    init_logits_std: Positive = Field(0.1, description="spread of the initial mixing logits")
