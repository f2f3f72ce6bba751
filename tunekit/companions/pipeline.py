"""Runs the frozen parts of a diffusion pipeline, VAE and text encoders, as a companion of the trained denoiser.

It caches latents of images and embeddings of prompts that stay the same in every step, and generates class images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import (
    Array,
    Batch,
    CompanionSpec,
    CountingAs,
    Model,
    Pixels,
    PlanContext,
    Row,
    RowParts,
    Rows,
    RunView,
)
from tunekit.data.encoding.images import Size, covering, cropped, png_bytes, read_image
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.data_file import content_hash
from tunekit.data.reading.folder import passed_over
from tunekit.errors import DataError, Problem
from tunekit.files.cache_folder import hash_of
from tunekit.files.durable import write_bytes
from tunekit.model.call import calling, current_call, seed_for
from tunekit.model.families.diffusion import IDS
from tunekit.model.families.pipeline.drawing import draw_pictures
from tunekit.model.families.pipeline.parts import TEXT_ENCODERS, as_pipeline
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.model.families.pipeline.prompts import encode_prompts
from tunekit.objectives.losses.noise import Pipeline
from tunekit.objectives.rows.pictures import PictureRows, bucket_of, drawing_of, pixels_of, prompt_of
from tunekit.recipe.objectives.dreambooth import DreamboothSettings
from tunekit.records import ExecutionSettings

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Posterior = tuple[Tensor, Tensor]  # mean and standard deviation, (C, H, W) each, float32 on the host
SizedImage = tuple[Pixels, Size]  # an image and a size that belongs to it


class PipelineParts(Pipeline):
    """VAE and text encoders. Latents are cached for each image, and embeddings for each prompt."""

    rehearses = True

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.settings, DreamboothSettings)
        self.settings = spec.settings
        self.posteriors: dict[bytes, Posterior] = {}
        self.embeddings: dict[str, dict[str, Array]] = {}
        self.class_images = ClassImages(self.settings) if self.settings.class_prompt else None

    @property
    def draws(self) -> bool:
        """Whether images are generated during the run."""
        return bool(self.settings.validation_prompts) or self.class_images is not None

    def examine(self, planned: PlanContext) -> list[Problem]:
        """A problem for each part that should be trained, but that adapter.target_modules does not include."""
        parts = [name for name, _ in planned.base.net.named_children()] if planned.targets else []
        lacking = [part for part in parts if not any(target.name.startswith(f"{part}.") for target in planned.targets)]
        how = "add its layers: q_proj, k_proj, v_proj, out_proj"
        what = "the {0} should be trained, but adapter.target_modules names no layer of the {0}"
        return [Problem(what.format(part), how, key="adapter.target_modules") for part in lacking]

    def notes(self, planned: PlanContext, execution: ExecutionSettings, tokens: int) -> Sequence[str]:
        """A note if the folder of class images contains files whose names are not names of images."""
        return () if self.class_images is None else self.class_images.notes()

    def begin(self, run: RunView, rows: Sequence[Rows]) -> Mapping[str, str]:
        """Generate missing class images. Encode the images and prompts that stay the same in every step."""
        model, prior = run.model, list[SizedImage]()
        net = as_pipeline(model.base.net)
        if self.class_images is not None:
            prior = self.class_images.ready(run, sorted({bucket_of(row) for row in _each(rows)}), self.writes)
        if self.settings.caches:
            training_images = ((pixels_of(row), bucket_of(row)) for row in _each(rows))
            count = sum(map(len, rows)) + len(prior)
            with net.frozen_parts_on(model.device, ["vae"]):
                for done, (pixels, size) in enumerate(chain(training_images, prior)):
                    run.progress("images encoded", done, count)
                    self._posterior(run, cropped(pixels, size)[0])
        if not net.trains_text:
            prompts = [prompt_of(row) for row in _each(rows)]
            with net.frozen_parts_on(model.device, TEXT_ENCODERS):
                self._embed(run, [*prompts, *filter(None, [self.settings.class_prompt])])
        return {} if self.class_images is None else {"objective.class_data_dir": self.class_images.digest()}

    def class_image(self, run: RunView, number: int, size: Size) -> SizedImage:
        """A class image, scaled to cover this size, and the size of the image in its file. A simulation gets a blank
        image."""
        if run.is_simulated or self.class_images is None:
            return np.zeros((*size, 3), np.uint8), size
        return self.class_images.pick(number, size)

    def latents(self, run: RunView, pixels: Pixels, generator: torch.Generator, *, keep: bool) -> Tensor:
        """A sample of the image's latents, shape (C, H, W), scaled for the denoiser: (mean + std n - shift) * scale."""
        mean, std = self._posterior(run, pixels, keep)
        vae = _processor(run).configs["vae"]
        scale, shift = float(vae.get("scaling_factor", 0.18215)), float(vae.get("shift_factor") or 0.0)
        return (mean + std * torch.randn(mean.shape, generator=generator) - shift) * scale

    @torch.no_grad()
    def _posterior(self, run: RunView, pixels: Pixels, keep: bool = True) -> Posterior:
        """The mean and standard deviation of an image's latents. Each image is encoded alone and in float32, so that
        the result does not depend on other images."""
        net, device = as_pipeline(run.model.base.net), run.model.device
        if run.is_simulated:  # if the VAE stays on the device, the simulation counts its work too
            if net.stays:
                net.part("vae").encode(torch.empty(1, 3, *pixels.shape[:2], device="meta"))
            shape = _processor(run).latent_shape(*pixels.shape[:2])
            return torch.zeros(shape), torch.ones(shape)
        key = hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode(), digest_size=16).digest()
        if key in self.posteriors:
            return self.posteriors[key]
        values = torch.tensor(pixels.copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        with net.frozen_parts_on(device, ["vae"]):
            encoded = net.part("vae").encode(values.to(device).float() / 127.5 - 1.0).latent_dist
        posterior = encoded.mean[0].float().cpu(), encoded.std[0].float().cpu()
        if keep:
            self.posteriors[key] = posterior
        return posterior

    def texts(self, run: RunView, prompts: Sequence[str]) -> list[RowParts]:
        """The denoiser's inputs for each prompt: embeddings; or, if a text encoder is trained, the token ids for each
        text encoder."""
        if as_pipeline(run.model.base.net).trains_text:
            ids = _processor(run).ids(prompts)
            return [{f"{IDS}{name}": values[place] for name, values in ids.items()} for place in range(len(prompts))]
        self._embed(run, prompts)
        return [self.embeddings[prompt] for prompt in prompts]

    @torch.no_grad()
    def _embed(self, run: RunView, prompts: Iterable[str]) -> None:
        """Cache the float32 embeddings of new prompts: `prompt` (T, D), and `pooled` (P,) if the denoiser reads it."""
        processor, net, device = _processor(run), as_pipeline(run.model.base.net), run.model.device
        for prompt in dict.fromkeys(prompts):
            if prompt in self.embeddings:
                continue
            if run.is_simulated:
                shapes = processor.embedding_shapes()
                self.embeddings[prompt] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
                continue
            with net.frozen_parts_on(device, TEXT_ENCODERS):
                ids = {name: torch.from_numpy(values).to(device) for name, values in processor.ids([prompt]).items()}
                encoded = encode_prompts(net, ids)
            self.embeddings[prompt] = {name: values[0].float().cpu().numpy() for name, values in encoded.items()}

    def simulated(self) -> Self:
        """A copy without cached results."""
        return type(self)(self.spec)

    def present(self, model: Model) -> list[Tensor]:
        """The weights of all frozen parts if the run generates images. Otherwise only the VAE's weights, because the
        text encoders use the same memory at another time."""
        net = as_pipeline(model.base.net)
        parts = net.frozen_parts.values() if self.draws or net.stays else [net.part("vae")]
        return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]

    def rehearse(self, run: RunView, batch: Batch, execution: ExecutionSettings, counting_as: CountingAs) -> None:
        """Simulate encoding an image. If the run generates images, also simulate decoding an image."""
        vae, how = as_pipeline(run.model.base.net).part("vae"), drawing_of(self.settings)
        vae.encode(torch.empty(1, 3, *bucket_of(batch.rows[0]), device="meta"))
        if self.draws:
            vae.decode(torch.empty(1, *_processor(run).latent_shape(how.height, how.width), device="meta"))


