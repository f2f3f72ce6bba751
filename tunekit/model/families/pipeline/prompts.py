"""Computes prompt embeddings for a denoiser with the pipeline's text encoders. The embeddings have a gradient if a text
encoder is trained. They are equal to the results of diffusers' encode_prompt."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tunekit.contracts import Tensors
from tunekit.model.families.pipeline.parts import PipelineNet
from tunekit.model.families.pipeline.processor import T5_LENGTH


def encode_prompts(net: PipelineNet, ids: Mapping[str, Tensor]) -> Tensors:
    """Compute the embeddings `prompt` (B, T, D) and, except for Stable Diffusion 1 and 2, `pooled` (B, P). `ids`: the
    token ids (B, T) for each text encoder."""
    encoders = net.text_encoders
    if net.config.model_type == "StableDiffusionPipeline":
        return {"prompt": encoders["text_encoder"](ids["text_encoder"])[0]}
    outputs = [encoders[name](ids[name], output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    prompt = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (B, T, D)
    if net.config.model_type == "StableDiffusionXLPipeline":
        return {"prompt": prompt, "pooled": outputs[1][0]}
    width = int(net.config.part_configs["transformer"]["joint_attention_dim"])
    prompt = torch.nn.functional.pad(prompt, (0, width - prompt.shape[-1]))
    if "text_encoder_3" in encoders:
        long = encoders["text_encoder_3"](ids["text_encoder_3"])[0]  # (B, T, D)
    else:
        long = prompt.new_zeros(prompt.shape[0], T5_LENGTH, width)
    pooled = torch.cat([output[0] for output in outputs], dim=-1)  # (B, P)
    return {"prompt": torch.cat([prompt, long], dim=-2), "pooled": pooled}
