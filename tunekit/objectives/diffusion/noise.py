"""Pictures with noise, and what a diffusion model is to make of them: pure functions over latents.

Latents, noise and the schedule go in; noisy latents, targets and weights come out.  z_t = a_t x + s_t n; the target is
n (epsilon), a n - s x (v_prediction), x (sample), or n - x (flow, where a = 1 - s).
What is drawn depends on (seed, step, row) alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.model.call import seed_for


@dataclass(frozen=True)
class NoiseSchedule:
    """`signal` a and `noise` s of each step, (S,) float32; `times`: what the network is told of it, (S,)."""

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
    """What the network is to give. Shapes: as noisy's."""
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "v_prediction":
        return _each(schedule.signal, steps) * noise - _each(schedule.noise, steps) * latents
    return latents if schedule.prediction == "sample" else noise - latents


def min_snr_weights(schedule: NoiseSchedule, steps: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) as a weight of the squared error of x, brought to the error of what is predicted.

    SNR = (a / s)^2.  Of x: min(SNR, g); of n, whose error is SNR times that of x: min(SNR, g) / SNR; of v, whose error
    is SNR + 1 times it: min(SNR, g) / (SNR + 1).  Source: Hang et al. 2023, section 3.4.  (diffusers' SDXL script
    weighs v with min(SNR, g) / SNR + 1, its text-to-image script as the paper does.)
    Shapes: steps (B,) -> (B,) float32.
    """
    signal, noise = schedule.signal[steps].double(), schedule.noise[steps].double()
    snr = (signal / noise) ** 2
    if schedule.prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0).float()
    most = snr.clamp(max=gamma)
    return (most if schedule.prediction == "sample" else most / (snr + 1)).float()


def flow_weights(scheme: str, sigmas: Tensor) -> Tensor:
    """Weight of the squared error at each sigma: (B,) -> (B,).  Source: Esser et al. 2024, section 3.1, as diffusers'
    compute_loss_weighting_for_sd3 has it."""
    if scheme == "sigma_sqrt":
        return sigmas**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def flow_position(scheme: str, uniform: float, normal: float, mean: float, std: float, mode_scale: float) -> float:
    """Where in [0, 1) of the schedule a row is, of a uniform and a normal number.  Source: Esser et al. 2024, section
    3.1, as diffusers' compute_density_for_timestep_sampling has it."""
    if scheme == "logit_normal":
        return 1 / (1 + math.exp(-(mean + std * normal)))
    if scheme == "mode":
        return 1 - uniform - mode_scale * (math.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    return uniform


def generator_for(*parts: int | str) -> torch.Generator:
    """A generator of the CPU that depends on the parts alone."""
    return torch.Generator("cpu").manual_seed(seed_for(*parts))


def drawn_noise(shape: Sequence[int], offset: float, *parts: int | str) -> Tensor:
    """(C, H, W) normal numbers, with `offset` times one more of each channel, so that its mean moves too
    (offset noise, Guttenberg 2023)."""
    generator = generator_for("noise", *parts)
    noise = torch.randn(tuple(shape), generator=generator)
    return noise + offset * torch.randn((shape[0], 1, 1), generator=generator) if offset else noise


def _each(values: Tensor, steps: Tensor) -> Tensor:
    """(S,) at the steps (B,), over all of a row: (B, 1, 1, 1)."""
    return values[steps].view(-1, 1, 1, 1)
