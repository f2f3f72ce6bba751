"""The loss of diffusion models: the mean squared error of the network's prediction from noisy latents.

z_t = a_t x + s_t n; the target is n (epsilon), a n - s x (v_prediction), x (sample), or n - x (flow, where a = 1 - s).
All random draws depend only on (seed, step, row).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunekit.contracts import (
    Batch,
    Companion,
    Loss,
    LossKind,
    ModelOutput,
    Pixels,
    Row,
    RowParts,
    Rows,
    RunView,
    StepBatches,
    Sums,
    draw_rows,
)
from tunekit.data.encoding.images import Size, cropped
from tunekit.errors import Problem
from tunekit.machine.placing import to_device
from tunekit.model.call import seed_for
from tunekit.objectives.losses.row_sums import loss_sums
from tunekit.objectives.rows.pictures import bucket_of, pixels_of, prompt_of, text_parts
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

DrawKey = tuple[int | str, ...]  # key of random draws: seed, step, row, and the number of the image in the row


class Pipeline(Companion):
    """The companion of this loss: the frozen parts of a pipeline, which encode images and prompts."""

    def class_image(self, run: RunView, number: int, size: Size) -> tuple[Pixels, Size]:
        """A class image, scaled to cover this size, and the size of the image in its file."""
        raise NotImplementedError

    def latents(self, run: RunView, pixels: Pixels, generator: torch.Generator, *, keep: bool) -> Tensor:
        """A sample of the image's latents, shape (C, H, W), scaled for the denoiser. `keep`: whether to cache them."""
        raise NotImplementedError

    def texts(self, run: RunView, prompts: Sequence[str]) -> list[RowParts]:
        """The denoiser's inputs for each prompt."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DiffusionLoss(LossKind):
    """loss = sum over images of w_t |prediction - target|^2 + prior_loss_weight |prediction' - target'|^2; divided by
    the step's number of images. |.|^2 is the mean of the squared elements, and ' marks a class image.  Source: Ruiz et
    al. 2023; diffusers' scripts.

    The base generates the class images, so that the trained model does not forget what the class looks like.
    `measures`: the loss is for evaluation, at fixed diffusion times with fixed noise, without class images or weights.
    """

    settings: DreamboothSettings
    schedule: NoiseSchedule
    measures: bool = False

    def evaluation_copy(self) -> DiffusionLoss:
        """A copy of the loss for evaluation, at fixed diffusion times."""
        return replace(self, measures=True)

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> DiffusionLoss:
        """A copy of the loss for evaluation, at fixed diffusion times."""
        return self.evaluation_copy()

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add noisy latents, their diffusion times and their targets to each row of the step. A row that already has
        latents is not changed."""
        return draw_rows(run.rows, step, partial(self._prepared, run))

    def _prepared(self, run: RunView, row: Row, place: DrawKey) -> Row:
        if "latents" in row.parts:
            return row
        return self._at_fixed_times(run, row) if self.measures else self._at_drawn_time(run, row, place)

    def _at_drawn_time(self, run: RunView, row: Row, place: DrawKey) -> Row:
        """The row with noisy latents of its image at a random diffusion time. With prior preservation, also noisy
        latents of a class image."""
        settings, size, prompts = self.settings, bucket_of(row), [prompt_of(row)]
        pictures = [self._sample(run, pixels_of(row), row.parts["original"].tolist(), size, (*place, 0))]
        weights = [1.0]
        if settings.snr_gamma is not None:
            step = torch.tensor([pictures[0]["step"]])
            weights = [float(min_snr_weights(self.schedule, step, settings.snr_gamma))]
        if settings.class_prompt is not None:
            number = seed_for("class picture", *place)
            prior, original = run.companion(Pipeline).class_image(run, number, size)
            pictures.append(self._sample(run, prior, original, size, (*place, 1)))
            weights.append(settings.prior_loss_weight)
            prompts.append(settings.class_prompt)
        if self.schedule.prediction == "flow":
            sigmas = self.schedule.noise[torch.tensor([picture["step"] for picture in pictures])]
            factors = flow_weights(settings.weighting_scheme, sigmas).tolist()
            weights = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        return self._with(run, row, pictures, weights, prompts)

    def _at_fixed_times(self, run: RunView, row: Row) -> Row:
        """The row with noisy latents of its image at evenly spaced diffusion times. The noise is the same in every
        evaluation."""
        count = self.settings.validation_draws
        pictures = []
        for draw in range(count):
            step = int((draw + 0.5) * len(self.schedule) / count)
            place: DrawKey = ("evaluation", row.number, draw)
            original = row.parts["original"].tolist()
            pictures.append(self._sample(run, pixels_of(row), original, bucket_of(row), place, step))
        return self._with(run, row, pictures, [1.0 / count] * count, [prompt_of(row)] * count)

    def _sample(
        self, run: RunView, pixels: Pixels, original: Sequence[int], size: Size, place: DrawKey, step: int | None = None
    ) -> dict[str, Any]:
        """Noisy latents of an image, their target, and their step in the schedule. If `step` is None, it is random."""
        settings, fixed = self.settings, step is not None
        pixels, corner = self.view(pixels, size, place) if settings.varies and not fixed else cropped(pixels, size)
        normal = generator_for("latents", *place)
        latents = run.companion(Pipeline).latents(run, pixels, normal, keep=settings.caches or fixed)[None]
        step = self._step(place) if step is None else step
        offset = 0.0 if self.measures else settings.noise_offset
        noise, steps = drawn_noise(latents.shape[1:], offset, *place)[None], torch.tensor([step])
        return {
            "latents": noisy(self.schedule, latents, noise, steps)[0].numpy(),
            "target": target(self.schedule, latents, noise, steps)[0].numpy(),
            "step": step,
            "sizes": [*map(int, original), *corner, *size],
        }

    def view(self, pixels: Pixels, size: Size, place: DrawKey) -> tuple[Pixels, Size]:
        """The image's crop for this step, and the crop's top left corner."""
        generator, corner = generator_for("view", *place), None
        if bool(torch.rand((), generator=generator) < 0.5) and self.settings.random_flip:
            pixels = pixels[:, ::-1]  # before the crop, as in diffusers' scripts; corners refer to the mirror image
        if not self.settings.center_crop:
            most = [whole - seen + 1 for whole, seen in zip(pixels.shape[:2], size, strict=True)]
            top, left = (int(torch.randint(0, count, (), generator=generator)) for count in most)
            corner = (top, left)
        return cropped(pixels, size, corner)

    def _step(self, place: DrawKey) -> int:
        """A random step of the schedule: uniform; for flow matching, from the distribution of the weighting scheme."""
        generator, settings, count = generator_for("step", *place), self.settings, len(self.schedule)
        if self.schedule.prediction != "flow":
            return int(torch.randint(0, count, (), generator=generator))
        uniform, normal = (float(draw((), generator=generator)) for draw in (torch.rand, torch.randn))
        numbers = (settings.logit_mean, settings.logit_std, settings.mode_scale)
        return min(int(flow_position(settings.weighting_scheme, uniform, normal, *numbers) * count), count - 1)

    def _with(
        self,
        run: RunView,
        row: Row,
        pictures: Sequence[Mapping[str, Any]],
        weights: Sequence[float],
        prompts: Sequence[str],
    ) -> Row:
        """The row, whose pixels are replaced by the network's inputs and the loss's targets."""
        parts = {name: values for name, values in row.parts.items() if name != "pixels"}
        parts |= {name: np.stack([picture[name] for picture in pictures]) for name in ("latents", "target")}
        parts["times"] = self.schedule.times[torch.tensor([picture["step"] for picture in pictures])].numpy().copy()
        parts["sizes"] = np.array([picture["sizes"] for picture in pictures], np.int64)
        parts["weights"] = np.array(weights, np.float32)
        return replace(row, parts=parts | text_parts(run.companion(Pipeline).texts(run, prompts)))

    def losses(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The loss of each row, shape (R,) float32: the weighted sum of its images' mean squared errors."""
        assert output.logits is not None
        device = output.logits.device
        wanted, weights, of_row = (to_device(batch.targets[name], device) for name in ("target", "weights", "of_row"))
        errors = ((output.logits.float() - wanted) ** 2).mean(dim=(1, 2, 3)) * weights  # (N,)
        return torch.zeros(len(batch.rows), device=device).index_add(0, of_row, errors)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The sum of the rows' losses. Shapes: output.logits (N, C, H, W) -> total (1,)."""
        return Loss(self.losses(output, batch).sum()[None])

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """The sums over rows: `loss` and `units` (the number of rows)."""
        losses = self.losses(output, batch)
        units = torch.tensor(float(len(batch.rows)), dtype=torch.float64)
        return {**loss_sums(losses, batch), "units": units}


def setting_problems(settings: DreamboothSettings, flows: bool) -> Iterator[Problem]:
    """Problems of settings that do not fit the pipeline. `flows`: whether the pipeline was trained by flow matching."""
    if flows:
        for key, value in (("snr_gamma", settings.snr_gamma), ("prediction_type", settings.prediction_type)):
            if value not in (None, "auto"):
                what = "applies to diffusion schedules, but this pipeline was trained by flow matching"
                yield Problem(what, "remove this key", key=f"objective.{key}")
    elif settings.weighting_scheme != "none":
        what = "applies to flow matching, but this pipeline has a diffusion schedule"
        yield Problem(what, "remove this key", key="objective.weighting_scheme")
    if settings.cache_latents is True and settings.varies:
        what = "images cannot be cached, because random crops and flips change them in every step"
        yield Problem(what, "write auto, or remove random crops and flips", key="objective.cache_latents")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The factors of signal and noise in each of the schedule's S steps. `signal`: a, `noise`: s, (S,) float32.
    `times`: the network's input for each step, (S,)."""

    prediction: str  # epsilon, v_prediction, sample or flow
    signal: Tensor
    noise: Tensor
    times: Tensor

    def __len__(self) -> int:
        return len(self.times)

    @classmethod
    def of_alphas(cls, prediction: str, alphas_cumprod: Tensor) -> NoiseSchedule:
        """The schedule of DDPM: a = sqrt(alphas_cumprod), s = sqrt(1 - alphas_cumprod).  Source: Ho et al. 2020, eq. 4.

        Shapes: alphas_cumprod (S,).
        """
        alphas = alphas_cumprod.float()
        return cls(prediction, alphas**0.5, (1 - alphas) ** 0.5, torch.arange(len(alphas)))

    @classmethod
    def of_sigmas(cls, sigmas: Tensor, times: Tensor) -> NoiseSchedule:
        """The straight path of rectified flow: a = 1 - sigma.  Source: Liu et al. 2022; Esser et al. 2024.

        Shapes: sigmas, times (S,).
        """
        sigmas = sigmas.float()
        return cls("flow", 1 - sigmas, sigmas, times.float())


def noisy(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """a_t x + s_t n. Shapes: latents, noise (B, C, H, W); steps (B,) -> (B, C, H, W)."""
    return _each(schedule.signal, steps) * latents + _each(schedule.noise, steps) * noise


def target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """The target of the network's prediction. Shapes: as for `noisy`."""
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "v_prediction":
        return _each(schedule.signal, steps) * noise - _each(schedule.noise, steps) * latents
    return latents if schedule.prediction == "sample" else noise - latents


def min_snr_weights(schedule: NoiseSchedule, steps: Tensor, gamma: float) -> Tensor:
    """Weights of the squared error of the predicted quantity. They are chosen so that the squared error of x has the
    weight min(SNR, gamma).

    SNR = (a / s)^2. The weight for x is min(SNR, g). The error of n is SNR times the error of x, so its weight is
    min(SNR, g) / SNR. The error of v is SNR + 1 times the error of x, so its weight is min(SNR, g) / (SNR + 1).
    Source: Hang et al. 2023, section 3.4. (diffusers' SDXL script weights v with min(SNR, g) / SNR + 1; its
    text-to-image script agrees with the paper.) Shapes: steps (B,) -> (B,) float32.
    """
    signal, noise = schedule.signal[steps].double(), schedule.noise[steps].double()
    snr = (signal / noise) ** 2
    if schedule.prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0).float()
    most = snr.clamp(max=gamma)
    return (most if schedule.prediction == "sample" else most / (snr + 1)).float()


def flow_weights(scheme: str, sigmas: Tensor) -> Tensor:
    """The weight of the squared error at each sigma: (B,) -> (B,).  Source: Esser et al. 2024, section 3.1, as in
    diffusers' compute_loss_weighting_for_sd3."""
    if scheme == "sigma_sqrt":
        return sigmas**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def flow_position(scheme: str, uniform: float, normal: float, mean: float, std: float, mode_scale: float) -> float:
    """The position of a row in the schedule, in [0, 1), computed from a uniform and a normal random number.  Source:
    Esser et al. 2024, section 3.1, as in diffusers' compute_density_for_timestep_sampling."""
    if scheme == "logit_normal":
        return 1 / (1 + math.exp(-(mean + std * normal)))
    if scheme == "mode":
        return 1 - uniform - mode_scale * (math.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def generator_for(*parts: int | str) -> torch.Generator:
    """A random generator on the CPU. Its seed depends only on `parts`."""
    return torch.Generator("cpu").manual_seed(seed_for(*parts))


def drawn_noise(shape: Sequence[int], offset: float, *parts: int | str) -> Tensor:
    """Normal noise of shape (C, H, W). To each channel, `offset` times one normal number is added, which shifts the
    channel's mean (offset noise, Guttenberg 2023)."""
    generator = generator_for("noise", *parts)
    noise = torch.randn(tuple(shape), generator=generator)
    return noise + offset * torch.randn((shape[0], 1, 1), generator=generator) if offset else noise


def _each(values: Tensor, steps: Tensor) -> Tensor:
    """The values at these steps, with three dimensions added to multiply images. Shapes: values (S,), steps (B,) -> (B,
    1, 1, 1)."""
    return values[steps].view(-1, 1, 1, 1)