class ClassImages:
    """The images in `class_data_dir` for prior preservation. The base generates missing images.

    Each generated image depends only on the prompt and the image's number, so that an interrupted run continues with
    the same images. A generated image is square, with the resolution as its side. When it is trained with an instance
    image, it is cropped to that image's bucket, as in diffusers' train_dreambooth_lora_flux2.py.
    """

    def __init__(self, settings: DreamboothSettings) -> None:
        assert settings.class_data_dir is not None  # reading the recipe sets a default
        self.settings, self.folder = settings, Path(settings.class_data_dir)
        self.paths: list[Path] = []
        self.stand_in: Pixels | None = None  # a dry run draws one image, in memory, if the folder has none
        self.images: dict[tuple[int, Size], SizedImage] = {}

    def files(self) -> list[Path]:
        """The images in the folder, sorted by name."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())

    def notes(self) -> list[str]:
        """A note if the folder contains files whose names are not names of images."""
        others = passed_over(self.folder) if self.folder.is_dir() else None
        return [] if others is None else [others]

    def digest(self) -> str:
        """The sha256 of the class images that are trained on."""
        return hash_of([content_hash(path) for path in self.paths])

    def ready(self, run: RunView, sizes: Sequence[Size], writes: bool) -> list[SizedImage]:
        """Each class image at each of these sizes, as pairs (image, size). Missing images are generated first, and
        written into the folder if `writes`.

        Raises: DataError for an unreadable image.
        """
        if not self.paths:
            self._draw_missing(run, writes)
            self.paths = self.files()[: self.settings.num_class_images]
        return [(self.pick(number, size)[0], size) for number in range(len(self.paths) or 1) for size in sizes]

    def pick(self, number: int, size: Size) -> SizedImage:
        """A class image, scaled to cover this size, and the size of the image in its file. If `number` is too large,
        numbering starts again at the first image. Results are cached."""
        number %= len(self.paths) or 1
        if (number, size) not in self.images:
            pixels = self.stand_in if self.stand_in is not None else _read(self.paths[number])
            self.images[number, size] = covering(pixels, size), (pixels.shape[0], pixels.shape[1])
        return self.images[number, size]

    def _draw_missing(self, run: RunView, writes: bool) -> None:
        """Generate missing class images with the base, without its adapter."""
        settings, prompt = self.settings, self.settings.class_prompt
        assert prompt is not None
        count = max(settings.num_class_images - len(self.files()), 0)
        numbers = [number for number in range(settings.num_class_images) if not self._place(number).exists()][:count]
        run.gather([None])  # all ranks have looked into the folder before one of them writes into it
        if numbers and writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._draw(run, prompt, numbers, lambda number, pixels: write_bytes(self._place(number), png_bytes(pixels)))
        elif count == settings.num_class_images:
            self._draw(run, prompt, numbers[:1], lambda _, pixels: setattr(self, "stand_in", pixels))
        run.gather([None])  # all ranks have written before one of them reads

    def _draw(self, run: RunView, prompt: str, numbers: Sequence[int], keep: Callable[[int, Pixels], None]) -> None:
        """Generate the class images with these numbers. `keep`: called with each number and its image."""
        model, net, how = run.model, as_pipeline(run.model.base.net), drawing_of(self.settings)
        with (
            model.training_mode(False),
            calling(replace(current_call(), bypassed=True)),
            net.frozen_parts_on(model.device),
        ):
            for done, number in enumerate(numbers):
                run.progress("class images drawn", done, len(numbers))
                seed = seed_for("class picture", prompt, number)
                keep(number, draw_pictures(net, _processor(run), [prompt], [seed], how)[0])

    def _place(self, number: int) -> Path:
        return self.folder / f"class-{number:05d}.png"


def _read(path: Path) -> Pixels:
    try:
        return read_image(str(path))
    except Dropped as reason:
        raise DataError(f"is an {reason}", "remove this file", file=str(path)) from None


def _processor(run: RunView) -> PipelineProcessor:
    """The processor of the run's rows."""
    assert isinstance(run.rows, PictureRows)
    return run.rows.processor


def _each(rows: Sequence[Rows]) -> Iterator[Row]:
    return (some[index] for some in rows for index in range(len(some)))


make = PipelineParts  # companions.base calls it with a CompanionSpec
