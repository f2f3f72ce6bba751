"""Rows of text and images for composite models. A row has the places of its images, never their pixels: these are
read, and the features computed, when a step is prepared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from tunekit.contracts import (
    Array,
    Batch,
    ImageProcessor,
    LossKind,
    Objective,
    Row,
    RowKind,
    RowLayout,
    RowParts,
    Rows,
    RunView,
    Span,
    StepBatches,
    Tensors,
)
from tunekit.data.batching.pad import lay_end_to_end
from tunekit.data.encoding.images import Size, covering
from tunekit.data.encoding.sources import IMAGES, image_hash
from tunekit.data.encoding.store import part_lengths
from tunekit.data.rendering.expansion import ImageTexts
from tunekit.errors import DataError, ModelError, RecipeError
from tunekit.files.cache_folder import default_cache_folder, hash_of
from tunekit.files.tensor_cache import TensorCache
from tunekit.formats.example import Example, images_of
from tunekit.formats.media import Media
from tunekit.model.images.features import (
    GRID,
    deep_layers,
    features_key,
    image_features,
    prompts_both_ways,
    rope_positions,
)
from tunekit.model.loaded_model import LoadedModel, as_loaded
from tunekit.objectives.rows.images import read_pixels
from tunekit.objectives.rows.row_images import (
    RowImage,
    before_image,
    image_parts,
    images_in,
    path_of,
    pixels_of,
    stored_bytes,
)
from tunekit.objectives.rows.sequences import TOKEN_PARTS, SequenceRows, labels_of_tokens, sequence_parts
from tunekit.objectives.rows.text import TextRows, fill_with
from tunekit.recipe.model import ImageModel, ModelSection

LIMIT_BITS = 3  # limits of shrunk images have this number of significant bits
THUMBNAIL = (96, 96)  # pixels of an image in a preview
FEATURES, POSITIONS = "image_features", "rope_positions"  # parts that are added in a step
STORED = {IMAGES: "u1", "image_data": "u1", "image_hashes": "u1"}
IMAGE_TOKENS = "image_tokens"  # a fact of a trained adapter
IMAGE_PARTS = (*STORED, FEATURES, POSITIONS)


@dataclass(frozen=True, eq=False)
class ImageTextRows(TextRows):
    """Rows of text in which tokens stand for images. Further parts: `images`, JSON of a RowImage for each image;
    `image_data`, the bytes of images that have no path; `image_hashes`. All are empty for a row without images.

    `packable`: whether no row has images. When a step is prepared, rows with images get their features (N, D), and the
    positions (3, T) if the base has positions in time, height and width.
    """

    packable: bool = True
    trained_tokens: int = 0  # the maximum number of tokens of an image with which an adapter was trained
    example = "text"
    has_choices = True
    has_reasoning = True
    has_images = True
    unpackable = "rows with images cannot be packed"
    layout = RowLayout(
        {**TOKEN_PARTS, **STORED},
        ("ids",),
        sizes=1,
        identity=("image_hashes",),
    )

    @cached_property
    def plain(self) -> SequenceRows:
        """The same rows without their images."""
        return SequenceRows(self.tokenizer, self.fingerprint, self.options, self.notices)

    @property
    def image_tokens(self) -> int:
        """The maximum number of tokens of an image; 0: as the base's processor limits it."""
        return self.options.image_tokens or self.trained_tokens

    @property
    def base_images(self) -> ImageProcessor:
        """The base's image processor, as its files define it."""
        assert self.tokenizer.images is not None
        return self.tokenizer.images

    @cached_property
    def processor(self) -> ImageProcessor:
        """The base's image processor, with the limit of the rows."""
        return self.base_images.limited(self.image_tokens)

    @property
    def media_fingerprint(self) -> str:  # type: ignore[override]
        """sha256 of what makes the vision tower's inputs from an image."""
        return self.processor.fingerprint

    def examples(self, example: Example) -> Sequence[Example]:
        return self.plain.examples(example)

    def sizes_of(self, parts: RowParts) -> tuple[int, ...]:
        return self.plain.sizes_of(parts)

    def units_in(self, parts: RowParts) -> int:
        return self.plain.units_in(parts)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        return fill_with(rows, size, self)

    def choosing(self, shape: tuple[int, int], dtype: torch.dtype) -> tuple[RowKind, LossKind]:
        return self.plain.choosing(shape, dtype)

    def encode(self, example: Example, origin: str) -> Row:
        """The row of an example. Raises: Dropped if nothing can be trained on, or for an animated or tiny image;
        DataError if the example or an image is wrong."""
        media = images_of(example)
        sizes = [read_pixels(image, self.notices).shape[:2] for image in media]
        row = self._encode_limited(example, origin, sizes)
        if self.options.excess_length != "shrink" or row.size <= self.options.max_length or not media:
            return row
        return self._shrunk(row, lambda limit: self._encode_limited(example, origin, sizes, limit))

    def _shrunk(self, row: Row, encode: Callable[[int], Row]) -> Row:
        """The row with smaller images, so that it fits into data.max_length; the row itself if that is impossible.
        `encode(limit)`: the row whose images have at most this number of tokens."""
        images, limit, smaller = images_in(row), max(image.stop - image.start for image in images_in(row)), row
        with suppress(RecipeError):  # the base's images do not become so small
            while (excess := smaller.size - self.options.max_length) > 0:
                limit -= -(-excess // len(images))
                limit -= max(limit, 0) % 2 ** max(limit.bit_length() - LIMIT_BITS, 0)  # few, as each has a processor
                if limit <= 0:
                    return row
                smaller = encode(limit)
            self.notices["rows with smaller images, to fit into data.max_length"] += 1
            return smaller
        return row

    def _encode_limited(self, example: Example, origin: str, sizes: Sequence[Size], limit: int = 0) -> Row:
        """The row whose images have at most `limit` tokens; 0: the limit of all rows."""
        media, processor = images_of(example), self._limited(limit)
        alone = len(media) == 1
        expansions = [_expansion(processor, image, size, alone) for image, size in zip(media, sizes, strict=True)]
        texts = ImageTexts(processor.placeholder, expansions) if media else None
        ids, weights, places = self.renderer.with_images(example, texts)
        images = [
            RowImage(path_of(image), len(image.data or b""), image_hash(image), *size, *place, limit, alone)
            for image, size, place in zip(media, sizes, places, strict=True)
        ]
        parts = sequence_parts(np.asarray(ids, dtype=np.int32), weights > 0, weights)
        data = b"".join(image.data or b"" for image in media)
        return self.make_row({**parts, **image_parts(images, data)}, origin)

    def _limited(self, limit: int) -> ImageProcessor:
        return self.base_images.limited(limit) if limit else self.processor

    def pieces(self, row: Row, size: int) -> list[Row]:
        """The row, split into pieces of at most `size` tokens. A row with images is split after the last answer that
        fits, else before an image. An image that fits into no piece is left out with the tokens before it."""
        if not (images := images_in(row)):
            return super().pieces(row, size)
        trained, start, pieces = row.parts["trained"], 0, list[Row]()
        ends = np.flatnonzero(trained[:-1] & ~trained[1:]) + 1
        while start < row.size:
            fitting = before_image(images, min(start + size, row.size))
            answered = [end for end in ends if start < end <= fitting and before_image(images, int(end)) == end]
            stop = int(answered[-1]) if answered and fitting < row.size else fitting
            if stop <= start:  # the image is longer than a piece
                start = max(image.stop for image in images if image.start <= start < image.stop)
                continue
            pieces.append(self.cut(row, start, stop))
            start = stop
        return pieces

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with the tokens from start to at most stop-1. An image is never cut: if `stop` is inside its tokens,
        the row ends before it. `start` is inside no image."""
        images = images_in(row)
        assert not any(image.start < start < image.stop for image in images), "a part of an image is cut off"
        stop = before_image(images, stop)
        parts = sequence_parts(*(row.parts[name][start:stop] for name in TOKEN_PARTS))
        inside = [at for at, image in enumerate(images) if start <= image.start and image.stop <= stop]
        data = b"".join(stored_bytes(row, images, at) for at in inside)
        moved = [replace(images[at], start=images[at].start - start, stop=images[at].stop - start) for at in inside]
        cut = self.make_row({**parts, **image_parts(moved, data)}, row.origin, row.number)
        if images:
            features = np.flatnonzero(self._token_types(cut))
            in_images = [any(image.start <= place < image.stop for image in moved) for place in features]
            assert all(in_images), "a part of an image is left"
        return cut

    def text_ids(self, row: Row) -> Array:
        ids = row.parts["ids"]
        inside = [np.arange(image.start, image.stop) for image in images_in(row)]
        return np.delete(ids, np.concatenate(inside)) if inside else ids

    def prepare_rows(self, run: RunView, step: StepBatches) -> StepBatches:
        """The step with the features of all images."""
        base = as_loaded(run.model.base)
        always = not self.packable and prompts_both_ways(base.net)  # also batches without images

        def prepared(batch: Batch) -> Batch:
            if not always and not any(row.parts[IMAGES].size for row in batch.rows):
                return batch
            return self.with_rows(batch, (self._with_features(row, base, run.is_simulated) for row in batch.rows))

        return replace(step, batches=tuple(map(prepared, step.batches)))

    def _with_features(self, row: Row, base: LoadedModel, simulated: bool) -> Row:
        """The row with the features and positions of its tokens. A simulation computes no features; it only allocates
        the inputs of each image."""
        types = self._token_types(row)  # (T,)
        count, images = int(types.sum()), images_in(row)
        for image in images if simulated else ():
            size = self._limited(image.limit).input_bytes(image.height, image.width)
            torch.empty(size, dtype=torch.uint8, device=base.device)
        inputs = [] if simulated else [self._features(row, images, at, base) for at in range(len(images))]
        computed = [each[FEATURES].float() for each in inputs]
        empty = torch.zeros(count if simulated else 0, (1 + deep_layers(base.net)) * base.facts.hidden_size)
        features = torch.cat(computed) if computed else empty
        if len(features) != count:
            what = f"{row.origin}: the base computes {len(features)} features for {count} tokens of images"
            raise ModelError(what, "use the processor's files that belong to the base", key="model.name_or_path")
        ids = torch.from_numpy(row.parts["ids"].astype(np.int64))
        positions = rope_positions(base.net, ids, torch.from_numpy(types), inputs)
        added = {} if positions is None else {POSITIONS: positions.numpy()}
        return row.with_parts({FEATURES: features.numpy(), **added})

    def _features(self, row: Row, images: Sequence[RowImage], at: int, base: LoadedModel) -> Tensors:
        """The features of image `at` of a row, from the cache or computed, and its grid if the processor makes one."""
        image, processor = images[at], self._limited(images[at].limit)
        if self.cache is None:
            return _computed(base, processor.inputs(pixels_of(row, images, at), alone=image.alone))
        how = features_key(base.net, base.device, base.dtype)
        key = hash_of([image.sha256, image.alone, processor.fingerprint, how])
        if (stored := self.cache.read(key)) is None:
            stored = _computed(base, processor.inputs(pixels_of(row, images, at), alone=image.alone))
            self.cache.write(key, stored)
        return stored

    @cached_property
    def cache(self) -> TensorCache | None:
        """The cache of features; None if the recipe wants none."""
        limit = self.options.image_cache_bytes
        return TensorCache(default_cache_folder() / "images", limit) if limit else None

    def _token_types(self, row: Row) -> Array:
        """(T,) int64: 1 at features of images, else 0."""
        types: Array = (row.parts["ids"] == self.processor.token_id).astype(np.int64)
        return types

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. In a prepared batch with images, further inputs: image_features (N, D) float32, of all images
        in order; token_types (B, T); answer_types (B, T), 1 from a row's first trained token on; rope_positions
        (3, B, T), if the base has three positions, in place of position_ids."""
        text = [[replace(row, parts=_without_images(row.parts)) for row in some] for some in sequences]
        batch = replace(self.plain.collate(text), sequences=tuple(map(tuple, sequences)))
        features = [row.parts[FEATURES] for row in batch.rows if FEATURES in row.parts]
        if not features:
            return batch
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "position_ids"}
        inputs[FEATURES] = torch.from_numpy(np.concatenate(features))
        inputs["answer_types"] = lay_end_to_end([[_answer_types(row) for row in some] for some in sequences], 1)
        inputs["token_types"] = lay_end_to_end([[self._token_types(row) for row in some] for some in sequences], 0)
        if POSITIONS in batch.rows[0].parts:
            lines = (
                lay_end_to_end([[row.parts[POSITIONS][at] for row in some] for some in sequences], 0) for at in range(3)
            )
            inputs[POSITIONS] = torch.stack(list(lines))
        return replace(batch, inputs=inputs)

    def spans(self, row: Row) -> list[Span]:
        """The text before, between and after the images, and each image, for preview."""
        spans, labels, position = list[Span](), labels_of_tokens(row), 0
        for at, image in enumerate(images := images_in(row)):
            spans.append(_text_span(row, labels, position, image.start))
            grid = self._limited(image.limit).grid(image.height, image.width)
            shape = "" if grid is None else f" {grid[1]}x{grid[0]}"
            count = int(self._token_types(row)[image.start : image.stop].sum())
            title = f"<image{shape} = {count} tokens> ({image.width} x {image.height} pixels)"
            spans.append(Span(title=title, image=covering(pixels_of(row, images, at), THUMBNAIL), continues=True))
            position = image.stop
        return [*spans, _text_span(row, labels, position, row.size)] if spans else self.plain.spans(row)


