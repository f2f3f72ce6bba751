"""What a diffusion objective keeps of pictures and prompts: the posterior of each picture's latents, and embeddings.

Pixels and a model go in; latents and embeddings come out, encoded once where they do not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.model.families.pipeline.parts import TEXT_ENCODERS
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.model.families.pipeline.prompts import encode_prompts

Pixels = NDArray[np.uint8]  # (H, W, 3)
Posterior = tuple[Tensor, Tensor]  # mean and standard deviation, (C, H, W) each, float32 on the host


@dataclass
class Kept:
    """Latents and embeddings by what they were made of. `processor`: the pipeline's."""

    processor: PipelineProcessor
    posteriors: dict[bytes, Posterior] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    blank: set[str] = field(default_factory=set)  # prompts whose embeddings are of a model without values

    @torch.no_grad()
    def posterior(self, model: Any, pixels: Pixels, keep: bool = True) -> Posterior:
        """Of a picture's latents, by the VAE in float32, alone, so that no other picture can move a bit of it."""
        if model.device.type == "meta":
            return self._blank(model, pixels)
        key = hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode(), digest_size=16).digest()
        if key in self.posteriors:
            return self.posteriors[key]
        found = self._encoded(model, pixels)
        if keep:
            self.posteriors[key] = found
        return found

    def _encoded(self, model: Any, pixels: Pixels) -> Posterior:
        values = torch.tensor(pixels.copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        net = model.base.net
        with net.beside_on(model.device, ["vae"]):
            scaled = values.to(model.device).float() / 127.5 - 1.0
            found = net.part("vae").encode(scaled).latent_dist
        return found.mean[0].float().cpu(), found.std[0].float().cpu()

    def _blank(self, model: Any, pixels: Pixels) -> Posterior:
        """Of a model without values; where its VAE stays on the device, what that does is followed too."""
        if model.base.net.stays:
            model.base.net.part("vae").encode(torch.empty(1, 3, *pixels.shape[:2], device="meta"))
        shape = self.processor.latent_shape(*pixels.shape[:2])
        return torch.zeros(shape), torch.ones(shape)

    @torch.no_grad()
    def embed(self, model: Any, prompts: Iterable[str]) -> None:
        """See to it that the embeddings of these prompts are there."""
        for prompt in dict.fromkeys(prompts):
            is_meta = model.device.type == "meta"
            if prompt in self.embeddings and (is_meta or prompt not in self.blank):
                continue
            self.blank.discard(prompt)
            if is_meta:
                self.blank.add(prompt)
                shapes = self.processor.embedding_shapes()
                self.embeddings[prompt] = {name: torch.zeros(shape) for name, shape in shapes.items()}
                continue
            net = model.base.net
            with net.beside_on(model.device, TEXT_ENCODERS):
                ids = {
                    name: torch.from_numpy(each).to(model.device) for name, each in self.processor.ids([prompt]).items()
                }
                found = encode_prompts(net, ids)
            self.embeddings[prompt] = {name: value[0].cpu() for name, value in found.items()}

    def embedded(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt` (B, T, D), and `pooled` (B, P) where there is one."""
        each = [self.embeddings[prompt] for prompt in prompts]
        return {name: torch.stack([values[name] for values in each]) for name in each[0]}


def scaled_latents(processor: PipelineProcessor, posterior: Posterior, normal: Tensor) -> Tensor:
    """A sample of the posterior, as the denoiser sees it: (mean + std n - shift) * scale. Shapes: (C, H, W) each."""
    vae = processor.configs["vae"]
    mean, std = posterior
    scale, shift = float(vae.get("scaling_factor", 0.18215)), float(vae.get("shift_factor") or 0.0)
    return (mean + std * normal - shift) * scale
