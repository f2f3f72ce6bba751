"""The properties of a pipeline's inputs, read without weights: prompt ids, latent shapes and the noise schedule."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import Tokenizer
from tunekit.errors import ModelError
from tunekit.files.cache_folder import hash_of
from tunekit.files.durable import write_json
from tunekit.model.families.pipeline.parts import INDEX, PIPELINES, TEXT_ENCODERS, import_diffusers, read_index
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.transformers_guard import quiet, refuse_code, refuse_library
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

SCHEDULER = "scheduler/scheduler_config.json"
FLOW = "FlowMatchEulerDiscreteScheduler"
OTHERS = ("EDM", "Flow", "CMStochastic", "Consistency")  # prefixes of scheduler classes with other noise than DDPM
T5_LENGTH = 256  # diffusers' max_sequence_length for Stable Diffusion 3
COPIED = (INDEX, "*.md", "LICENSE*", "scheduler/*", "tokenizer*/*", "feature_extractor/*")
Ids = dict[str, NDArray[np.int64]]  # text encoder -> (prompts, T)


@dataclass(frozen=True)
class PipelineProcessor:
    """A pipeline's folder and class. `predicts`: the denoiser's prediction type, if the recipe overrides the
    scheduler's file."""

    folder: Path
    kind: str
    predicts: str | None = None

    tokenizer: ClassVar[Tokenizer | None] = None  # each text encoder has its own

    @cached_property
    def configs(self) -> dict[str, JsonObject]:
        """The configurations of the pipeline's models and of its scheduler, by name."""
        names = [name for name in read_index(self.folder) if name]
        configs = {name: read_json(self.folder / name / "config.json") for name in names}
        scheduler = read_json(self.folder / SCHEDULER)
        return configs | {"scheduler": scheduler | ({"prediction_type": self.predicts} if self.predicts else {})}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of configurations and tokenizer files."""
        files = sorted(path for path in self.folder.glob("tokenizer*/*") if path.is_file())
        return hash_of([self.configs, [[path.name, path.read_bytes().hex()] for path in files]])

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder, by name. Raises: ModelError."""
        from transformers import AutoTokenizer

        tokenizers = {}
        for name in TEXT_ENCODERS:
            folder = self.folder / name.replace("text_encoder", "tokenizer")
            if name not in self.configs:
                continue
            try:
                with quiet():
                    tokenizers[name] = AutoTokenizer.from_pretrained(
                        str(folder), local_files_only=True, trust_remote_code=False
                    )
            except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
                refuse_code(error, folder)
                refuse_library(error, folder)
                first = str(error).partition("\n")[0]
                what = f"the tokenizer cannot be loaded ({first})"
                raise ModelError(what, "fetch the pipeline again", file=str(folder)) from error
        return tokenizers

    def ids(self, prompts: Sequence[str]) -> Ids:
        """Token ids of the prompts for each text encoder, truncated or padded to the maximum length of the encoder, as
        in diffusers."""
        ids = {}
        for name, tokenizer in self.tokenizers.items():
            longest = T5_LENGTH if name == "text_encoder_3" else int(self.configs[name]["max_position_embeddings"])
            encoding = tokenizer(list(prompts), padding="max_length", max_length=longest, truncation=True)
            ids[name] = np.asarray(encoding["input_ids"], np.int64)
        return ids

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are too long for a CLIP text encoder, so that their end is truncated."""
        first = self.tokenizers["text_encoder"]
        longest = int(self.configs["text_encoder"]["max_position_embeddings"])
        return [prompt for prompt in prompts if len(first(prompt)["input_ids"]) > longest]

    @property
    def denoiser(self) -> Mapping[str, Any]:
        """The denoiser's configuration."""
        return self.configs[PIPELINES[self.kind]]

    @property
    def vae_factor(self) -> int:
        """The number of image pixels along one side of one latent."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def resolution(self) -> int:
        """The pipeline's native image size, in pixels."""
        return int(self.denoiser["sample_size"]) * self.vae_factor

    @property
    def multiple(self) -> int:
        """The number of pixels by which both sides of an image must be divisible. Then the denoiser can halve the sides
        without remainder."""
        patch = self.denoiser.get("patch_size")
        return self.vae_factor * (int(patch) if patch else 2 ** (len(self.denoiser["block_out_channels"]) - 1))

    @property
    def max_side(self) -> int | None:
        """The maximum image side in pixels for which the denoiser has positions; None: no limit."""
        limit = self.denoiser.get("pos_embed_max_size")
        return None if limit is None else int(limit) * self.multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latents of an image with these sides in pixels."""
        return int(self.configs["vae"]["latent_channels"]), height // self.vae_factor, width // self.vae_factor

    @property
    def flows(self) -> bool:
        """Whether the denoiser was trained by flow matching."""
        return self.configs["scheduler"].get("_class_name") == FLOW

    @property
    def prediction(self) -> str:
        """The denoiser's prediction type, from the scheduler's configuration."""
        return "flow" if self.flows else str(self.configs["scheduler"].get("prediction_type", "epsilon"))

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(S,): the cumulative alphas of a diffusion schedule of S steps, as in diffusers' DDPMScheduler."""
        with quiet():
            schedule: Tensor = import_diffusers().DDPMScheduler.from_config(self.configs["scheduler"]).alphas_cumprod
        return schedule

    @cached_property
    def sigmas(self) -> tuple[Tensor, Tensor]:
        """Two tensors (S,) of a flow-matching schedule, as in diffusers: the fraction of noise at each step, and the
        time that the denoiser receives."""
        with quiet():
            scheduler = import_diffusers().FlowMatchEulerDiscreteScheduler.from_config(self.configs["scheduler"])
        count = len(scheduler.timesteps)
        return scheduler.sigmas[:count].float(), scheduler.timesteps.float()

    def check(self) -> None:
        """Raise ModelError if the pipeline scales noise or latents in a way that tunekit does not support."""
        name = str(self.configs["scheduler"].get("_class_name"))
        if name.startswith(OTHERS) and not self.flows:
            what, file = f"the scheduler {name} scales noise in a way that cannot be trained", SCHEDULER
        elif self.configs["vae"].get("latents_mean") or self.configs["vae"].get("latents_std"):
            what, file = "scaling by latents_mean and latents_std is not supported", "vae/config.json"
        else:
            return
        raise ModelError(what, "choose another pipeline", file=str(self.folder / file))

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings, as encode_prompts computes them: `prompt` (T, D), and `pooled` (P,) if the
        denoiser takes a pooled embedding."""
        clip = self.configs["text_encoder"]
        length = int(clip["max_position_embeddings"])
        if self.kind == "StableDiffusionPipeline":
            return {"prompt": (length, int(self.denoiser["cross_attention_dim"]))}
        projections = [int(self.configs[name]["projection_dim"]) for name in TEXT_ENCODERS[:2]]
        if self.kind == "StableDiffusionXLPipeline":
            return {"prompt": (length, int(self.denoiser["cross_attention_dim"])), "pooled": (projections[1],)}
        width = int(self.denoiser["joint_attention_dim"])
        return {"prompt": (length + T5_LENGTH, width), "pooled": (sum(projections),)}

    def save(self, folder: Path) -> None:
        """Copy all files of the pipeline except its weights into another folder."""
        for path in (path for pattern in COPIED for path in sorted(self.folder.glob(pattern)) if path.is_file()):
            place = folder / path.relative_to(self.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        if self.predicts:
            write_json(folder / SCHEDULER, self.configs["scheduler"])


def load_processor(section: ModelSection) -> PipelineProcessor:
    """The processor of the base. Raises: ModelError if the base is not a diffusion pipeline."""
    source = find_source(section, weights=False)
    if not (source.folder / INDEX).is_file():
        what = f"{section.name_or_path} contains no {INDEX}, so it is not a diffusion pipeline"
        raise ModelError(what, "name the folder of a pipeline saved by diffusers", key="model.name_or_path")
    return PipelineProcessor(source.folder, read_index(source.folder)[""])
