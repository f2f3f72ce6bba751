"""A diffusion model learns what a few pictures show.

Comes in: pictures with prompts, then a Batch and the model's predictions.  Goes out: rows, then Loss (a sum over
pictures).
The loss of a picture is the mean squared error of the prediction, plus `prior_loss_weight` times that of a picture of
the class, drawn by the base, which keeps what the class looks like.  Source: Ruiz et al. 2023; diffusers' scripts.
Noise, times, crops and class pictures are drawn from (seed, step, row).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    Batch,
    Gather,
    Loss,
    ModelOutput,
    Part,
    Row,
    RowLayout,
    Sampling,
    Sums,
    Told,
    Window,
)
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.images import Pixels, Size, cropped
from tunekit.errors import InputError, Problem, RecipeError
from tunekit.files.cache_folder import hash_of
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import placed
from tunekit.model.call import seed_for
from tunekit.model.families.diffusion import IDS
from tunekit.model.families.pipeline.drawing import Drawing, draw_pictures
from tunekit.model.families.pipeline.parts import PIPELINES, TEXT_ENCODERS
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.objectives.diffusion import noise
from tunekit.objectives.diffusion.buckets import bucket_problems, made_buckets
from tunekit.objectives.diffusion.class_images import ClassImages
from tunekit.objectives.diffusion.kept import Kept, scaled_latents
from tunekit.objectives.diffusion.rows import PictureEncoder, bucket_of, pixels_of, prompt_of
from tunekit.objectives.losses.logprobs import row_losses
from tunekit.objectives.rows import RowObjective
from tunekit.recipe.model import ModelSection, PipelineModel
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

Place = tuple[int | str, ...]  # what is drawn depends on: seed, step, row, and which of a row's pictures
# settings without which an adapter's folder cannot be used
FACTS = ("resolution", "aspect_ratio_buckets", "train_text_encoder", "prediction_type")
CUT = "images of one bucket pass through the network together: a micro-batch that holds several becomes several"
PREPARED = ("latents", "target", "steps", "weights", "sizes")  # parts of a row that its step gives it


class Dreambooth(RowObjective):
    """loss = sum over pictures of w_t |prediction - target|^2 + prior_loss_weight |prediction' - target'|^2, means over
    numbers, ' of a class picture; divided by the step's number of pictures."""

    measures = False  # whether rows are only measured: without class pictures or weights, at fixed times and noise
    layout = RowLayout(
        {"pixels": "u1", "shape": "<i4", "original": "<i4", "bucket": "<i4", "prompt": "u1"},
        (),
        sizes=1,
        token_sizes=(),
        told_by=("pixels", "prompt"),
        alike="bucket",
    )

    def __init__(self, settings: DreamboothSettings, processor: PipelineProcessor, facts: Mapping[str, Any]) -> None:
        """`facts`: what a folder says of the adapter in it, where no recipe does."""
        given = {name: facts[name] for name in FACTS if name in facts}
        if isinstance(buckets := given.get("aspect_ratio_buckets"), list):
            given["aspect_ratio_buckets"] = tuple((high, wide) for high, wide in buckets)
        settings = settings.model_copy(update=given)
        if settings.prediction_type != "auto" and not processor.flows:
            processor = replace(processor, predicts=settings.prediction_type)
        super().__init__(settings, processor)
        self.settings, self.processor = settings, processor
        self.facts = {name: getattr(settings, name) for name in FACTS}
        self.resolution = settings.resolution or processor.resolution
        self.facts["resolution"] = self.resolution
        if settings.aspect_ratio_buckets is not None:
            self.facts["aspect_ratio_buckets"] = [*map(list, self.buckets)]
        self.kept = Kept(processor)
        self.class_images = ClassImages(settings, self.resolution) if settings.class_prompt else None
        decides = (settings.method, settings.instance_prompt, self.buckets)  # what a row is made of
        self.fingerprint = hash_of([*decides, processor.fingerprint])
        self.notes = [] if len(self.buckets) == 1 else [CUT]
        self.notes += [] if self.class_images is None else self.class_images.notes()
        self._check()
        self.schedule = _schedule(processor)

    @property
    def buckets(self) -> tuple[Size, ...]:
        """Sizes that are trained on."""
        written = self.settings.aspect_ratio_buckets
        if isinstance(written, str):
            return made_buckets(self.resolution, self.processor.multiple)
        return ((self.resolution, self.resolution),) if written is None else written

    def _check(self) -> None:
        """Raises: RecipeError for settings that the pipeline cannot obey; ModelError for a pipeline of another kind."""
        settings, processor, problems = self.settings, self.processor, []
        most = processor.most_side
        if most is not None and self.resolution > most:
            what = f"{self.resolution}: the denoiser has positions for {most} pixels of a side"
            problems.append(Problem(what, "write a smaller one", key="objective.resolution"))
        if self.resolution % processor.multiple:
            what = f"{self.resolution} is no multiple of {processor.multiple}, by which the denoiser divides it"
            problems.append(Problem(what, "write one", key="objective.resolution"))
        if settings.aspect_ratio_buckets is not None:
            problems += bucket_problems(self.buckets, processor.multiple, most)
        if processor.flows:
            for key, given in (("snr_gamma", settings.snr_gamma), ("prediction_type", settings.prediction_type)):
                if given not in (None, "auto"):
                    what = "is of diffusion schedules, and this pipeline was trained by flow matching"
                    problems.append(Problem(what, "remove it", key=f"objective.{key}"))
        elif settings.weighting_scheme != "none":
            what = "is of flow matching, and this pipeline has a diffusion schedule"
            problems.append(Problem(what, "remove it", key="objective.weighting_scheme"))
        if settings.cache_latents is True and self.changes:
            what = "random crops and flips change an image from step to step"
            problems.append(Problem(what, "write auto, or leave them out", key="objective.cache_latents"))
        if problems:
            raise RecipeError.of(problems)
        processor.check()

    @property
    def changes(self) -> bool:
        """Whether a picture differs from step to step."""
        return not self.settings.center_crop or self.settings.random_flip

    @property
    def caches(self) -> bool:
        """Whether latents are encoded before step 1."""
        return self.settings.cache_latents is not False and not self.changes

    def section(self, model: ModelSection, seed: int = 0) -> ModelSection:
        """The pipeline with the parts that are trained."""
        denoiser = PIPELINES[self.processor.kind]
        encoders = tuple(name for name in self.processor.tokenizers) if self.settings.train_text_encoder else ()
        parts = (denoiser, *(name for name in encoders if name != "text_encoder_3"))
        return PipelineModel.of(model, family=self.family, trained=parts, stays=not self.caches)

    def row_encoder(self, options: EncodeOptions) -> PictureEncoder:
        """What encodes pictures."""
        return PictureEncoder(self.settings.instance_prompt, self.buckets, self.processor)

    def held_out(self) -> Dreambooth:
        """As rows are only measured."""
        found = copy(self)
        found.measures = True
        return found

    def measuring(self, model: Any, rows: Any, batches: Iterable[Batch], gather: Gather) -> Dreambooth:
        """As rows are only measured: one by one."""
        return self.held_out()

    def begin(self, model: Any, rows: Sequence[Any], told: Told) -> Mapping[str, str]:
        """Draw the class pictures that are missing, and encode what every step would encode anew."""
        net, prior = model.base.net, list[tuple[Pixels, Size]]()
        if self.class_images is not None:
            sizes = sorted({bucket_of(some[index]) for some in rows for index in range(len(some))})
            prior = self.class_images.ready(model, self.processor, sizes, told)
        if self.caches:
            own = ((pixels_of(some[index]), bucket_of(some[index])) for some in rows for index in range(len(some)))
            count = sum(map(len, rows)) + len(prior)
            with net.beside_on(model.device, ["vae"]):
                for done, (pixels, size) in enumerate(chain(own, prior)):
                    told("images encoded", done, count)
                    self.kept.posterior(model, cropped(pixels, size)[0])
        if not net.trains_text:
            with net.beside_on(model.device, TEXT_ENCODERS):
                self.kept.embed(model, self._prompts(rows))
        return {} if self.class_images is None else {"objective.class_data_dir": self.class_images.digest()}

    @property
    def draws(self) -> bool:
        """Whether pictures are drawn during the run."""
        return bool(self.settings.validation_prompts) or self.class_images is not None

    def parts_beside(self, model: Any) -> list[Any]:
        """All parts where pictures are drawn, else the VAE, and then in its place the text encoders."""
        net = model.base.net
        return list(net.beside.values()) if self.draws or net.stays else [net.part("vae")]

    def rehearse(self, model: Any, batch: Batch) -> None:
        """One picture encoded, and one decoded where some are drawn."""
        vae, side = model.base.net.part("vae"), self.resolution
        vae.encode(torch.empty(1, 3, *bucket_of(batch.rows[0]), device="meta"))
        if self.draws:
            vae.decode(torch.empty(1, *self.processor.latent_shape(side, side), device="meta"))

    def pictures(self, model: Any, told: Told) -> list[Pixels]:
        """Of the validation prompts, each by a seed of its own."""
        prompts = self.settings.validation_prompts
        seeds = [seed_for("validation picture", number) for number in range(len(prompts))]
        return self.drawn(model, prompts, seeds, told) if prompts else []

    def drawn(self, model: Any, prompts: Sequence[str], seeds: Sequence[int], told: Told) -> list[Pixels]:
        """(H, W, 3) of each prompt."""
        settings, found = self.settings, list[Pixels]()
        how = Drawing(settings.num_inference_steps, settings.guidance_scale, self.resolution, self.resolution)
        with model.base.net.beside_on(model.device):
            for done, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                told("images drawn", done, len(prompts))
                found += draw_pictures(model.base.net, self.processor, [prompt], [seed], how)
        return found

    def _prompts(self, rows: Sequence[Any]) -> Iterator[str]:
        yield from (prompt_of(some[index]) for some in rows for index in range(len(some)))
        if self.settings.class_prompt:
            yield self.settings.class_prompt

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each row with its noisy latents, what is to be predicted of them, and when."""
        seen = Counter[int]()  # a row may be in a step more than once
        batches = []
        for batch in window.batches:
            rows = []
            for row in batch.rows:
                place = (window.seed, window.step, row.number, seen[row.number])
                rows.append(self._measured(model, row) if self.measures else self._noisy(model, row, place))
                seen[row.number] += 1
            if not model.base.net.trains_text:
                self.kept.embed(model, (prompt for row in rows for prompt in self._of_row(row)))
            batches.append(self._collated(rows, model.base.net.trains_text))
        return replace(window, batches=tuple(batches))

    def _noisy(self, model: Any, row: Row, place: Place) -> Row:
        """The picture and, with prior preservation, one of the class."""
        size = bucket_of(row)
        pictures = [self._sample(model, pixels_of(row), row.parts["original"].tolist(), size, (*place, 0))]
        weight = 1.0
        if self.settings.snr_gamma is not None:
            step = torch.tensor([pictures[0]["steps"]])
            weight = float(noise.min_snr_weights(self.schedule, step, self.settings.snr_gamma))
        weights = [weight]
        if self.class_images is not None:
            prior, original = self.class_images.pick(model, seed_for("class picture", *place), size)
            pictures.append(self._sample(model, prior, original, size, (*place, 1)))
            weights.append(self.settings.prior_loss_weight)
        if self.schedule.prediction == "flow":
            sigmas = self.schedule.noise[torch.tensor([picture["steps"] for picture in pictures])]
            factors = noise.flow_weights(self.settings.weighting_scheme, sigmas).tolist()
            weights = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        return _with(row, pictures, weights)

    def _measured(self, model: Any, row: Row) -> Row:
        """The picture at even distances of the schedule, always with the same noise."""
        count = self.settings.validation_draws
        steps = [int((draw + 0.5) * len(self.schedule) / count) for draw in range(count)]
        places: list[Place] = [("evaluation", row.number, draw) for draw in range(count)]
        pictures = [
            self._sample(model, pixels_of(row), row.parts["original"].tolist(), bucket_of(row), place, step)
            for place, step in zip(places, steps, strict=True)
        ]
        return _with(row, pictures, [1.0 / count] * count)

    def _sample(
        self, model: Any, pixels: Pixels, original: Sequence[int], size: Size, place: Place, step: int | None = None
    ) -> dict[str, Any]:
        """Noisy latents of a picture, their target, and the step, which is drawn where it is not given."""
        pixels, corner = self._view(pixels, size, place, fixed=step is not None)
        posterior = self.kept.posterior(model, pixels, keep=self.caches or step is not None)
        normal = torch.randn(posterior[0].shape, generator=noise.generator_for("latents", *place))
        latents = scaled_latents(self.processor, posterior, normal)[None]
        step = self._step(place) if step is None else step
        offset = 0.0 if self.measures else self.settings.noise_offset
        drawn, steps = noise.drawn_noise(latents.shape[1:], offset, *place)[None], torch.tensor([step])
        return {
            "latents": noise.noisy(self.schedule, latents, drawn, steps)[0].numpy(),
            "target": noise.target(self.schedule, latents, drawn, steps)[0].numpy(),
            "steps": step,
            "sizes": [*map(int, original), *corner, *size],
        }

    def _view(self, pixels: Pixels, size: Size, place: Place, fixed: bool) -> tuple[Pixels, Size]:
        """What of a picture is seen, and where that begins."""
        if fixed or not self.changes:
            return cropped(pixels, size)
        generator, corner = noise.generator_for("view", *place), None
        if bool(torch.rand((), generator=generator) < 0.5) and self.settings.random_flip:
            pixels = pixels[:, ::-1]  # before it is cropped, as in diffusers' scripts: corners are the mirror image's
        if not self.settings.center_crop:
            most = [whole - seen + 1 for whole, seen in zip(pixels.shape[:2], size, strict=True)]
            top, left = (int(torch.randint(0, count, (), generator=generator)) for count in most)
            corner = (top, left)
        return cropped(pixels, size, corner)

    def _step(self, place: Place) -> int:
        """A place of the schedule: evenly, or of a flow as its weighting scheme has it."""
        generator, settings = noise.generator_for("step", *place), self.settings
        if self.schedule.prediction != "flow":
            return int(torch.randint(0, len(self.schedule), (), generator=generator))
        uniform, normal = (float(draw((), generator=generator)) for draw in (torch.rand, torch.randn))
        scheme = settings.weighting_scheme
        found = noise.flow_position(
            scheme, uniform, normal, settings.logit_mean, settings.logit_std, settings.mode_scale
        )
        return min(int(found * len(self.schedule)), len(self.schedule) - 1)

    def _of_row(self, row: Row) -> list[str]:
        """The prompts of a prepared row's pictures."""
        if self.measures:
            return [prompt_of(row)] * len(row.parts["steps"])
        return [prompt_of(row), *([self.settings.class_prompt] if self.settings.class_prompt else [])]

    def _collated(self, rows: Sequence[Row], trains_text: bool) -> Batch:
        """Shapes: latents, target (N, C, H, W); times, weights, of_row (N,); sizes (N, 6); N pictures of all rows."""
        joined = {name: np.concatenate([row.parts[name] for row in rows]) for name in PREPARED}
        prompts = [prompt for row in rows for prompt in self._of_row(row)]
        inputs = {"latents": torch.from_numpy(joined["latents"]), "sizes": torch.from_numpy(joined["sizes"])}
        inputs["times"] = self.schedule.times[torch.from_numpy(joined["steps"])]
        if trains_text:
            inputs |= {f"{IDS}{name}": torch.from_numpy(ids) for name, ids in self.processor.ids(prompts).items()}
        else:
            inputs |= self.kept.embedded(prompts)
        counts = torch.tensor([len(row.parts["steps"]) for row in rows])
        targets = {name: torch.from_numpy(joined[name]) for name in ("target", "weights")}
        targets["of_row"] = torch.arange(len(rows)).repeat_interleave(counts)
        return Batch(inputs, targets, tuple((row,) for row in rows), rows[0].size)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Rows that their step has not prepared yet have no tensors: it draws them."""
        rows = [row for sequence in sequences for row in sequence]
        if "latents" in rows[0].parts:
            return self._collated(rows, self.settings.train_text_encoder)
        return Batch({}, {}, tuple(map(tuple, sequences)), max(row.size for row in rows))

    def spans(self, row: Row) -> list[Part]:
        """The prompt, the picture's size and its middle in its bucket."""
        (height, width), (high, wide), empty = row.parts["original"].tolist(), bucket_of(row), np.zeros(0, np.int64)
        title = f"{prompt_of(row)} ({width} x {height} pixels, trained on at {wide} x {high})"
        return [Part(empty, np.zeros(0, np.bool_), title, cropped(pixels_of(row), bucket_of(row))[0])]

    def answer(
        self,
        model: Any,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """Raises: InputError: pictures are drawn by `drawn`."""
        raise InputError("a pipeline draws images and writes no answers", "use tunekit generate")

    def losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """(R,) float32 of each row: the weighted mean squared errors of its pictures, added."""
        assert output.logits is not None
        device = output.logits.device
        target, weights, of_row = (placed(batch.targets[name], device) for name in ("target", "weights", "of_row"))
        errors = ((output.logits.float() - target) ** 2).mean(dim=(1, 2, 3)) * weights  # (N,)
        return torch.zeros(len(batch.rows), device=device).index_add(0, of_row, errors)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.logits (N, C, H, W) -> total (1,)."""
        return Loss(self.losses(output, batch).sum()[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss and units."""
        losses = self.losses(output, batch)
        units = torch.tensor(float(len(batch.rows)), dtype=torch.float64)
        return {"loss": losses.sum(dtype=summing_dtype(losses.device)), "units": units, **row_losses(losses, batch)}


def _with(row: Row, pictures: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> Row:
    """The row as its step sees it, without its pixels."""
    parts: dict[str, Any] = {"prompt": row.parts["prompt"], "shape": row.parts["shape"]}
    parts |= {name: np.stack([picture[name] for picture in pictures]) for name in ("latents", "target")}
    parts["steps"] = np.array([picture["steps"] for picture in pictures], np.int64)
    parts["sizes"] = np.array([picture["sizes"] for picture in pictures], np.int64)
    parts["weights"] = np.array(weights, np.float32)
    return Row(parts, row.sizes, row.supervised, row.origin, row.number)


def _schedule(processor: PipelineProcessor) -> noise.NoiseSchedule:
    if processor.flows:
        return noise.NoiseSchedule.of_sigmas(*processor.sigmas)
    return noise.NoiseSchedule.of_alphas(processor.prediction, processor.alphas_cumprod)


def make(settings: DreamboothSettings, processor: PipelineProcessor, facts: Mapping[str, Any]) -> Dreambooth:
    """The objective of `objective: dreambooth`."""
    return Dreambooth(settings, processor, facts)
