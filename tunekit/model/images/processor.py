"""The image side of a composite model's own processor: the text that stands for an image, and the vision tower's
inputs. Both are found by running the processor, so that no family needs code of its own."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tunekit.contracts import Pixels, Tensors
from tunekit.errors import DataError, InputError, ModelError, listed
from tunekit.files.cache_folder import hash_of
from tunekit.machine.versions import missing_package, needed
from tunekit.model.images.limit import COUNT, limit_text, limit_tokens, most_tokens, write_settings
from tunekit.model.parts import composite_classes
from tunekit.model.storage.source import ModelSource, read_json
from tunekit.model.transformers_guard import quiet, refuse_code, refuse_library
from tunekit.records import JsonObject

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Model types for which tests prove that loss and gradient equal a plain forward of transformers.
PROVEN = frozenset(
    [
        *("gemma3", "gemma4", "glm4v", "idefics3", "internvl", "llava", "llava_next", "llava_onevision"),
        *("mistral3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm"),
    ]
)
REFUSED = {  # known model types, each with its reason
    "mllama": "its images enter through cross-attention layers, and a batch must have images in every row or in none",
    "llama4": "its code projects the features of images within each pass of the language model",
}
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
PACKAGES = ("pillow", "torchvision", "transformers")  # on which pixels depend
SIZES = ((32, 32), (32, 256))  # heights and widths of the images from which the layout is found
KEPT_SIZES = 100_000  # sizes of images whose text is remembered
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, IndexError)


class BaseImages:
    """The images of a composite base (a contracts.ImageProcessor). `obstacle`: why its rows cannot have images.
    `tokens`: the maximum number of tokens of an image; 0: as the processor's files limit it."""

    def __init__(self, folder: Path, model_type: str, tokens: int = 0) -> None:
        self.folder, self.model_type, self.tokens = folder, model_type, tokens
        why = f", because {REFUSED[model_type]}" if model_type in REFUSED else ""
        others = f"rows with images: not supported yet for {model_type}{why}; choose one of"
        self.obstacle = None if model_type in PROVEN else f"{others} {listed(sorted(PROVEN), len(PROVEN))}"
        self._remember()

    def _remember(self) -> None:
        self._expansion = lru_cache(KEPT_SIZES)(self._read_expansion)
        self._input_bytes = lru_cache(KEPT_SIZES)(self._read_input_bytes)
        self.limited = cache(self._limited)

    def _limited(self, tokens: int) -> BaseImages:
        return self if tokens == self.tokens else BaseImages(self.folder, self.model_type, tokens)

    @property
    def native(self) -> ProcessorMixin:
        """transformers' processor. Raises: InputError if a package is missing; ModelError; RecipeError for a limit that
        it cannot keep."""
        return self._native_and_limit[0]

    @cached_property
    def _native_and_limit(self) -> tuple[ProcessorMixin, JsonObject]:
        native = self._load()
        return native, limit_tokens(native, self.tokens) if self.tokens else {}

    def _load(self) -> ProcessorMixin:
        from transformers import AutoProcessor

        try:
            with quiet():
                return AutoProcessor.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except FAULTS as error:
            refuse_code(error, self.folder)
            what = f"the processor of {self.folder}"
            if missing_package(error):
                raise InputError(*needed(what, "run: pip install 'tunekit[images]'", error)) from error
            refuse_library(error, what)
            what = f"{what} cannot be loaded ({_first_line(error)})"
            how = "copy preprocessor_config.json and processor_config.json from the model's page into its folder"
            raise ModelError(what, how, key="model.name_or_path") from error

    def save(self, folder: Path) -> None:
        """Write the limit into the image processor's files of a model folder."""
        if self.tokens:
            write_settings(folder, self._native_and_limit[1])

    @property
    def most_tokens(self) -> int | None:
        """The maximum number of tokens of an image; None if the processor does not count them."""
        return most_tokens(self.native) if hasattr(self.native, COUNT) else None

    @property
    def limit_text(self) -> str:
        """The maximum number of tokens of an image, and the settings that limit it."""
        return limit_text(self.most_tokens, self._native_and_limit[1])

    @cached_property
    def placeholder(self) -> str:
        """The text that a chat template writes for an image."""
        return str(self.native.image_token)

    @cached_property
    def token_id(self) -> int:
        """The id at which the base puts features of images."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        return int(config.image_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the processor's settings, and of the packages that resize images."""
        return hash_of([self.native.to_dict(), [version(name) for name in PACKAGES]])

    def expansion(self, height: int, width: int, *, alone: bool = True) -> str:
        """The text that the processor writes in place of the placeholder of an image of this size. `alone`: whether the
        row has no other image. Raises: DataError if the processor refuses such an image."""
        return self._expansion(height, width, alone or not self.counts_images)

    def _read_expansion(self, height: int, width: int, alone: bool) -> str:
        output = self._run(np.zeros((height, width, 3), np.uint8), alone, return_text_replacement_offsets=True)
        [[replacement, *_]] = output["text_replacement_offsets"]
        return str(replacement["replacement"])

    @cached_property
    def counts_images(self) -> bool:
        """Whether the processor makes something else of an image if its row has others, as LLaVA-OneVision's does."""
        return any(self._expansion(*size, True) != self._expansion(*size, False) for size in SIZES)

    def inputs(self, pixels: Pixels, *, alone: bool = True) -> Tensors:
        """The inputs of the vision tower for one image. They depend on no pixel of another image."""
        alone = alone or not self.counts_images
        output = self._run(pixels, alone, return_tensors="pt")
        inputs = {name: tensor for name, tensor in output.items() if name not in TEXT}
        return inputs if alone else {name: tensor[: -(-len(tensor) // 2)] for name, tensor in inputs.items()}

    def input_bytes(self, height: int, width: int) -> int:
        """The size of these inputs for an image of this size."""
        return self._input_bytes(height, width)

    def _read_input_bytes(self, height: int, width: int) -> int:
        return sum(tensor.nbytes for tensor in self.inputs(np.zeros((height, width, 3), np.uint8)).values())

    def _run(self, pixels: Pixels, alone: bool = True, **options: object) -> dict[str, Tensor]:
        """The processor's output for a row with this image; not `alone`: with this image twice."""
        count = 1 if alone else 2
        try:
            with quiet():
                return self.native(images=[[pixels] * count], text=[self.placeholder * count], **options)
        except FAULTS as error:
            size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
            what = f"the model's processor refuses an image of {size} ({_first_line(error)})"
            raise DataError(what, "leave the row out, or change the image's size") from error

    @cached_property
    def layout(self) -> dict[str, str]:
        """What the first dimension of each input counts: patches, tiles, images or samples. It is found by running the
        processor on images of different sizes."""
        outputs = [self.inputs(np.zeros((*size, 3), np.uint8)) for size in SIZES]
        return {name: _counted([output[name] for output in outputs]) for name in outputs[0]}

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """The rows and columns of tokens of an image of this size; None if its tokens form no grid."""
        count = self.expansion(height, width).count(self._token)
        grids = self.inputs(np.zeros((height, width, 3), np.uint8)).get("image_grid_thw")
        if grids is None:
            return None
        _, rows, columns = grids[0].tolist()
        merged = round((rows * columns / count) ** 0.5) if count else 0
        return (rows // merged, columns // merged) if merged else None

    @cached_property
    def _token(self) -> str:
        return str(self.native.tokenizer.convert_ids_to_tokens(self.token_id))

    def __getstate__(self) -> dict[str, object]:
        return {name: vars(self)[name] for name in ("folder", "model_type", "tokens", "obstacle")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._remember()


def _counted(tensors: list[Tensor]) -> str:
    first, second = ({tensor.shape[axis] for tensor in tensors if tensor.dim() > axis} for axis in (0, 1))
    if len(first) > 1:
        return "tiles" if tensors[0].dim() > 2 else "patches"
    return "images" if len(second) == 1 else "samples"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def find_images(source: ModelSource | None) -> BaseImages | None:
    """The images of a base; None for a base that reads no images, or whose files are not a composite model's."""
    if source is None or source.gguf_file is not None or not (source.folder / "config.json").exists():
        return None
    config = read_json(source.folder / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not set(architectures) & composite_classes():
        return None
    return BaseImages(source.folder, str(config.get("model_type")))
