"""Loads the models of a diffusion pipeline (denoiser, VAE, text encoders) from a folder saved by diffusers, with or
without weights, into one net.

Only trained models are modules of this net, so that adapters, optimizers and plans do not see the other models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunekit.contracts import Modules, NamedModules
from tunekit.errors import ModelError
from tunekit.files.untrusted import printable
from tunekit.machine.versions import needed
from tunekit.model.quantized.codec import import_bitsandbytes
from tunekit.model.storage.source import PIPELINE_INDEX, read_json
from tunekit.model.transformers_guard import no_fetched_code, quiet, refuse_library
from tunekit.recipe.model import ModelSection, PipelineModel

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

INDEX = PIPELINE_INDEX
KEY = "model.name_or_path"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PIPELINES = {  # class of the pipeline -> its denoiser
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
}
OF_DIFFUSERS = ("UNet2DConditionModel", "SD3Transformer2DModel", "AutoencoderKL")
OF_TRANSFORMERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


@dataclass
class PipelineConfig:
    """The configuration of a pipeline, with the attributes that tunekit reads from a transformers configuration.
    `part_configs`: the configuration of each model in the pipeline, by name."""

    model_type: str  # the pipeline's class
    hidden_size: int
    num_hidden_layers: int
    part_configs: Mapping[str, Mapping[str, Any]]
    _attn_implementation: str = "sdpa"
    use_cache: bool = False


class PipelineNet(nn.Module):
    """A net whose modules are the trained models of a pipeline. The other models are in `frozen_parts`, outside the
    module tree."""

    config: PipelineConfig
    frozen_parts: dict[str, nn.Module]

    dtype: torch.dtype  # of all parts but the VAE

    def __init__(
        self,
        trained: Modules,
        frozen_parts: Modules,
        config: PipelineConfig,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.frozen_parts, self.dtype = config, dict(frozen_parts), dtype
        self.stays = False  # whether every step needs the frozen parts
        for name, part in trained.items():
            self.add_module(name, part)

    @property
    def denoiser(self) -> ModelMixin:
        """The net that removes noise."""
        return getattr(self, PIPELINES[self.config.model_type])

    def part(self, name: str) -> Any:
        """The model with this name, trained or frozen; None if the pipeline has no such model."""
        return self._modules.get(name) or self.frozen_parts.get(name)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The pipeline's text encoders, in order."""
        return {name: part for name in TEXT_ENCODERS if (part := self.part(name)) is not None}

    @property
    def unread(self) -> list[str]:
        """Layers whose output is never used: in Stable Diffusion XL the last layer of the first text encoder."""
        if self.config.model_type != "StableDiffusionXLPipeline" or "text_encoder" not in self._modules:
            return []
        last = int(self.config.part_configs["text_encoder"]["num_hidden_layers"]) - 1
        endings = (f"encoder.layers.{last}", "final_layer_norm")
        return [name for name, _ in self.named_modules() if name.startswith("text_encoder.") and name.endswith(endings)]

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder is among the trained models."""
        return any(name in self._modules for name in TEXT_ENCODERS)

    @contextmanager
    def frozen_parts_on(self, device: torch.device, names: Sequence[str] | None = None) -> Iterator[None]:
        """Context manager: move the frozen models to the device, and back afterwards. `names`: move only these
        models."""
        moved = {name: part for name, part in self.frozen_parts.items() if names is None or name in names}
        before = {name: next(part.parameters()).device for name, part in moved.items()}
        for part in moved.values():
            part.to(device)
        try:
            yield
        finally:
            for name, part in moved.items():
                part.to(device if self.stays else before[name])


def as_pipeline(net: nn.Module) -> PipelineNet:
    """The net of a base, which is a pipeline's."""
    assert isinstance(net, PipelineNet)
    return net


def import_diffusers() -> ModuleType:
    """The library diffusers. Raises: ModelError if it is not installed."""
    if find_spec("bitsandbytes") is not None:
        import_bitsandbytes()  # diffusers imports it too; our import suppresses its side effects
    try:
        with quiet(), no_fetched_code():
            diffusers = import_module("diffusers")
    except Exception as error:
        raise ModelError(
            *needed("a diffusion pipeline", "run: pip install 'tunekit[diffusion]'", error), key=KEY
        ) from error
    return diffusers


def read_index(folder: Path) -> dict[str, str]:
    """The class of each model that training or generation needs, by name. Raises: ModelError for an unsupported
    pipeline."""
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ModelError(
            f"the pipeline class {printable(kind)} cannot be trained", f"known: {known}", file=str(folder / INDEX)
        )
    classes = {"": str(kind)}
    for name in (PIPELINES[str(kind)], "vae", *TEXT_ENCODERS):
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if entry[1] not in (*OF_DIFFUSERS, *OF_TRANSFORMERS):
            what = f"the pipeline's {name} is a {printable(entry[1])}, a class that tunekit does not load"
            raise ModelError(what, "choose another pipeline", file=str(folder / INDEX))
        classes[name] = str(entry[1])
    for name in (PIPELINES[str(kind)], "vae", "text_encoder"):
        if name not in classes:
            raise ModelError(f"the index names no {name}", "use a complete pipeline", file=str(folder / INDEX))
    return classes


