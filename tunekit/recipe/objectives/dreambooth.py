"""`objective: dreambooth` a diffusion model learns what a few pictures show, under a rare word, or each under its own
text."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.recipe.section import (
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


class DreamboothSettings(ObjectiveSettings):
    """diffusers' names; its defaults but for center_crop, which it leaves to chance."""

    family: ClassVar[str] = "diffusion"
    example: ClassVar[str] = "image"
    answers: ClassVar[bool] = False
    supervised: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    unit: ClassVar[str] = "picture"
    size_unit: ClassVar[str] = "pixel"
    sums: ClassVar[tuple[str, ...]] = ("loss", "units")
    default_learning_rate: ClassVar[PublishedRate | None] = PublishedRate(
        5e-4, "huggingface/diffusers, the default of examples/dreambooth/train_dreambooth_lora.py"
    )

    method: Literal["dreambooth"] = Field("dreambooth", description="a diffusion model learns what pictures show")
    instance_prompt: Text | None = Field(
        None, description="what every picture without a text of its own shows, with a rare word: a photo of sks dog"
    )
    resolution: Annotated[Count, Field(ge=16, le=4096)] | None = Field(
        None, description="pixels of a side that is trained on; null: for which the pipeline was made"
    )
    center_crop: bool = Field(True, description="the middle of each picture; false: another part in each step")
    random_flip: bool = Field(False, description="each picture mirrored in half of the steps")
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
        None, description="prior preservation: what the base's own pictures show, such as a photo of dog"
    )
    class_data_dir: Text | None = Field(
        None, description="the folder of those pictures; what it lacks is drawn by the base before step 1"
    )
    num_class_images: Count = Field(100, description="how many of them there are to be")
    prior_loss_weight: NotNegative = Field(1.0, description="weight of their loss")
    cache_latents: AutoOrBool = Field(
        "auto",
        description="encode each picture once, before step 1; auto: where nothing of it changes from step to step",
    )
    validation_prompts: Several[Text] = Field((), description="pictures for the report, drawn at each evaluation")
    num_inference_steps: Count = Field(25, description="of each drawn picture")
    guidance_scale: NotNegative = Field(7.5, description="of each drawn picture")
    validation_draws: Annotated[Count, Field(le=1000)] = Field(
        4, description="times of the schedule at which each evaluation picture is measured, always with the same noise"
    )

    @model_validator(mode="after")
    def _class_pictures_have_a_place(self) -> DreamboothSettings:
        if (self.class_prompt is None) != (self.class_data_dir is None):
            raise ValueError(
                "prior preservation needs class_prompt, what the pictures show, and class_data_dir, where they lie"
            )
        return self
