"""The parts of a diffusion pipeline next to the trained ones: latents of images and embeddings of prompts, encoded once
if no step changes them, and class images, which the base draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunekit.companions.base import Planned
from tunekit.contracts import (
    Array,
    Batch,
    Companion,
    CompanionFacts,
    CompanionSpec,
    CountingAs,
    Model,
    Pixels,
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
from tunekit.model.families.pipeline.parts import TEXT_ENCODERS
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.model.families.pipeline.prompts import encode_prompts
from tunekit.objectives.rows.pictures import PictureRows, bucket_of, drawing_of, pixels_of, prompt_of
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Posterior = tuple[Tensor, Tensor]  # mean and standard deviation, (C, H, W) each, float32 on the host
Sized = tuple[Pixels, Size]  # an image and a size of it


class Pipeline(Companion):
    """VAE and text encoders, with latents and embeddings by what they were made from."""

    rehearses = True

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        self.settings: DreamboothSettings = spec.settings
        self.posteriors: dict[bytes, Posterior] = {}
        self.embeddings: dict[str, dict[str, Array]] = {}
        self.class_images = ClassImages(self.settings) if self.settings.class_prompt else None

    @property
    def draws(self) -> bool:
        """Whether images are drawn during the run."""
        return bool(self.settings.validation_prompts) or self.class_images is not None

    def facts(self, planned: Planned) -> CompanionFacts:
        """Parts that should be trained, but have no target."""
        parts = [name for name, _ in planned.base.net.named_children()] if planned.targets else []
        lacking = [part for part in parts if not any(each.name.startswith(f"{part}.") for each in planned.targets)]
        how = "name its layers too: q_proj, k_proj, v_proj, out_proj"
        what = "no layer of the {} is named, and it should be trained"
        problems = [Problem(what.format(part), how, key="adapter.target_modules") for part in lacking]
        return CompanionFacts(problems=problems)

    def notes(self, planned: Planned, step_tokens: int) -> Sequence[str]:
        """Files of the folder of class images that are no images by name."""
        return () if self.class_images is None else self.class_images.notes()

    def begin(self, run: RunView, rows: Sequence[Rows]) -> Mapping[str, str]:
        """Draw the class images that are missing, and encode everything that no step changes."""
        model, prior = run.model, list[Sized]()
        net = model.base.net
        if self.class_images is not None:
            prior = self.class_images.ready(run, sorted({bucket_of(row) for row in _each(rows)}))
        if self.settings.caches:
            own = ((pixels_of(row), bucket_of(row)) for row in _each(rows))
            count = sum(map(len, rows)) + len(prior)
            with net.beside_on(model.device, ["vae"]):
                for done, (pixels, size) in enumerate(chain(own, prior)):
                    run.progress("images encoded", done, count)
                    self._posterior(run, cropped(pixels, size)[0])
        if not net.trains_text:
            prompts = [prompt_of(row) for row in _each(rows)]
            with net.beside_on(model.device, TEXT_ENCODERS):
                self._embed(run, [*prompts, *filter(None, [self.settings.class_prompt])])
        return {} if self.class_images is None else {"objective.class_data_dir": self.class_images.digest()}

    def class_image(self, run: RunView, number: int, size: Size) -> Sized:
        """One of the class images, covering this size, and the size of its file; blank in a simulation."""
        if run.is_simulated or self.class_images is None:
            return np.zeros((*size, 3), np.uint8), size
        return self.class_images.pick(number, size)

    def latents(self, run: RunView, pixels: Pixels, generator: torch.Generator, *, keep: bool) -> Tensor:
        """(C, H, W) a sample of the image's latents, as the denoiser sees it: (mean + std n - shift) * scale."""
        mean, std = self._posterior(run, pixels, keep)
        vae = _processor(run).configs["vae"]
        scale, shift = float(vae.get("scaling_factor", 0.18215)), float(vae.get("shift_factor") or 0.0)
        return (mean + std * torch.randn(mean.shape, generator=generator) - shift) * scale

    @torch.no_grad()
    def _posterior(self, run: RunView, pixels: Pixels, keep: bool = True) -> Posterior:
        """The VAE encodes each image alone, in float32, so that no other image can move a bit of its latents."""
        net, device = run.model.base.net, run.model.device
        if run.is_simulated:  # if its VAE stays on the device, its work is followed too
            if net.stays:
                net.part("vae").encode(torch.empty(1, 3, *pixels.shape[:2], device="meta"))
            shape = _processor(run).latent_shape(*pixels.shape[:2])
            return torch.zeros(shape), torch.ones(shape)
        key = hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode(), digest_size=16).digest()
        if key in self.posteriors:
            return self.posteriors[key]
        values = torch.tensor(pixels.copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        with net.beside_on(device, ["vae"]):
            encoded = net.part("vae").encode(values.to(device).float() / 127.5 - 1.0).latent_dist
        posterior = encoded.mean[0].float().cpu(), encoded.std[0].float().cpu()
        if keep:
            self.posteriors[key] = posterior
        return posterior

    def texts(self, run: RunView, prompts: Sequence[str]) -> list[RowParts]:
        """The network's inputs for each prompt: embeddings, or ids for each text encoder if one is trained."""
        if run.model.base.net.trains_text:
            ids = _processor(run).ids(prompts)
            return [{f"{IDS}{name}": values[place] for name, values in ids.items()} for place in range(len(prompts))]
        self._embed(run, prompts)
        return [self.embeddings[prompt] for prompt in prompts]

    @torch.no_grad()
    def _embed(self, run: RunView, prompts: Iterable[str]) -> None:
        """`prompt` (T, D), and `pooled` (P,) if the denoiser reads one, of each prompt that has none yet; float32."""
        processor, net, device = _processor(run), run.model.base.net, run.model.device
        for prompt in dict.fromkeys(prompts):
            if prompt in self.embeddings:
                continue
            if run.is_simulated:
                shapes = processor.embedding_shapes()
                self.embeddings[prompt] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
                continue
            with net.beside_on(device, TEXT_ENCODERS):
                ids = {name: torch.from_numpy(values).to(device) for name, values in processor.ids([prompt]).items()}
                encoded = encode_prompts(net, ids)
            self.embeddings[prompt] = {name: values[0].float().cpu().numpy() for name, values in encoded.items()}

    def simulated(self) -> Pipeline:
        """The same with nothing encoded."""
        return Pipeline(self.spec)

    def present(self, model: Model) -> list[Tensor]:
        """All parts if images are drawn, else the VAE, and then in its place the text encoders."""
        net = model.base.net
        parts = net.beside.values() if self.draws or net.stays else [net.part("vae")]
        return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]

    def rehearse(self, run: RunView, batch: Batch, counting_as: CountingAs) -> None:
        """One image encoded, and one decoded if some are drawn."""
        vae, how = run.model.base.net.part("vae"), drawing_of(self.settings)
        vae.encode(torch.empty(1, 3, *bucket_of(batch.rows[0]), device="meta"))
        if self.draws:
            vae.decode(torch.empty(1, *_processor(run).latent_shape(how.height, how.width), device="meta"))


