"""Diffusion pipelines: a denoiser with its VAE and text encoders."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.contracts import NamedModules, Processor, Tensors
from tunekit.errors import ModelError
from tunekit.model.families.family import Family
from tunekit.model.families.pipeline.parts import INDEX, PIPELINES, PipelineNet, denoising_layers, load_pipeline
from tunekit.model.families.pipeline.processor import load_processor
from tunekit.model.families.pipeline.prompts import encode_prompts
from tunekit.recipe.model import ModelSection

IDS = "ids of "  # before a text encoder's name, in the inputs


class DiffusionFamily(Family):
    """Noisy latents (B, C, H, W), times (B,), and prompts as embeddings or as ids in; predictions (B, C, H, W) out."""

    index_file = INDEX
    text = "a diffusion pipeline"
    answers = False
    reads_ids = False
    ids = None

    def load(self, folder: Path, section: ModelSection, dtype: torch.dtype, *, meta: bool) -> nn.Module:
        _check(section, self.name)
        return load_pipeline(folder, section, dtype, meta=meta)

    def processor(self, section: ModelSection) -> Processor:
        """Its tokenizers, latents and noise schedule. Raises: ModelError."""
        return load_processor(section)

    def layers(self, net: nn.Module) -> NamedModules:
        """Those of the denoiser, in the order in which they run."""
        part = PIPELINES[_as_pipeline(net).config.model_type]
        return [(f"{part}.{name}", layer) for name, layer in denoising_layers(_as_pipeline(net).denoiser)]

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """What the denoiser predicts, (B, C, H, W) float32; of one that predicts a variance too, without that."""
        pipeline = _as_pipeline(net)
        latents = inputs["latents"].to(pipeline.dtype)
        given = {name: value for name, value in inputs.items() if name in ("prompt", "pooled")}
        if "prompt" not in given:
            ids = {name.removeprefix(IDS): value for name, value in inputs.items() if name.startswith(IDS)}
            given = encode_prompts(pipeline, ids)
        given = {name: value.to(pipeline.dtype) for name, value in given.items()}
        more: dict[str, Tensor | Tensors] = {}
        if pipeline.config.model_type == "StableDiffusion3Pipeline":
            more["pooled_projections"] = given["pooled"]
        elif "pooled" in given:
            more["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": inputs["sizes"].to(pipeline.dtype)}
        more["encoder_hidden_states"] = given["prompt"]
        found: Tensor = pipeline.denoiser(latents, timestep=inputs["times"], return_dict=False, **more)[0]
        channels = latents.shape[1]
        return found[:, :channels].float() if found.shape[1] == 2 * channels else found.float()

    def beside(self, net: nn.Module) -> list[nn.Module]:
        return list(_as_pipeline(net).beside.values())

    def looks_back(self, net: nn.Module) -> bool:
        return False

    def reads_rows(self, net: nn.Module) -> bool:
        return True

    def head_name(self, net: nn.Module) -> str | None:
        return None


def _as_pipeline(net: nn.Module) -> PipelineNet:
    assert isinstance(net, PipelineNet)
    return net


def _check(section: ModelSection, family: str) -> None:
    """Raises: ModelError for keys that pipelines do not have."""
    wrong = (
        ("family", section.family not in ("auto", family), "diffusion or auto"),
        ("quantization", section.quantization != "none", "none"),
        ("attention", section.attention not in ("auto", "sdpa"), "auto"),
        ("trust_remote_code", section.trust_remote_code, "false"),
    )
    for key, is_wrong, instead in wrong:
        if is_wrong:
            what = f"{section.name_or_path} is a diffusion pipeline, which is not loaded so"
            raise ModelError(what, f"write {instead}", key=f"model.{key}")


FAMILY = DiffusionFamily()
