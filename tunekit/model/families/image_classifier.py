"""Image classifiers: a vision transformer with one row of logits per image, and its image processor."""

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
from tunekit.model.families.structure import accepted_names, call_accepted, seeded_generator
from tunekit.model.pretrained import config_of
from tunekit.model.storage.source import find_source, read_json
from tunekit.model.transformers_guard import quiet, refuse_code, refuse_library
from tunekit.recipe.model import ModelSection
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig

CONFIG = "preprocessor_config.json"
SIZES = ("size", "crop_size", "resize_short")  # the file's keys for sizes of images
PLAIN_KIND = "ViTImageProcessor"  # the processor of a model without this file
MAX_SIDE = 4096
PROBES = ((40, 56), (56, 40), (300, 70))  # heights and widths of test images for a processor
LIBRARIES = {"PIL": "Pillow", "torchvision": "torchvision"}  # packages of the extra `images`, by module
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError)
SIDE = 224  # default side if neither the processor nor the model has one, and the side of plain images
ConfiguredSize = float | Mapping[str, object]
PLAIN = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))  # black, and each channel alone


@dataclass(frozen=True)
class PixelProcessor:
    """Calls the model's own image processor, and measures its effect: the visible part of an image, the output size,
    and the scale of the values.

    `side`: the image side in pixels that the recipe requests, if it differs from the model's. All sizes in the
    processor's file are scaled accordingly.
    """

    folder: Path
    side: int | None = None

    tokenizer: ClassVar[Tokenizer | None] = None  # there is no text

    @cached_property
    def config(self) -> JsonObject:
        """The content of the processor's file. If there is no file: the settings of a ViT processor for the image size
        in the model's configuration.

        Raises: ModelError for an impossible size.
        """
        if (self.folder / CONFIG).exists():
            config = read_json(self.folder / CONFIG)
        else:
            size = read_json(self.folder / "config.json").get("image_size", SIDE)
            height, width = size if isinstance(size, list) else (size, size)
            config = {"image_processor_type": PLAIN_KIND, "size": {"height": height, "width": width}}
        sides = [side for key in SIZES for side in _sides(config.get(key))]
        if any(isinstance(side, int | float) and not 0 < side <= MAX_SIDE for side in sides):
            what = f"the file has a size that is not between 1 and {MAX_SIDE} pixels"
            raise ModelError(what, "correct the size", file=str(self.folder / CONFIG))
        return config

    @cached_property
    def trained_config(self) -> JsonObject:
        """The configuration with the sizes used in training."""
        if self.side is None:
            return self.config
        share = self.side / PixelProcessor(self.folder).resolution
        sizes = {key: _sized(self.config[key], share) for key in SIZES if self.config.get(key)}
        return {**self.config, **sizes}

    @cached_property
    def processor(self) -> BaseImageProcessor:
        """transformers' processor. Raises: ModelError; InputError if a library is not installed."""
        sizes = {key: self.trained_config[key] for key in SIZES if self.trained_config.get(key)}
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
        """sha256 of the processor's configuration and class name, on which encoded rows depend."""
        return hash_of([self.trained_config, type(self.processor).__name__])

    @cached_property
    def resolution(self) -> int:
        """The side of an image in pixels. Raises: ModelError, with the processor's name, if images do not become
        squares of one size, or if pixels are not scaled separately."""
        generator, shapes = np.random.default_rng(0), set[tuple[int, ...]]()
        for shape in PROBES:
            values = self.values(generator.integers(0, 256, (*shape, 3), np.uint8))
            shapes.add(tuple(values.shape))
        name, file = type(self.processor).__name__, str(self.folder / CONFIG)
        if len(shapes) > 1 or any(len(shape) != 3 or shape[0] != 3 for shape in shapes):
            what = f"{name} must return tensors (3, H, W) of one size for all images, but it returns {sorted(shapes)}"
            raise ModelError(what, "choose another base", file=file)
        _, height, width = shapes.pop()
        if height != width:
            what = f"{name} makes images of {width} x {height} pixels, but training needs square images"
            raise ModelError(what, "choose another base", file=file)
        self._check_scale(int(height))
        return int(height)

    def _check_scale(self, side: int) -> None:
        """Check that the processor scales each pixel independently of other pixels. Raises: ModelError."""
        scale, offset = self.scale
        pixels = np.random.default_rng(1).integers(0, 256, (*PROBES[0], 3), np.uint8)
        values, one_level = self.values(pixels), float(scale.abs().max())
        if float(torch.linalg.det(scale.double() / max(one_level, 1e-30)).abs()) > 1e-9:
            again = torch.from_numpy(self._unscaled(values, side)).float() @ scale.T + offset  # (side, side, 3)
            if float((again.permute(2, 0, 1) - values).abs().max()) <= one_level:
                return
        what = f"{type(self.processor).__name__} does not scale each pixel separately, but training requires this"
        raise ModelError(what, "choose another base", file=str(self.folder / CONFIG))

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """A matrix S (3, 3) and an offset b (3,). The model's own processor turns a pixel p (0 to 255) into S p + b.

        Processors scale each pixel separately: by a factor, by mean and deviation, or by reordering channels. S and b
        are therefore computed from four images that each have a single colour. Raises: ModelError.
        """
        black, *others = (self._of_plain(colour) for colour in PLAIN)
        return torch.stack([(value - black) / 255.0 for value in others], dim=1).float(), black.float()

    def _of_plain(self, colour: tuple[int, int, int]) -> Tensor:
        """(3,) float64: the processor's output at the central pixel of an image with a single colour."""
        values = self.values(np.full((SIDE, SIDE, 3), colour, np.uint8))
        return values[:, values.shape[1] // 2, values.shape[2] // 2].double()

    def values(self, pixels: Pixels) -> Tensor:
        """The processor's output for an image (H, W, 3): (3, side, side). Raises: ModelError."""
        try:
            with quiet():
                values: Tensor = self.processor(images=pixels, return_tensors="pt")["pixel_values"][0]
        except FAULTS as error:
            raise self._unusable(error) from error
        return values

    def visible_pixels(self, pixels: Pixels) -> Pixels:
        """The pixels (side, side, 3) that the processor makes from an image (H, W, 3) by cropping and resizing, before
        it scales their values. They are computed back from the scaled values, which works for every processor."""
        return self._unscaled(self.values(pixels), self.resolution)

    def _unscaled(self, values: Tensor, side: int) -> Pixels:
        restored = self._unscale @ (values.float().flatten(1) - self.scale[1][:, None])  # (3, side * side)
        return restored.round_().clamp_(0, 255).to(torch.uint8).T.reshape(side, side, 3).contiguous().numpy()

    @cached_property
    def _unscale(self) -> Tensor:
        """(3, 3): the inverse of the matrix S of `scale`."""
        return self.scale[0].double().inverse().float()

    def _unusable(self, error: Exception) -> TunekitError:
        lacking = [name for module, name in LIBRARIES.items() if find_spec(module) is None]
        if isinstance(error, ImportError) and lacking:
            what = f"image processors need packages that are not installed: {' and '.join(lacking)}"
            return InputError(what, "run: pip install 'tunekit[images]'")
        refuse_library(error, self.folder / CONFIG)
        first = str(error).strip().partition("\n")[0]
        what = f"the image processor cannot be loaded ({first})"
        absent = "could be imported" in first  # a package such as timm
        how = "install the package that this image processor needs" if absent else "fetch the model again"
        return ModelError(what, how, file=str(self.folder / CONFIG))

    def save(self, folder: Path) -> None:
        """Write preprocessor_config.json into a model folder, with the image size used in training."""
        if self.trained_config is self.config and (self.folder / CONFIG).exists():
            shutil.copyfile(self.folder / CONFIG, folder / CONFIG)
            return
        write_json(folder / CONFIG, self.trained_config)


def _sides(size: object) -> list[object]:
    return list(size.values()) if isinstance(size, Mapping) else [size]


def _sized(size: ConfiguredSize, share: float) -> ConfiguredSize:
    """A size from a processor's file, multiplied by `share`."""
    if isinstance(size, Mapping):
        return {name: round(value * share) if isinstance(value, int) else value for name, value in size.items()}
    return round(size * share)


class ImageClassifierFamily(Family):
    """Pixels (B, 3, H, W) -> logits (B, C), C labels."""

    endings = ("ForImageClassification",)
    class_name = "AutoModelForImageClassification"
    text = "an image classifier"
    answers = False
    labelled = True
    reads_ids = False
    ids = None

    def processor(self, section: ModelSection) -> Processor:
        """The base's image processor."""
        return PixelProcessor(find_source(section, weights=False).folder)

    def reads_rows(self, net: nn.Module) -> bool:
        return True

    def layers(self, net: nn.Module) -> NamedModules:
        """The layers in order, with their module names. These are the items of all ModuleLists, because convolutional
        nets have several lists of blocks or stages. Raises: ModelError for a net without a ModuleList."""
        lists = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.ModuleList)]
        layers: dict[str, nn.Module] = {}
        for name, module_list in lists:
            if not any(name.startswith(f"{other}.") for other in layers):
                items = [(f"{name}.{index}", item) for index, item in module_list.named_children()]
                layers |= {path: item for path, item in items if not isinstance(item, nn.ModuleList)}
        if not layers:
            what = f"{type(net).__name__} has no list of layers"
            raise ModelError(what, "choose a ViT, DINOv2, Swin, ConvNeXt or similar model", key="model.name_or_path")
        return list(layers.items())

    def hidden_size(self, net: nn.Module) -> int:
        """Width of the hidden states; for convolutional nets, the input width of the head."""
        declared = getattr(_vision_config(net), "hidden_size", None)
        widths = [
            module.in_features
            for name in self.trained_with(net)
            for module in net.get_submodule(name).modules()
            if isinstance(module, nn.Linear)
        ]
        return int(declared or widths[-1])

    def logits(self, net: nn.Module, inputs: Tensors) -> Tensor:
        """Logits (B, C). Positions are interpolated if the images have a different size than the model's."""
        pixels = inputs["pixel_values"].to(next(net.parameters()).dtype)
        return call_accepted(net, {"pixel_values": pixels, "interpolate_pos_encoding": True}).logits

    def use_note(self, net: nn.Module, folder: Path) -> str:
        """A note for models trained with a different image size: callers must request interpolated positions."""
        size, side = getattr(_vision_config(net), "image_size", None), PixelProcessor(folder).resolution
        if "interpolate_pos_encoding" not in accepted_names(net) or size in (None, side, [side, side]):
            return ""
        return (
            f"the model was trained on images of {side} pixels, but the base has positions for {size} pixels: "
            "call model(pixel_values, interpolate_pos_encoding=True); transformers' pipeline() does not pass this "
            "argument"
        )

    def trial_inputs(self, net: nn.Module) -> Tensors:
        size = getattr(_vision_config(net), "image_size", SIDE)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, 3, height, width, generator=seeded_generator())}


def _vision_config(net: nn.Module) -> PreTrainedConfig:
    """The configuration of the vision model. It may be a part of a larger model's configuration."""
    config = config_of(net)
    return getattr(config, "vision_config", config)


FAMILY = ImageClassifierFamily()
