"""`model:` the base model, and how to load it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from tunekit.recipe.bases.paths import ModelPath
from tunekit.recipe.bases.section import Section, Several, Text
from tunekit.recipe.reading.names import known_names

Quantization = Literal["none", "nf4", "fp4", "int8", "int8_weight_only", "fp8", "kept"]
FAMILIES = ("auto", *known_names("families"))


def _family(value: object) -> str:
    if not isinstance(value, str) or value not in FAMILIES:
        raise PydanticCustomError("literal_error", "unknown family", {"expected": ", ".join(FAMILIES)})
    return value


FamilyName = Annotated[str, BeforeValidator(_family), WithJsonSchema({"enum": list(FAMILIES), "type": "string"})]


class ModelSection(Section):
    """The base model. `name_or_path`: a local folder, a .gguf file, or a hub id."""

    short = "name_or_path"

    name_or_path: ModelPath = Field(description="a local folder, a .gguf file, or a hub id")
    revision: Text = Field("main", description="branch, tag or commit of a hub id")
    family: FamilyName = Field("auto", description="the kind of model; auto reads it from the model's configuration")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="compute dtype; auto: bfloat16 if the device supports it natively, float16 with a loss scale on "
        "other CUDA devices (T4, RTX 20xx), else float32",
    )
    quantization: Quantization = Field(
        "none", description="the storage of the frozen base weights; kept: the quantized blocks of the .gguf file"
    )
    double_quantization: bool = Field(True, description="also quantize the scales of nf4 and fp4")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention implementation"
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model folder; read the code first")

    @classmethod
    def of(cls, section: ModelSection, **facts: object) -> Self:
        """Makes a section of this class from the fields of `section` and from `facts`, the fields that this class
        adds."""
        return cls.model_validate({**section.model_dump(), **facts})


class HeadedModel(ModelSection):
    """Settings of a base that is loaded with a head, which has one output per label.

    `new_head`: the head in the base's files has other labels, so a new head replaces it; `head_seed`: the new
    head's seed;
    `head_pad_id`: the pad token, if the base's configuration has none; `problem_type`: transformers' name of the task;
    `thresholds`: for several labels per row, the probability at which each label is predicted; empty: 0.5;
    `head_bias`: the initial biases of a new head; empty: 0. `head_rows`: two ids; a new head with one output starts as
    the difference of their rows in the base's output projection; empty: it starts at random.
    """

    labels: tuple[str, ...]
    new_head: bool = False
    head_seed: int = 0
    head_pad_id: int | None = None
    problem_type: str | None = None
    thresholds: Several[float] = ()
    head_bias: Several[float] = ()
    head_rows: Several[int] = ()


class HeadlessModel(ModelSection):
    """Settings of a base that is loaded without its head, whatever head its files have."""


class ImageModel(ModelSection):
    """Settings of a composite base whose rows have images, so that the parts that read images are loaded."""


class PipelineModel(ModelSection):
    """Settings of a diffusion pipeline. `trained`: the names of the networks with an adapter; `stays`: whether the
    other networks stay on the device, because every step needs them."""

    trained: tuple[str, ...] = ()
    stays: bool = False
