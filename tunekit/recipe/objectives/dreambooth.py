"""`objective: dreambooth` a diffusion model learns what a few pictures show, under a rare word, or each under its own
text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

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
from tunekit.records import Shows

LEAST_SIDE, MOST_SIDE = 16, 4096  # pixels


def _buckets(value: object) -> object:
    """auto, or sizes as tuples."""
    if value == "auto":
        return value
    pairs = value if isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) for pair in value) else ()
    sides = [side for pair in pairs for side in pair]
    if not sides or any(len(pair) != 2 for pair in pairs) or not all(type(side) is int for side in sides):
        raise ValueError("must be auto, or sizes in pixels, such as [[512, 512], [512, 768]], heights first")
    if not all(LEAST_SIDE <= side <= MOST_SIDE for side in sides):
        raise ValueError(f"must have sides of {LEAST_SIDE} to {MOST_SIDE} pixels")
    return tuple((height, width) for height, width in pairs)


SIDE = {"type": "integer", "minimum": LEAST_SIDE, "maximum": MOST_SIDE}
PAIR = {"type": "array", "items": SIDE, "minItems": 2, "maxItems": 2}
Buckets = Annotated[
    str | tuple[tuple[int, int], ...],
    BeforeValidator(_buckets),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "array", "items": PAIR, "minItems": 1}]}),
]


class DreamboothSettings(ObjectiveSettings):
    """diffusers' names; its defaults but for center_crop, which it leaves to chance."""

    summary = "a diffusion model learns what images show"
    family = "diffusion"
    example = "image"
    answers = False
    supervised = True
    measures_training = True
    shows = Shows(unit="image", size_unit="pixel", draws="validation_prompts")
    medium = "image"
    first_order = 40
    first_lines = (("  instance_prompt: a photo of sks thing", "name what it is, and keep the rare word sks"),)
    sums = ("loss", "units")
    default_learning_rate = PublishedRate(
        5e-4, "huggingface/diffusers, the default of examples/dreambooth/train_dreambooth_lora.py"
    )

    instance_prompt: Text | None = Field(
        None, description="what every image without a text of its own shows, with a rare word: a photo of sks dog"
    )
    resolution: Annotated[Count, Field(ge=LEAST_SIDE, le=MOST_SIDE)] | None = Field(
        None, description="pixels of a side that is trained on; null: for which the pipeline was made"
    )
    aspect_ratio_buckets: Buckets | None = Field(
        None,
        description="sizes that are trained on, [height, width] each; every image goes to the one nearest in aspect "
        "ratio, and `resolution` is that of drawn images alone. auto: those of the usual ratios with as many pixels "
        "as a square of `resolution`, or with fewer for an image that is smaller; null: that square",
    )
    center_crop: bool = Field(True, description="the middle of each image; false: another part in each step")
    random_flip: bool = Field(False, description="each image mirrored in half of the steps")
    train_text_encoder: bool = Field(False, description="an adapter for the text encoders too")
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the denoiser predicts; auto: as the pipeline's scheduler says"
    )
    snr_gamma: Positive | None = Field(
        None, description="weigh steps by min(SNR, gamma), as the paper of Hang et al. 2023 does; 5 is usual"
    )
    noise_offset: NotNegative = Field(0.0, description="of the noise of each channel as a whole; 0.1 is usual")
    weighting_scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = Field(
        "none", description="of pipelines with flow matching: how times are drawn and weighed"
    )
    logit_mean: Number = Field(0.0, description="of logit_normal")
    logit_std: Positive = Field(1.0, description="of logit_normal")
    mode_scale: NotNegative = Field(1.29, description="of mode")
    class_prompt: Text | None = Field(
        None, description="prior preservation: what the base's own images show, such as a photo of dog"
    )
    class_data_dir: NewPath | None = Field(
        None, description="the folder of those images; what it lacks is drawn by the base before step 1"
    )
    num_class_images: Count = Field(100, description="how many of them there are to be")
    prior_loss_weight: NotNegative = Field(1.0, description="weight of their loss")
    cache_latents: AutoOrBool = Field(
        "auto",
        description="encode each image once, before step 1; auto: where nothing of it changes from step to step",
    )
    validation_prompts: Several[Text] = Field((), description="images for the report, drawn at each evaluation")
    num_inference_steps: Count = Field(25, description="of each drawn image")
    guidance_scale: NotNegative = Field(7.5, description="of each drawn image")
    validation_draws: Annotated[Count, Field(le=1000)] = Field(
        4, description="times of the schedule at which each evaluation image is measured, always with the same noise"
    )

    @model_validator(mode="after")
    def _class_pictures_have_a_place(self) -> DreamboothSettings:
        if (self.class_prompt is None) != (self.class_data_dir is None):
            raise ValueError(
                "prior preservation needs class_prompt, what the images show, and class_data_dir, where they lie"
            )
        return self

    @property
    def varies(self) -> bool:
        """Whether an image differs from step to step."""
        return not self.center_crop or self.random_flip

    @property
    def caches(self) -> bool:
        """Whether latents are encoded before step 1."""
        return self.cache_latents is not False and not self.varies
