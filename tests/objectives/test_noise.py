"""Noise, targets and weights against diffusers' schedulers and the paper's formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

from tunekit.objectives.losses.noise import (
    NoiseSchedule,
    drawn_noise,
    flow_position,
    flow_weights,
    min_snr_weights,
    noisy,
    target,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STEPS = torch.tensor([0, 1, 417, 998, 999])


def draws() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(5, 4, 6, 7), torch.randn(5, 4, 6, 7)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_diffusers_scheduler(prediction: str, zero_snr: bool) -> None:
    theirs = DDPMScheduler(**BETAS, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    ours = NoiseSchedule.of_alphas(prediction, theirs.alphas_cumprod)
    latents, noise = draws()
    assert torch.equal(noisy(ours, latents, noise, STEPS), theirs.add_noise(latents, noise, STEPS))
    expected = {"epsilon": noise, "v_prediction": theirs.get_velocity(latents, noise, STEPS), "sample": latents}
    assert torch.equal(target(ours, latents, noise, STEPS), expected[prediction])


def test_flow_targets_are_those_of_diffusers_script() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    ours = NoiseSchedule.of_sigmas(scheduler.sigmas, scheduler.timesteps)
    latents, noise = draws()
    sigmas = scheduler.sigmas[STEPS].view(-1, 1, 1, 1)
    assert torch.equal(noisy(ours, latents, noise, STEPS), (1.0 - sigmas) * latents + sigmas * noise)
    assert torch.equal(target(ours, latents, noise, STEPS), noise - latents)
    # Euler's step from z_t along the target ends in x
    assert torch.allclose(noisy(ours, latents, noise, STEPS) - sigmas * (noise - latents), latents, atol=1e-5)


def test_min_snr_weighs_the_error_of_x_as_the_paper_does() -> None:
    alphas = DDPMScheduler(**BETAS).alphas_cumprod.double()
    steps, gamma = torch.arange(1000), 5.0
    signal, noise = alphas**0.5, (1 - alphas) ** 0.5
    snr = (signal / noise) ** 2
    weight_of_x = snr.clamp(max=gamma)
    for prediction, error_of_x in (("sample", 1.0), ("epsilon", (noise / signal) ** 2), ("v_prediction", noise**2)):
        ours = min_snr_weights(NoiseSchedule.of_alphas(prediction, alphas), steps, gamma)
        assert torch.allclose(ours.double(), weight_of_x * error_of_x, rtol=1e-5), prediction
    scheduler = DDPMScheduler(**BETAS)
    script = torch.stack([compute_snr(scheduler, steps), torch.full((1000,), gamma)], dim=1).min(dim=1)[0]
    ours = min_snr_weights(NoiseSchedule.of_alphas("epsilon", scheduler.alphas_cumprod), steps, gamma)
    assert torch.allclose(ours, script / compute_snr(scheduler, steps), rtol=1e-4)


def test_min_snr_of_a_step_without_signal_is_finite() -> None:
    alphas = DDPMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod
    for prediction, last in (("epsilon", 1.0), ("v_prediction", 0.0)):
        weights = min_snr_weights(NoiseSchedule.of_alphas(prediction, alphas), torch.tensor([999]), 5.0)
        assert weights.tolist() == pytest.approx([last], abs=1e-6)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_flow_density_and_weights_are_those_of_diffusers(scheme: str) -> None:
    theirs = compute_density_for_timestep_sampling(
        scheme, 64, logit_mean=0.2, logit_std=0.7, mode_scale=1.29, generator=torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    if scheme == "logit_normal":  # they draw it themselves: the same normal numbers, by the same generator
        normal = torch.normal(mean=0.0, std=1.0, size=(64,), generator=generator)
        uniform = torch.zeros(64)
    else:
        uniform, normal = torch.rand((64,), generator=generator), torch.zeros(64)
    pairs = zip(uniform.tolist(), normal.tolist(), strict=True)
    ours = torch.tensor([flow_position(scheme, u, n, 0.2, 0.7, 1.29) for u, n in pairs])
    assert torch.allclose(ours, theirs, atol=1e-6)
    sigmas = torch.linspace(0.01, 1.0, 9)
    assert torch.allclose(flow_weights(scheme, sigmas), compute_loss_weighting_for_sd3(scheme, sigmas))


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    torch.manual_seed(1)
    first = drawn_noise((4, 8, 8), 0.0, 0, 7, 3)
    torch.manual_seed(2)
    assert torch.equal(first, drawn_noise((4, 8, 8), 0.0, 0, 7, 3))
    for other in ((1, 7, 3), (0, 8, 3), (0, 7, 4)):
        assert not torch.equal(first, drawn_noise((4, 8, 8), 0.0, *other))


def test_offset_noise_moves_each_channel_as_a_whole() -> None:
    plain, moved = (drawn_noise((4, 8, 8), offset, 0, 0, 0) for offset in (0.0, 0.1))
    difference = (moved - plain).flatten(1)
    assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-6)
    assert len({round(float(value), 6) for value in difference[:, 0]}) == 4
    many = torch.stack([drawn_noise((4, 8, 8), 0.1, 0, 0, row) for row in range(400)]).mean(dim=(2, 3))
    expected = (1 / 64 + 0.01) ** 0.5  # of the mean of 64 numbers, and of the offset
    assert float(many.std()) == pytest.approx(expected, rel=0.1)
