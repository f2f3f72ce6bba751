"""Rows of images with prompts. An image is trained on at the size of a bucket: the bucket with the nearest aspect
ratio. This module also generates images for prompts.

Source of the buckets: diffusers' training_utils (generate_aspect_ratio_buckets, find_nearest_bucket). Unlike in
diffusers, the nearest bucket is chosen only by the quotient of the aspect ratios. If an image is too small for its
bucket, `auto` selects a smaller bucket; if the recipe lists the buckets, the image is enlarged.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tunekit.contracts import (
    Array,
    Batch,
    EncodeOptions,
    Model,
    Pixels,
    Progress,
    Row,
    RowKind,
    RowLayout,
    RowParts,
    Span,
    Tensors,
)
from tunekit.data.encoding.images import Size, covering, cropped
from tunekit.errors import DataError, Problem
from tunekit.formats.image import ImageExample
from tunekit.model.call import seed_for
from tunekit.model.families.pipeline.drawing import Drawing, draw_pictures
from tunekit.model.families.pipeline.parts import as_pipeline
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.objectives.rows.images import read_pixels
from tunekit.objectives.rows.labels import utf8
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

RATIOS = ((1, 1), (4, 5), (2, 3), (3, 4), (9, 16), (1, 2))  # aspect ratios of `auto`, each in portrait and landscape
KEY = "objective.aspect_ratio_buckets"
PREPARED = ("latents", "target", "times", "weights", "sizes")  # parts that the loss adds in each step


@dataclass(frozen=True, eq=False)
class PictureRows(RowKind):
    """Rows of images with prompts. Parts: `pixels`, the image resized so that it just covers its bucket (each step can
    crop it differently); `shape` of the pixels; `original`, the size in the file; `bucket`, the size to train at;
    `prompt` as UTF-8.

    In each step the loss replaces `pixels` by the parts PREPARED, and adds the inputs made from each prompt
    (`text_parts`).
    """

    processor: PipelineProcessor
    instance_prompt: str | None
    buckets: tuple[Size, ...]
    fingerprint: str
    smaller: tuple[tuple[Size, ...], ...] = ()  # buckets for images that are too small for `buckets`, the largest first
    options: EncodeOptions = field(default_factory=EncodeOptions)
    notices: Counter[str] = field(default_factory=Counter)

    example = "image"
    layout = RowLayout(
        {"pixels": "u1", "shape": "<i4", "original": "<i4", "bucket": "<i4", "prompt": "u1"},
        (),
        sizes=1,
        token_sizes=(),
        identity=("pixels", "prompt"),
        batch_key="bucket",
    )

    def encode(self, example: ImageExample, origin: str) -> Row:
        """The row of an example. Raises: Dropped for an animated or tiny image; DataError for an unreadable image."""
        prompt = example.text or self.instance_prompt
        if not prompt:
            raise DataError("the image has no 'text'", "add a 'text' to the row, or write objective.instance_prompt")
        pixels = read_pixels(example.image, self.notices)
        for cut in self.processor.cut_prompts([prompt]):
            self.notices[f"prompts too long for CLIP, which ignores the end ({cut[:40]}...)"] += 1
        size = fitting_bucket(pixels.shape[:2], (self.buckets, *self.smaller))
        if len(self.buckets) > 1:
            self.notices[f"images trained on at {size[1]} x {size[0]} pixels"] += 1
        covered = covering(pixels, size)
        parts: dict[str, Array] = {
            "pixels": covered.reshape(-1),
            "shape": np.array(covered.shape[:2], np.int32),
            "original": np.array(pixels.shape[:2], np.int32),
            "bucket": np.array(size, np.int32),
            "prompt": utf8(prompt),
        }
        return self.make_row(parts, origin)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        return (int(parts["bucket"].prod()),)

    def question(self, text: str) -> str:
        """The prompt itself."""
        return text

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Its inputs and targets are empty if the loss has not prepared the rows yet.

        Shapes: latents, target (N, C, H, W); times, weights, of_row (N,); sizes (N, 6). N is the number of images in
        all rows.
        """
        rows = [row for sequence in sequences for row in sequence]
        if "latents" not in rows[0].parts:
            return Batch({}, {}, tuple(map(tuple, sequences)), max(row.size for row in rows))
        joined = {name: torch.from_numpy(np.concatenate([row.parts[name] for row in rows])) for name in PREPARED}
        inputs = {name: joined[name] for name in ("latents", "sizes", "times")} | _texts(rows)
        counts = torch.tensor([len(row.parts["times"]) for row in rows])
        targets = {name: joined[name] for name in ("target", "weights")}
        targets["of_row"] = torch.arange(len(rows)).repeat_interleave(counts)
        return Batch(inputs, targets, tuple((row,) for row in rows), rows[0].size)

    def spans(self, row: Row) -> list[Span]:
        """The prompt, the image's size, and the image's centre crop at the size of the bucket."""
        (height, width), (high, wide) = row.parts["original"].tolist(), bucket_of(row)
        title = f"{prompt_of(row)} ({width} x {height} pixels, trained on at {wide} x {high})"
        return [Span(title=title, image=cropped(pixels_of(row), bucket_of(row))[0])]


def pixels_of(row: Row) -> Pixels:
    """The pixels of the row's image, shape (H, W, 3)."""
    return row.parts["pixels"].reshape(*row.parts["shape"], 3)


def bucket_of(row: Row) -> Size:
    """The height and width at which the row's image is trained on."""
    height, width = row.parts["bucket"].tolist()
    return height, width


def prompt_of(row: Row) -> str:
    """The text that describes the image."""
    return row.parts["prompt"].tobytes().decode()