def _answer_types(row: Row) -> Array:
    """(T,) int64: 1 from the first trained token on, else 0."""
    types: Array = np.maximum.accumulate(row.parts["trained"].astype(np.int64))
    return types


def _without_images(parts: RowParts) -> dict[str, Array]:
    return {name: values for name, values in parts.items() if name not in IMAGE_PARTS}


def _text_span(row: Row, labels: Array, start: int, stop: int) -> Span:
    return Span(row.parts["ids"][start:stop], labels[start:stop] >= 0, continues=start > 0)


def _computed(base: LoadedModel, inputs: Tensors) -> Tensors:
    """The features of an image, in the dtype of the base, and its grid if the processor makes one."""
    grid = {name: tensor for name, tensor in inputs.items() if name == GRID}
    return {FEATURES: image_features(base.net, inputs, base.device, base.dtype).cpu(), **grid}


def _expansion(processor: ImageProcessor, image: Media, size: Size, alone: bool) -> str:
    """The text that stands for an image. Raises: DataError with its file if the processor refuses its size."""
    try:
        return processor.expansion(*size, alone=alone)
    except DataError as error:
        raise DataError(f"{image.name}: {error.problems[0].what}", error.problems[0].how) from error


def learned(objective: Objective, rows: Sequence[Rows]) -> Objective:
    """The objective after it has read all rows: it needs the parts of the base that read images only if a row has
    images."""
    count = sum(int((part_lengths(some, IMAGES) > 0).sum()) for some in rows)
    if not count:
        return objective
    assert isinstance(objective.rows, ImageTextRows)
    layout = ", ".join(f"{name} counts {unit}" for name, unit in objective.rows.processor.layout.items())
    notes = (
        f"{count:,} rows have images; {objective.rows.processor.limit_text}; the processor's inputs: {layout}",
        "the predicted peak has the frozen parts and the inputs of one image, but not the activations of these parts",
    )
    return replace(reading_images(objective), notes=(*objective.notes, *notes))


def reading_images(objective: Objective) -> Objective:
    """The objective for rows with images."""
    assert isinstance(objective.rows, ImageTextRows)
    assert objective.answering is not None
    rows = replace(objective.rows, packable=False)
    limit = {IMAGE_TOKENS: rows.image_tokens} if rows.image_tokens else {}
    answering = replace(objective.answering, processor=rows.tokenizer.with_images(rows.processor))
    facts = {**objective.facts, IMAGES: True, **limit}
    return replace(objective, rows=rows, answering=answering, section=_section, facts=facts)


def _section(model: ModelSection, seed: int) -> ModelSection:
    return ImageModel.of(model)