def load_net(folder: Path, trained: Sequence[str], dtype: torch.dtype, *, meta: bool = False) -> PipelineNet:
    """Load the models of a pipeline's folder, frozen and in eval mode, in `dtype`. The VAE is always in float32,
    because half precision makes its images inaccurate. `meta`: without weights.

    `trained`: names of the models that get an adapter. Raises: ModelError.
    """
    classes = read_index(folder)
    kind, parts, configs = classes.pop(""), dict[str, nn.Module](), dict[str, Any]()
    for name, class_name in classes.items():
        configs[name] = read_json(folder / name / "config.json")
        part_dtype = torch.float32 if name == "vae" else dtype
        parts[name] = _load_part(folder / name, class_name, part_dtype, meta).eval().requires_grad_(False)
    absent = [name for name in trained if name not in parts]
    if absent:
        raise ModelError(f"{kind} has no {absent[0]} to train", "leave it out", key="objective.train_text_encoder")
    layers = denoising_layers(parts[PIPELINES[kind]])
    config = PipelineConfig(kind, _width(configs[PIPELINES[kind]]), len(layers), configs)
    chosen = {name: part for name, part in parts.items() if name in trained}
    return PipelineNet(chosen, {name: part for name, part in parts.items() if name not in trained}, config, dtype)


def load_pipeline(folder: Path, section: ModelSection, dtype: torch.dtype, *, meta: bool = False) -> PipelineNet:
    """Load a pipeline as one net. `section` names the trained models, and states whether frozen models remain on the
    device. Raises: ModelError."""
    trained = section.trained if isinstance(section, PipelineModel) else (PIPELINES[read_index(folder)[""]],)
    net = load_net(folder, trained, dtype, meta=meta)
    net.stays = isinstance(section, PipelineModel) and section.stays
    return net


def _load_part(folder: Path, class_name: str, dtype: torch.dtype, meta: bool) -> ModelMixin | PreTrainedModel:
    diffusers, transformers = import_diffusers(), import_module("transformers")
    from_diffusers = class_name in OF_DIFFUSERS
    kind = getattr(diffusers if from_diffusers else transformers, class_name)
    try:
        with quiet():
            if meta:
                if from_diffusers:
                    make, config = kind.from_config, kind.load_config(str(folder), local_files_only=True)
                else:
                    make, of = kind, kind.config_class
                    config = of.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
                with torch.device("meta"):
                    return make(config).to(dtype)
            settings = {"torch_dtype" if from_diffusers else "dtype": dtype}
            part, loading = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        refuse_library(error, folder)
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"the model cannot be loaded ({first})", "fetch it again", file=str(folder), key=KEY
        ) from error
    missing = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in loading[name])
    if missing:
        what = f"the folder lacks weights that its configuration declares ({', '.join(missing[:3])})"
        raise ModelError(what, "these weights would be random; use a complete pipeline", file=str(folder), key=KEY)
    return part


def _width(config: Mapping[str, Any]) -> int:
    """Width of the widest layer."""
    widths = config.get("block_out_channels")
    if widths:
        return int(widths[-1])
    return int(config.get("num_attention_heads", 1)) * int(config.get("attention_head_dim", 1))


def denoising_layers(denoiser: nn.Module) -> NamedModules:
    """The layers that can be recomputed in the backward pass, in the order in which they run. For a UNet these are its
    residual and transformer blocks, as in diffusers; for a transformer, its blocks."""
    blocks = getattr(denoiser, "transformer_blocks", None)
    if isinstance(blocks, nn.ModuleList):
        return [(f"transformer_blocks.{place}", block) for place, block in enumerate(blocks)]
    stages = [("down_blocks", getattr(denoiser, "down_blocks", ())), ("up_blocks", getattr(denoiser, "up_blocks", ()))]
    named = [(f"{list_name}.{place}", block) for list_name, blocks in stages for place, block in enumerate(blocks)]
    middle = getattr(denoiser, "mid_block", None)
    if middle is not None:
        named.insert(len(getattr(denoiser, "down_blocks", ())), ("mid_block", middle))
    return [
        (f"{name}.{inner}", layer) for name, block in named for inner, layer in _in_order(block, name == "mid_block")
    ]


def _in_order(block: nn.Module, middle: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield the residual blocks of a UNet block, each followed by its transformer blocks. In the middle block, no
    transformer blocks follow the last residual block."""
    resnets, attentions = (list(getattr(block, name, None) or ()) for name in ("resnets", "attentions"))
    for place, resnet in enumerate(resnets):
        yield f"resnets.{place}", resnet
        if place < len(attentions) and not (middle and place == len(resnets) - 1):
            for number, layer in enumerate(getattr(attentions[place], "transformer_blocks", ())):
                yield f"attentions.{place}.transformer_blocks.{number}", layer
