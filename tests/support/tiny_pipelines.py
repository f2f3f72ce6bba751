"""Diffusion pipelines as small as they can be, made in process and saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

KINDS = ("sd", "sdxl", "sd3")
SIZE = 16  # pixels of a side; latents have half as many
START, END = "<|startoftext|>", "<|endoftext|>"
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters alone: CLIP's byte alphabet, as it is and at the end of a word, and no merges."""
    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    return CLIPTokenizer(vocab={name: place for place, name in enumerate(names)}, merges=[], model_max_length=77)


def text_encoder(kind: Any, seed: int, width: int = 16) -> Any:
    torch.manual_seed(seed)
    return kind(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=24,
            projection_dim=width,
            num_attention_heads=2,
            num_hidden_layers=3,
            max_position_embeddings=77,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def tiny_vae(**more: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        **more,
    )


def tiny_unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **{
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            **more,
        },
    )


def tiny_pipeline(kind: str, prediction: str = "epsilon") -> Any:
    """sd (Stable Diffusion 1.x's parts), sdxl, or sd3 (a transformer with flow matching)."""
    vae = tiny_vae(**({"shift_factor": 0.06, "scaling_factor": 1.5} if kind == "sd3" else {}))
    tokenizer = tiny_tokenizer()
    if kind == "sd":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder(CLIPTextModel, 3),
            tokenizer=tokenizer,
            unet=tiny_unet(),
            scheduler=DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    first, second = text_encoder(CLIPTextModel, 3), text_encoder(CLIPTextModelWithProjection, 4)
    if kind == "sdxl":
        unet = tiny_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
            transformer_layers_per_block=(2, 1),
        )
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(**BETAS, prediction_type=prediction),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder(CLIPTextModelWithProjection, 3),
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def saved_pipeline(folder: Path, kind: str, prediction: str = "epsilon") -> Path:
    """The folder with it."""
    tiny_pipeline(kind, prediction).save_pretrained(folder)
    return folder


def loaded_by_diffusers(folder: Path, kind: str) -> Any:
    """diffusers' own pipeline of a folder; of sd3 without the third text encoder, as where memory is short."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(str(folder), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
