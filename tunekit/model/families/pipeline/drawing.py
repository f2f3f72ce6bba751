"""Generates images from prompts and seeds with a diffusion pipeline, with or without an adapter.

diffusers' own pipeline class runs the sampling steps with the loaded models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.model.families.pipeline.parts import TEXT_ENCODERS, PipelineNet, import_diffusers
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.model.transformers_guard import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@dataclass(frozen=True)
class Drawing:
    """Sampling settings of an image; `height` and `width` are in pixels."""

    steps: int
    guidance_scale: float
    height: int
    width: int


@torch.no_grad()
def draw_pictures(
    net: PipelineNet, processor: PipelineProcessor, prompts: Sequence[str], seeds: Sequence[int], how: Drawing
) -> list[NDArray[np.uint8]]:
    """Draw an image (H, W, 3) for each prompt. An image depends only on its own prompt and seed."""
    device = next(net.denoiser.parameters()).device
    pictures = []
    with quiet(), net.frozen_parts_on(device):
        pipeline = _pipeline(net, processor)
        pipeline.set_progress_bar_config(disable=True)
        for prompt, seed in zip(prompts, seeds, strict=True):
            latents = pipeline(
                prompt,
                num_inference_steps=how.steps,
                guidance_scale=how.guidance_scale,
                height=how.height,
                width=how.width,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                return_dict=False,
            )[0]
            pictures.append(decode_latents(net, latents))
    return pictures


def decode_latents(net: PipelineNet, latents: Tensor) -> NDArray[np.uint8]:
    """Decode latents (1, C, H, W) to pixels (H, W, 3) with the VAE, in float32."""
    vae = net.part("vae")
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    picture = vae.decode(latents.float() / vae.config.scaling_factor + shift, return_dict=False)[0]  # (1, 3, H, W)
    pixels = ((picture[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    return np.asarray(pixels.cpu().numpy(), np.uint8)


def _pipeline(net: PipelineNet, processor: PipelineProcessor) -> DiffusionPipeline:
    diffusers, kind = import_diffusers(), net.config.model_type
    scheduler = processor.configs["scheduler"]
    parts: dict[str, object] = {
        "scheduler": getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        "vae": net.part("vae"),
        ("transformer" if kind == "StableDiffusion3Pipeline" else "unet"): net.denoiser,
    }
    if kind == "StableDiffusionPipeline":
        parts |= UNCHECKED
    count = {"StableDiffusionPipeline": 1, "StableDiffusionXLPipeline": 2}.get(kind, 3)
    for name in TEXT_ENCODERS[:count]:
        parts[name] = net.part(name)
        parts[name.replace("text_encoder", "tokenizer")] = processor.tokenizers.get(name)
    if kind == "StableDiffusionXLPipeline":
        parts["add_watermarker"] = False
    return getattr(diffusers, kind)(**parts)
