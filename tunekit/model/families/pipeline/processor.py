"""What a pipeline says of its inputs, without any of its weights: tokenizers, latents and noise schedule.

A pipeline's folder goes in; ids of prompts, shapes of latents and the numbers of the schedule come out.
"""

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
from tunekit.model.families.pipeline.parts import INDEX, PIPELINES, TEXT_ENCODERS, imported, read_index
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.transformers_guard import quiet, refuse_code
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

SCHEDULER = "scheduler/scheduler_config.json"
FLOW = "FlowMatchEulerDiscreteScheduler"
OTHERS = ("EDM", "Flow", "CMStochastic", "Consistency")  # how classes begin whose noise is no DDPM's
T5_LENGTH = 256  # diffusers' max_sequence_length for Stable Diffusion 3
COPIED = (INDEX, "*.md", "LICENSE*", "scheduler/*", "tokenizer*/*", "feature_extractor/*")
Ids = dict[str, NDArray[np.int64]]  # text encoder -> (prompts, T)


@dataclass(frozen=True)
class PipelineProcessor:
    """A pipeline's folder, and its class. `predicts`: what its denoiser predicts, where the recipe, not the scheduler's
    file, says it."""

    folder: Path
    kind: str
    predicts: str | None = None

    tokenizer: ClassVar[Tokenizer | None] = None  # prompts go to each text encoder by its own

    @cached_property
    def configs(self) -> dict[str, JsonObject]:
        """Each part's own configuration, and the scheduler's."""
        names = [name for name in read_index(self.folder) if name]
        found = {name: read_json(self.folder / name / "config.json") for name in names}
        scheduler = read_json(self.folder / SCHEDULER)
        return found | {"scheduler": scheduler | ({"prediction_type": self.predicts} if self.predicts else {})}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of configurations and tokenizer files."""
        files = sorted(path for path in self.folder.glob("tokenizer*/*") if path.is_file())
        return hash_of([self.configs, [[path.name, path.read_bytes().hex()] for path in files]])

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder. Raises: ModelError."""
        from transformers import AutoTokenizer

        found = {}
        for name in TEXT_ENCODERS:
            folder = self.folder / name.replace("text_encoder", "tokenizer")
            if name not in self.configs:
                continue
            try:
                with quiet():
                    found[name] = AutoTokenizer.from_pretrained(
                        str(folder), local_files_only=True, trust_remote_code=False
                    )
            except (OSError, ValueError, KeyError, TypeError) as error:
                refuse_code(error, folder)
                first = str(error).partition("\n")[0]
                raise ModelError(f"is no tokenizer ({first})", "fetch the pipeline again", file=str(folder)) from error
        return found

    def ids(self, prompts: Sequence[str]) -> Ids:
        """Each prompt's ids for each text encoder, cut and padded to its full length, as diffusers does it."""
        found = {}
        for name, tokenizer in self.tokenizers.items():
            longest = T5_LENGTH if name == "text_encoder_3" else int(self.configs[name]["max_position_embeddings"])
            given = tokenizer(list(prompts), padding="max_length", max_length=longest, truncation=True)
            found[name] = np.asarray(given["input_ids"], np.int64)
        return found

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those of which a CLIP encoder does not see the end."""
        first = self.tokenizers["text_encoder"]
        longest = int(self.configs["text_encoder"]["max_position_embeddings"])
        return [prompt for prompt in prompts if len(first(prompt)["input_ids"]) > longest]

    @property
    def denoiser(self) -> Mapping[str, Any]:
        """Its configuration."""
        return self.configs[PIPELINES[self.kind]]

    @property
    def vae_factor(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def resolution(self) -> int:
        """For which the pipeline was made, in pixels."""
        return int(self.denoiser["sample_size"]) * self.vae_factor

    @property
    def multiple(self) -> int:
        """Of which a picture's sides must be multiples, so that the denoiser halves without a rest."""
        patch = self.denoiser.get("patch_size")
        return self.vae_factor * (int(patch) if patch else 2 ** (len(self.denoiser["block_out_channels"]) - 1))

    @property
    def most_side(self) -> int | None:
        """Pixels of a side for which the denoiser has positions; None: of any."""
        most = self.denoiser.get("pos_embed_max_size")
        return None if most is None else int(most) * self.multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture."""
        return int(self.configs["vae"]["latent_channels"]), height // self.vae_factor, width // self.vae_factor

    @property
    def flows(self) -> bool:
        """Whether it was trained by flow matching."""
        return self.configs["scheduler"].get("_class_name") == FLOW

    @property
    def prediction(self) -> str:
        """What the denoiser predicts, as the scheduler's configuration says."""
        return "flow" if self.flows else str(self.configs["scheduler"].get("prediction_type", "epsilon"))

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(S,) of a diffusion schedule, as diffusers' DDPMScheduler makes it."""
        with quiet():
            schedule: Tensor = imported().DDPMScheduler.from_config(self.configs["scheduler"]).alphas_cumprod
        return schedule

    @cached_property
    def sigmas(self) -> tuple[Tensor, Tensor]:
        """(S,) shares of noise of a flow, and the times that the network is told, as diffusers has them."""
        with quiet():
            scheduler = imported().FlowMatchEulerDiscreteScheduler.from_config(self.configs["scheduler"])
        count = len(scheduler.timesteps)
        return scheduler.sigmas[:count].float(), scheduler.timesteps.float()

    def check(self) -> None:
        """Raises: ModelError for noise or latents that are scaled in a way that this version does not know."""
        name = str(self.configs["scheduler"].get("_class_name"))
        if name.startswith(OTHERS) and not self.flows:
            what, file = f"names {name}, whose noise is scaled in a way that cannot be trained", SCHEDULER
        elif self.configs["vae"].get("latents_mean") or self.configs["vae"].get("latents_std"):
            what, file = "scales latents by latents_mean and latents_std, which is not known here", "vae/config.json"
        else:
            return
        raise ModelError(what, "choose another pipeline", file=str(self.folder / file))

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """What encode_prompts gives for one prompt: (T, D), and (P,) where the denoiser takes a pooled one."""
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
        """What of a pipeline is no weight, into another folder."""
        for path in (path for pattern in COPIED for path in sorted(self.folder.glob(pattern)) if path.is_file()):
            place = folder / path.relative_to(self.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        if self.predicts:
            write_json(folder / SCHEDULER, self.configs["scheduler"])


def load_processor(section: ModelSection) -> PipelineProcessor:
    """Of the section's base. Raises: ModelError where that is no pipeline's folder."""
    source = find_source(section, weights=False)
    if not (source.folder / INDEX).is_file():
        what = f"{section.name_or_path} holds no {INDEX}, and is no diffusion pipeline"
        raise ModelError(what, "give the folder of one, as diffusers saves it", key="model.name_or_path")
    return PipelineProcessor(source.folder, read_index(source.folder)[""])
