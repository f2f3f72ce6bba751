"""`adapter: {method: p_tuning}`: settings of p-tuning (Liu et al. 2021)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunekit.recipe.bases.section import AdapterSettings, Count, Fraction, PublishedRate, Several, Text
from tunekit.recipe.bases.virtual_tokens import MODULES_TO_SAVE, NUM_TRANSFORMER_SUBMODULES, NUM_VIRTUAL_TOKENS

MLP_LAYERS = 2  # PEFT's only MLP has three matrices


class PTuningSettings(AdapterSettings):
    """Vectors before each row, which a small network computes from a trained table. Checkpoints contain the network;
    adapter folders contain only the vectors."""

    summary = "vectors before each row, computed by a trained encoder"
    merges = False
    default_learning_rate = PublishedRate(
        1e-4, "huggingface/peft, pull request 3356: MetaMathQA accuracy .382 at 1e-4 and .353 at 5e-4, 20 tokens, MLP"
    )

    num_virtual_tokens: Count = NUM_VIRTUAL_TOKENS
    num_transformer_submodules: Literal[1, 2] = NUM_TRANSFORMER_SUBMODULES
    modules_to_save: Several[Text] = MODULES_TO_SAVE
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP",
        description="the encoder that computes the vectors. MLP: three matrices; LSTM: a bidirectional LSTM and two "
        "matrices",
    )
    encoder_hidden_size: Count | None = Field(
        None, description="width of the encoder; by default the width of the base"
    )
    encoder_num_layers: Count = Field(MLP_LAYERS, description="number of layers of the LSTM")
    encoder_dropout: Fraction = Field(0.0, description="dropout between the layers of the LSTM in training")

    @model_validator(mode="after")
    def _what_the_encoder_has(self) -> PTuningSettings:
        if self.init_from is not None:
            raise ValueError(
                "p_tuning cannot continue from init_from, because an adapter folder contains the vectors, not the "
                "network that computes them; remove init_from"
            )
        lstm = self.encoder_reparameterization_type == "LSTM"
        if not lstm and (self.encoder_num_layers != MLP_LAYERS or self.encoder_dropout):
            raise ValueError(
                "encoder_num_layers needs encoder_reparameterization_type: LSTM, and so does encoder_dropout"
            )
        if lstm and self.encoder_dropout and self.encoder_num_layers == 1:
            raise ValueError("encoder_dropout acts between layers of the LSTM, so encoder_num_layers must be 2 or more")
        return self
