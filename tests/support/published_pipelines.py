"""Configurations of published pipelines, as their repositories have them, without what training does not ask.

CompVis/stable-diffusion-v1-4 and stabilityai/stable-diffusion-xl-base-1.0. Their weights are not needed: parameters are
counted on the meta device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_pipelines import tiny_tokenizer

UNET_PARAMETERS = {"sd14": 859_520_964, "sdxl": 2_567_463_684}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def _unet(**more: Any) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        **more,
    }


def _vae(**more: Any) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **more,
    }


def _clip(architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "projection_dim": 768,
        **more,
    }


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "sd14": {
        "unet": _unet(
            attention_head_dim=8,
            block_out_channels=[320, 640, 1280, 1280],
            cross_attention_dim=768,
            down_block_types=[*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            sample_size=64,
        ),
        "vae": _vae(sample_size=512),
        "text_encoder": _clip("CLIPTextModel", **CLIP_L),
        "scheduler": {
            "_class_name": "PNDMScheduler",
            **_BETAS,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
    },
    "sdxl": {
        "unet": _unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            attention_head_dim=[5, 10, 20],
            block_out_channels=[320, 640, 1280],
            cross_attention_dim=2048,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
        ),
        "vae": _vae(sample_size=1024, force_upcast=True, scaling_factor=0.13025),
        "text_encoder": _clip("CLIPTextModel", **CLIP_L),
        "text_encoder_2": _clip("CLIPTextModelWithProjection", **CLIP_BIG_G),
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler",
            **_BETAS,
            "steps_offset": 1,
            "prediction_type": "epsilon",
        },
    },
}
KINDS = {"sd14": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def written_pipeline(folder: Path, name: str) -> Path:
    """A folder with the configurations, a tokenizer of letters, and no weights."""
    index: dict[str, Any] = {"_class_name": KINDS[name]}
    for part, config in PARTS[name].items():
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config), "utf-8")
        library = "transformers" if part.startswith("text_encoder") else "diffusers"
        index[part] = [library, config.get("_class_name") or config["architectures"][0]]
        if part.startswith("text_encoder"):
            tiny_tokenizer().save_pretrained(folder / part.replace("text_encoder", "tokenizer"))
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder
