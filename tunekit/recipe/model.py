"""`model:` which base to load and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunekit.recipe.section import Section

Quantization = Literal["none", "nf4", "fp4", "int8", "int8_weight_only"]


class ModelSection(Section):
    """The base model. `name_or_path`: a local folder, a .gguf file, or a hub id."""

    name_or_path: str = Field(min_length=1)
    revision: str = "main"
    family: Literal["auto", "causal", "seq2seq", "classifier", "speech", "diffusion"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "none"
    double_quantization: bool = True
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
