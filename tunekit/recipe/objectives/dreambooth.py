"""`objective: dreambooth`: subject-driven generation. A diffusion model learns the subject of a few images under a rare
word, or each image under its own text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from tunekit.basics import Shows
from tunekit.recipe.bases.paths import NewPath
from tunekit.recipe.bases.section import (
    AutoOrBool,
    Count,
    NotNegative,
    Number,
    ObjectiveSettings,
    Positive,
    PublishedRate,
    Several,
    Text,
)

LEAST_SIDE, MOST_SIDE = 16, 4096  # pixels


def _buckets(value: object) -> object:
    """Checks aspect_ratio_buckets: `auto`, or a list of sizes, which become tuples (height, width). Raises:
    ValueError."""
    if value == "auto":
        return value
    pairs = value if isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) for pair in value) else ()
    sides = [side for pair in pairs for side in pair]
    if not sides or any(len(pair) != 2 for pair in pairs) or not all(type(side) is int for side in sides):
        raise ValueError("must be auto, or a list of [height, width] in pixels, such as [[512, 512], [512, 768]]")
    if not all(LEAST_SIDE <= side <= MOST_SIDE for side in sides):
        raise ValueError(f"has a side outside the range of {LEAST_SIDE} to {MOST_SIDE} pixels")
    return tuple((height, width) for height, width in pairs)


SIDE = {"type": "integer", "minimum": LEAST_SIDE, "maximum": MOST_SIDE}
PAIR = {"type": "array", "items": SIDE, "minItems": 2, "maxItems": 2}
Buckets = Annotated[
    str | tuple[tuple[int, int], ...],
    BeforeValidator(_buckets),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "array", "items": PAIR, "minItems": 1}]}),
]


class DreamboothSettings(ObjectiveSettings):
    """Settings of DreamBooth. The names and most defaults are from diffusers. Other defaults: center_crop (diffusers
    crops at random), weighting_scheme and resolution."""

    summary = "a diffusion model learns the subject of a few images"
    family = "diffusion"
    example = "image"
    answers = False
    supervised = True
    measures_training = True
    shows = Shows(unit="image", size_unit="pixel", draws="validation_prompts")
    medium = "image"
    first_order = 40
    first_lines = (
        ("  instance_prompt: a photo of sks thing", "replace `thing` with the kind of subject; keep the rare word sks"),
    )
    sums = ("loss", "units")
    default_learning_rate = PublishedRate(
        5e-4, "huggingface/diffusers, the default of examples/dreambooth/train_dreambooth_lora.py"
    )

    instance_prompt: Text | None = Field(
        None, description="text for images without a text in the data; it contains a rare word: a photo of sks dog"
    )
    resolution: Annotated[Count, Field(ge=LEAST_SIDE, le=MOST_SIDE)] | None = Field(
        None, description="side of the training images in pixels; null: the resolution that the pipeline was made for"
    )
    aspect_ratio_buckets: Buckets | None = Field(
        None,
        description="sizes to train on, a list of [height, width]. Each image is resized to the size with the nearest "
        "aspect ratio; `resolution` is then used for generated images only. auto: sizes of the usual aspect ratios "
        "with the area of a square of `resolution`, or smaller for smaller images; null: only the square of "
        "`resolution`",
    )
    center_crop: bool = Field(
        True, description="train on the middle of each image; false: train on a new random part in each step"
    )
    random_flip: bool = Field(False, description="mirror each image in half of the steps")
    train_text_encoder: bool = Field(False, description="also train an adapter for the text encoders")
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto",
        description="the quantity that the denoiser predicts; auto: the prediction type in the configuration of the "
        "pipeline's scheduler",
    )
    snr_gamma: Positive | None = Field(
        None, description="gamma of the loss weight min(SNR, gamma) (Hang et al. 2023); usually 5"
    )
    noise_offset: NotNegative = Field(
        0.0, description="strength of extra noise that is constant within each channel; usually 0.1"
    )
    weighting_scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = Field(
        "none",
        description="for pipelines with flow matching: the distribution of the timesteps, and the loss weight of each",
    )
    logit_mean: Number = Field(0.0, description="for logit_normal: mean of the timestep's logit")
    logit_std: Positive = Field(1.0, description="for logit_normal: standard deviation of the timestep's logit")
    mode_scale: NotNegative = Field(1.29, description="for mode: the scale s of its distribution (Esser et al. 2024)")
    class_prompt: Text | None = Field(
        None,
        description="prior preservation: the prompt with which the base generates class images, such as a photo of dog",
    )
    class_data_dir: NewPath | None = Field(
        None, description="folder of the class images; the base generates missing images before step 1"
    )
    num_class_images: Count = Field(100, description="number of class images")
    prior_loss_weight: NotNegative = Field(1.0, description="weight of the loss on the class images")
    cache_latents: AutoOrBool = Field(
        "auto",
        description="encode each image once, before step 1; auto: unless images are cropped at random or mirrored",
    )
    validation_prompts: Several[Text] = Field(
        (), description="prompts of images that each evaluation generates for the report"
    )
    num_inference_steps: Count = Field(25, description="number of denoising steps for each generated image")
    guidance_scale: NotNegative = Field(7.5, description="classifier-free guidance for generated images")
    validation_draws: Annotated[Count, Field(le=1000)] = Field(
        4,
        description="number of timesteps at which the loss of each evaluation image is measured, always with "
        "the same noise",
    )

    @classmethod
    def is_log_loss(cls, facts: Mapping[str, Any]) -> bool:
        return False

    @model_validator(mode="after")
    def _class_pictures_have_a_place(self) -> DreamboothSettings:
        if (self.class_prompt is None) != (self.class_data_dir is None):
            raise ValueError(
                "prior preservation needs class_prompt and class_data_dir (the folder of the class images); write both"
            )
        return self

    @property
    def varies(self) -> bool:
        """Whether the crop or the mirroring of an image changes from step to step."""
        return not self.center_crop or self.random_flip

    @property
    def caches(self) -> bool:
        """Whether latents are encoded before step 1."""
        return self.cache_latents is not False and not self.varies