class ClassImages:
    """The images of `class_data_dir`, with which the model keeps its knowledge of the class; the base draws those that
    are missing.

    Each drawn image depends on its number alone, so that a run which was interrupted draws the rest as it would have.
    They are squares of the resolution, and seen in the bucket of the image that they are trained on with, as in
    diffusers' train_dreambooth_lora_flux2.py.
    """

    def __init__(self, settings: DreamboothSettings) -> None:
        assert settings.class_data_dir is not None  # the recipe's reading has named one
        self.settings, self.folder = settings, Path(settings.class_data_dir)
        self.paths: list[Path] = []
        self.images: dict[tuple[int, Size], Sized] = {}

    def files(self) -> list[Path]:
        """The images in the folder, by name."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())

    def notes(self) -> list[str]:
        """Files of the folder that are no images by name."""
        others = passed_over(self.folder) if self.folder.is_dir() else None
        return [] if others is None else [others]

    def digest(self) -> str:
        """sha256 of the images that are trained on."""
        return hash_of([content_hash(path) for path in self.paths])

    def ready(self, run: RunView, sizes: Sequence[Size]) -> list[Sized]:
        """All of them at each of these sizes, with the size, once the missing ones are drawn.

        Raises: DataError for one that cannot be read.
        """
        if not self.paths:
            self._draw_missing(run)
            self.paths = self.files()[: self.settings.num_class_images]
        return [(self._covering(number, size)[0], size) for number in range(len(self.paths)) for size in sizes]

    def pick(self, number: int, size: Size) -> Sized:
        """One of them, chosen by any number, covering this size; and the size of its file."""
        return self._covering(number % len(self.paths), size)

    def _covering(self, number: int, size: Size) -> Sized:
        """Each is read once for each size."""
        if (number, size) not in self.images:
            path = self.paths[number]
            try:
                pixels = read_image(str(path))
            except Dropped as reason:
                raise DataError(f"is an {reason}", "take it out", file=str(path)) from None
            self.images[number, size] = covering(pixels, size), (pixels.shape[0], pixels.shape[1])
        return self.images[number, size]

    def _draw_missing(self, run: RunView) -> None:
        """Images of the base, its adapter bypassed."""
        settings, there, prompt, model = self.settings, len(self.files()), self.settings.class_prompt, run.model
        assert prompt is not None
        if there >= settings.num_class_images:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        net, how, count = model.base.net, drawing_of(settings), settings.num_class_images - there
        numbers = [number for number in range(settings.num_class_images) if not self._place(number).exists()]
        with model.training_mode(False), calling(replace(current_call(), bypassed=True)), net.beside_on(model.device):
            for done, number in enumerate(numbers[:count]):
                run.progress("class images drawn", done, count)
                seed = seed_for("class picture", prompt, number)
                pixels = draw_pictures(net, _processor(run), [prompt], [seed], how)[0]
                write_bytes(self._place(number), png_bytes(pixels))

    def _place(self, number: int) -> Path:
        return self.folder / f"class-{number:05d}.png"


def _processor(run: RunView) -> PipelineProcessor:
    """The one that made the rows."""
    assert isinstance(run.rows, PictureRows)
    return run.rows.processor


def _each(rows: Sequence[Rows]) -> Iterator[Row]:
    return (some[index] for some in rows for index in range(len(some)))


make = Pipeline  # companions.base calls it with a CompanionSpec
