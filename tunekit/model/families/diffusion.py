"""Diffusion pipelines: a denoiser with its VAE and text encoders."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.contracts import NamedModules, Processor, Tensors
from tunekit.errors import ModelError
from tunekit.model.families.family import Family
from tunekit.model.families.pipeline.parts import INDEX, PIPELINES, as_pipeline, denoising_layers, load_pipeline
from tunekit.model.families.pipeline.processor import load_processor
from tunekit.model.families.pipeline.prompts import encode_prompts
from tunekit.recipe.model import ModelSection

IDS = "ids of "  # prefix of a text encoder's name in the inputs


class DiffusionFamily(Family):
    """Inputs: noisy latents (B, C, H, W), times (B,), and prompts as embeddings or ids. Output: predictions
    (B, C, H, W)."""

    index_file = INDEX
    text = "a diffusion pipeline"
    answers = False
    reads_ids = False
    ids = None

    def load(self, folder: Path, section: ModelSection, dtype: torch.dtype, *, meta: bool) -> nn.Module:
        _check(section, self.name)
        return load_pipeline(folder, section, dtype, meta=meta)

    def processor(self, section: ModelSection) -> Processor:
        """The pipeline's tokenizers, latent sizes and noise schedule. Raises: ModelError."""
        return load_processor(section)

    def layers(self, net: nn.Module) -> NamedModules:
        """The denoiser's layers, in the order in which they run."""
        part = PIPELINES[as_pipeline(net).config.model_type]
        return [(f"{part}.{name}", layer) for name, layer in denoising_layers(as_pipeline(net).denoiser)]

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """The denoiser's prediction, (B, C, H, W) float32. The variance that some denoisers also predict is removed."""
        pipeline = as_pipeline(net)
        latents = inputs["latents"].to(pipeline.dtype)
        embeddings = {name: value for name, value in inputs.items() if name in ("prompt", "pooled")}
        if "prompt" not in embeddings:
            ids = {name.removeprefix(IDS): value for name, value in inputs.items() if name.startswith(IDS)}
            embeddings = encode_prompts(pipeline, ids)
        embeddings = {name: value.to(pipeline.dtype) for name, value in embeddings.items()}
        conditions: dict[str, Tensor | Tensors] = {}
        if pipeline.config.model_type == "StableDiffusion3Pipeline":
            conditions["pooled_projections"] = embeddings["pooled"]
        elif "pooled" in embeddings:
            conditions["added_cond_kwargs"] = {
                "text_embeds": embeddings["pooled"],
                "time_ids": inputs["sizes"].to(pipeline.dtype),
            }
        conditions["encoder_hidden_states"] = embeddings["prompt"]
        predicted: Tensor = pipeline.denoiser(latents, timestep=inputs["times"], return_dict=False, **conditions)[0]
        channels = latents.shape[1]
        return predicted[:, :channels].float() if predicted.shape[1] == 2 * channels else predicted.float()

    def frozen_parts(self, net: nn.Module) -> list[nn.Module]:
        return list(as_pipeline(net).frozen_parts.values())

    def looks_back(self, net: nn.Module) -> bool:
        return False

    def reads_rows(self, net: nn.Module) -> bool:
        return True

    def head_name(self, net: nn.Module) -> str | None:
        return None


def _check(section: ModelSection, family: str) -> None:
    """Raise ModelError for settings that diffusion pipelines do not support."""
    wrong = (
        ("family", section.family not in ("auto", family), "diffusion or auto"),
        ("quantization", section.quantization != "none", "none"),
        ("attention", section.attention not in ("auto", "sdpa"), "auto"),
        ("trust_remote_code", section.trust_remote_code, "false"),
    )
    for key, is_wrong, instead in wrong:
        if is_wrong:
            what = f"{section.name_or_path} is a diffusion pipeline, which does not support this setting"
            raise ModelError(what, f"write {instead}", key=f"model.{key}")


FAMILY = DiffusionFamily()
