"""Image classifiers: a vision transformer with one row of logits per picture, and its processor of pixels."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tunekit.contracts import NamedModules, Pixels, Processor, Tensors, Tokenizer
from tunekit.errors import InputError, ModelError, TunekitError
from tunekit.files.cache_folder import hash_of
from tunekit.files.durable import write_json
from tunekit.model.families.family import Family
from tunekit.model.families.structure import accepted_names, call_accepted, seeded
from tunekit.model.pretrained import config_of
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.transformers_guard import quiet, refuse_code
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig

CONFIG = "preprocessor_config.json"
SIZES = ("size", "crop_size", "resize_short")  # its keys that say how large pictures are
PLAIN_KIND = "ViTImageProcessor"  # of a model without a file
MOST_SIDE = 4096
PROBES = ((40, 56), (56, 40), (300, 70))  # height and width of pictures that show what a processor does
LIBRARIES = {"PIL": "Pillow", "torchvision": "torchvision"}  # of the extra `images`, by module
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError)
SIDE = 224  # where neither the processor nor the model says how large a picture is, and of plain pictures
ConfiguredSize = float | Mapping[str, object]
PLAIN = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))  # black, and each channel alone


@dataclass(frozen=True)
class PixelProcessor:
    """What the model's own processor does, by that processor: which part of a picture is seen, how large, through which
    filter, and how its numbers are scaled.

    `side`: pixels of a side, where the recipe says another number; all sizes of the processor grow or shrink with it.
    """

    folder: Path
    side: int | None = None

    tokenizer: ClassVar[Tokenizer | None] = None  # it reads no text

    @cached_property
    def config(self) -> JsonObject:
        """Of the file; without one, of a vision transformer of the size that the model's configuration says.

        Raises: ModelError for sizes that no picture has.
        """
        if (self.folder / CONFIG).exists():
            found = read_json(self.folder / CONFIG)
        else:
            size = read_json(self.folder / "config.json").get("image_size", SIDE)
            height, width = size if isinstance(size, list) else (size, size)
            found = {"image_processor_type": PLAIN_KIND, "size": {"height": height, "width": width}}
        sides = [side for key in SIZES for side in _sides(found.get(key))]
        if any(isinstance(side, int | float) and not 0 < side <= MOST_SIDE for side in sides):
            what = f"has a size beyond 1 to {MOST_SIDE} pixels"
            raise ModelError(what, "mend it", file=str(self.folder / CONFIG))
        return found

    @cached_property
    def written(self) -> JsonObject:
        """The configuration with the sizes that are trained on."""
        if self.side is None:
            return self.config
        share = self.side / PixelProcessor(self.folder).resolution
        sizes = {key: _sized(self.config[key], share) for key in SIZES if self.config.get(key)}
        return {**self.config, **sizes}

    @cached_property
    def own(self) -> BaseImageProcessor:
        """transformers' processor. Raises: ModelError; InputError where a library is not installed."""
        sizes = {key: self.written[key] for key in SIZES if self.written.get(key)}
        try:
            with quiet():
                from transformers import AutoImageProcessor, ViTImageProcessor

                if not (self.folder / CONFIG).exists():
                    return ViTImageProcessor(**sizes)
                return AutoImageProcessor.from_pretrained(
                    str(self.folder), local_files_only=True, trust_remote_code=False, **sizes
                )
        except FAULTS as error:
            refuse_code(error, self.folder / CONFIG)
            raise self._unusable(error) from error

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the file and of the class that reads it, which decide rows."""
        return hash_of([self.written, type(self.own).__name__])

    @cached_property
    def resolution(self) -> int:
        """Pixels of a side. Raises: ModelError, with the processor's name, where pictures do not become squares of one
        size, or not pixel by pixel."""
        generator, shapes = np.random.default_rng(0), set[tuple[int, ...]]()
        for shape in PROBES:
            values = self.values(generator.integers(0, 256, (*shape, 3), np.uint8))
            shapes.add(tuple(values.shape))
        name, file = type(self.own).__name__, str(self.folder / CONFIG)
        if len(shapes) > 1 or any(len(shape) != 3 or shape[0] != 3 for shape in shapes):
            what = f"{name} makes no tensor (3, H, W) of one size of every image, but {sorted(shapes)}"
            raise ModelError(what, "choose another base", file=file)
        _, height, width = shapes.pop()
        if height != width:
            what = f"asks for images of {width} x {height} pixels, and only squares are trained on"
            raise ModelError(what, "choose another base", file=file)
        self._check_scale(int(height))
        return int(height)

    def _check_scale(self, side: int) -> None:
        """Raises: ModelError where the numbers of a picture do not follow from its pixels one by one."""
        scale, offset = self.scale
        pixels = np.random.default_rng(1).integers(0, 256, (*PROBES[0], 3), np.uint8)
        values, one_level = self.values(pixels), float(scale.abs().max())
        if float(torch.linalg.det(scale.double() / max(one_level, 1e-30)).abs()) > 1e-9:
            again = torch.from_numpy(self._unscaled(values, side)).float() @ scale.T + offset  # (side, side, 3)
            if float((again.permute(2, 0, 1) - values).abs().max()) <= one_level:
                return
        what = f"{type(self.own).__name__} does not scale each pixel by itself, and cannot be followed"
        raise ModelError(what, "choose another base", file=str(self.folder / CONFIG))

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(3, 3) and (3,): pixels p of 0 to 255 become scale p + offset, as the model's own processor makes them.

        Every processor scales each pixel by itself, by a factor, mean and deviation or in another order of channels, so
        that four plain pictures tell all of it.  Raises: ModelError.
        """
        black, *others = (self._of_plain(colour) for colour in PLAIN)
        return torch.stack([(each - black) / 255.0 for each in others], dim=1).float(), black.float()

    def _of_plain(self, colour: tuple[int, int, int]) -> Tensor:
        """(3,) float64 of the middle of a picture of one colour."""
        made = self.values(np.full((SIDE, SIDE, 3), colour, np.uint8))
        return made[:, made.shape[1] // 2, made.shape[2] // 2].double()

    def values(self, pixels: Pixels) -> Tensor:
        """What the processor makes of a picture (H, W, 3): (3, side, side). Raises: ModelError."""
        try:
            with quiet():
                found: Tensor = self.own(images=pixels, return_tensors="pt")["pixel_values"][0]
        except FAULTS as error:
            raise self._unusable(error) from error
        return found

    def seen(self, pixels: Pixels) -> Pixels:
        """(side, side, 3) of a picture (H, W, 3), as the processor sees it before it scales numbers: those are scaled
        back, which says the same of every kind of processor."""
        return self._unscaled(self.values(pixels), self.resolution)

    def _unscaled(self, values: Tensor, side: int) -> Pixels:
        back = self._unscale @ (values.float().flatten(1) - self.scale[1][:, None])  # (3, side * side)
        return back.round_().clamp_(0, 255).to(torch.uint8).T.reshape(side, side, 3).contiguous().numpy()

    @cached_property
    def _unscale(self) -> Tensor:
        """(3, 3): what gives pixels back."""
        return self.scale[0].double().inverse().float()

    def _unusable(self, error: Exception) -> TunekitError:
        lacking = [name for module, name in LIBRARIES.items() if find_spec(module) is None]
        if isinstance(error, ImportError) and lacking:
            what = f"processors of images need {' and '.join(lacking)}, not installed here"
            return InputError(what, "run: pip install 'tunekit[images]'")
        first = str(error).strip().partition("\n")[0]
        what = f"is no processor of images that can be used ({first})"
        return ModelError(what, "fetch the model again", file=str(self.folder / CONFIG))

    def save(self, folder: Path) -> None:
        """The file into a model folder, with the size that was trained on."""
        if self.written is self.config and (self.folder / CONFIG).exists():
            shutil.copyfile(self.folder / CONFIG, folder / CONFIG)
            return
        write_json(folder / CONFIG, self.written)


def _sides(size: object) -> list[object]:
    return list(size.values()) if isinstance(size, Mapping) else [size]


def _sized(size: ConfiguredSize, share: float) -> ConfiguredSize:
    """A size of a processor's file, so many times as large."""
    if isinstance(size, Mapping):
        return {name: round(value * share) if isinstance(value, int) else value for name, value in size.items()}
    return round(size * share)


class ImageClassifierFamily(Family):
    """Pixels (B, 3, H, W) in, logits (B, C) out, C labels."""

    endings = ("ForImageClassification",)
    class_name = "AutoModelForImageClassification"
    text = "an image classifier"
    answers = False
    labelled = True
    reads_ids = False
    ids = None
    part_of = ("vision_config",)  # of CLIP and SigLIP

    def processor(self, section: ModelSection) -> Processor:
        """How its pictures are scaled."""
        return PixelProcessor(find_source(section, weights=False).folder)

    def reads_rows(self, net: nn.Module) -> bool:
        return True

    def layers(self, net: nn.Module) -> NamedModules:
        """The layers in order, with their module names: all that are in lists, since nets of convolutions have one list
        of blocks or stages, or several. Raises: ModelError for a net without."""
        lists = [(name, each) for name, each in net.named_modules() if isinstance(each, nn.ModuleList)]
        found: dict[str, nn.Module] = {}
        for name, each in lists:
            if not any(name.startswith(f"{other}.") for other in found):
                items = [(f"{name}.{own}", item) for own, item in each.named_children()]
                found |= {own: item for own, item in items if not isinstance(item, nn.ModuleList)}
        if not found:
            what = f"{type(net).__name__} has no list of layers"
            raise ModelError(what, "choose a ViT, DINOv2, Swin, ConvNeXt or the like", key="model.name_or_path")
        return list(found.items())

    def hidden_size(self, net: nn.Module) -> int:
        """Width of the hidden states: of a net of convolutions, what its head reads."""
        declared = getattr(_vision_config(net), "hidden_size", None)
        widths = [
            module.in_features
            for name in self.trained_with(net)
            for module in net.get_submodule(name).modules()
            if isinstance(module, nn.Linear)
        ]
        return int(declared or widths[-1])

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """(B, C). Pictures of another size than the model's have positions between its own."""
        pixels = inputs["pixel_values"].to(next(net.parameters()).dtype)
        return call_accepted(net, {"pixel_values": pixels, "interpolate_pos_encoding": True}).logits

    def use_note(self, net: nn.Module, folder: Path) -> str:
        """Positions of another number of pixels are computed only where the caller asks for that."""
        size, side = getattr(_vision_config(net), "image_size", None), PixelProcessor(folder).resolution
        if "interpolate_pos_encoding" not in accepted_names(net) or size in (None, side, [side, side]):
            return ""
        return (
            f"trained on {side} pixels, and the base has positions for {size}: "
            "call model(pixel_values, interpolate_pos_encoding=True), which transformers' pipeline() does not"
        )

    def trial_inputs(self, net: nn.Module) -> Tensors:
        size = getattr(_vision_config(net), "image_size", SIDE)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, 3, height, width, generator=seeded())}


def _vision_config(net: nn.Module) -> PreTrainedConfig:
    """The configuration of the vision model, which may be a part of a larger one's."""
    config = config_of(net)
    return getattr(config, "vision_config", config)


FAMILY = ImageClassifierFamily()