def text_parts(texts: Sequence[RowParts]) -> dict[str, Array]:
    """The parts to add to a prepared row: the network's inputs for each of its prompts, under the name "NUMBER
    NAME"."""
    return {f"{place} {name}": values for place, text in enumerate(texts) for name, values in text.items()}


def _texts(rows: Sequence[Row]) -> Tensors:
    """The network's inputs made from the prompts of all images, each (N, ...)."""
    names = [name.removeprefix("0 ") for name in rows[0].parts if name.startswith("0 ")]
    places = [(row, place) for row in rows for place in range(len(row.parts["times"]))]
    return {
        name: torch.stack([torch.from_numpy(row.parts[f"{place} {name}"]) for row, place in places]) for name in names
    }


def buckets_of(settings: DreamboothSettings, processor: PipelineProcessor) -> tuple[Size, ...]:
    """The buckets of a recipe: the sizes at which images are trained on."""
    assert settings.resolution is not None
    if isinstance(settings.aspect_ratio_buckets, str):
        return made_buckets(settings.resolution, processor.multiple)
    return settings.aspect_ratio_buckets or ((settings.resolution, settings.resolution),)


def made_buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Buckets for all RATIOS. Each bucket has about the same number of pixels as a square with side `resolution`, and
    its sides are multiples of `multiple`."""
    sizes = dict[float, Size]()
    for one, other in RATIOS:
        sides = (resolution * math.sqrt(one / other), resolution * math.sqrt(other / one))
        short, long = (max(multiple, round(side / multiple) * multiple) for side in sides)
        for size in ((short, long), (long, short)):
            sizes.setdefault(size[0] / size[1], size)
    return tuple(sizes.values())


def nearest_bucket(size: Sequence[int], buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to the image's, compared by quotient. If several are equally near, the
    first of these buckets."""
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: round(abs(math.log(ratio * bucket[1] / bucket[0])), 9))


def smaller_buckets(settings: DreamboothSettings, processor: PipelineProcessor) -> tuple[tuple[Size, ...], ...]:
    """Sets of `auto` buckets for small images. Each set has smaller buckets than the set before. Empty if the recipe
    lists the buckets."""
    if not isinstance(settings.aspect_ratio_buckets, str) or settings.resolution is None:
        return ()
    sides = range(settings.resolution - processor.multiple, 0, -processor.multiple)
    return tuple(made_buckets(side, processor.multiple) for side in sides)


def fitting_bucket(size: Sequence[int], sets: Sequence[tuple[Size, ...]]) -> Size:
    """The first bucket that the image is large enough to cover, among the nearest bucket of each set. If no bucket is
    small enough: the nearest bucket of the last set."""
    nearest = [nearest_bucket(size, buckets) for buckets in sets]
    return next((bucket for bucket in nearest if size[0] >= bucket[0] and size[1] >= bucket[1]), nearest[-1])


def size_problems(settings: DreamboothSettings, processor: PipelineProcessor) -> Iterator[Problem]:
    """Problems in the recipe: sizes that the denoiser cannot process, and buckets that no image would use."""
    most, side, multiple = processor.max_side, settings.resolution, processor.multiple
    assert side is not None
    if most is not None and side > most:
        what = f"{side} is too large: the denoiser has positions for {most} pixels per side"
        yield Problem(what, "write a smaller resolution", key="objective.resolution")
    if side % multiple:
        what = f"{side} is not a multiple of {multiple}, which the denoiser requires"
        yield Problem(what, f"write a multiple of {multiple}", key="objective.resolution")
    if settings.aspect_ratio_buckets is None:
        return
    ratios = dict[float, Size]()
    for size in buckets_of(settings, processor):
        if any(side % multiple for side in size):
            what = f"a side of {list(size)} is not a multiple of {multiple}, which the denoiser requires"
            yield Problem(what, f"write multiples of {multiple}", key=KEY)
        if most is not None and max(size) > most:
            what = f"{list(size)} is too large: the denoiser has positions for {most} pixels per side"
            yield Problem(what, "write smaller sides; with auto, write a smaller objective.resolution", key=KEY)
        if (same := ratios.setdefault(size[0] / size[1], size)) is not size:
            what = f"{list(size)} has the same aspect ratio as {list(same)}, so no image would use it"
            yield Problem(what, "remove one of them", key=KEY)


@dataclass(frozen=True)
class Artist:
    """Generates images (H, W, 3) with the whole pipeline."""

    settings: DreamboothSettings
    processor: PipelineProcessor

    def report_pictures(self, model: Model, progress: Progress) -> list[Pixels]:
        """One image for each validation prompt. Each prompt has a different seed."""
        prompts = self.settings.validation_prompts
        seeds = [seed_for("validation picture", number) for number in range(len(prompts))]
        return self.draw(model, prompts, seeds, progress) if prompts else []

    def draw(self, model: Model, prompts: Sequence[str], seeds: Sequence[int], progress: Progress) -> list[Pixels]:
        """One image for each prompt."""
        pictures, net, how = list[Pixels](), as_pipeline(model.base.net), drawing_of(self.settings)
        with net.frozen_parts_on(model.device):
            for done, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                progress("images drawn", done, len(prompts))
                pictures += draw_pictures(net, self.processor, [prompt], [seed], how)
        return pictures


def drawing_of(settings: DreamboothSettings) -> Drawing:
    """The settings for generating square images whose side is the resolution."""
    assert settings.resolution is not None
    return Drawing(settings.num_inference_steps, settings.guidance_scale, settings.resolution, settings.resolution)
