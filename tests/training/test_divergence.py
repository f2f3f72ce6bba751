"""The rule by which a loss is above its own past: noise is not told, spikes and lasting rises are, each once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tunekit.training.step_numbers import PAST, last_jump, loss_warning, rise


def told(losses: Sequence[float]) -> dict[int, str]:
    """What is told at which step, counted from 1."""
    found = {}
    for index, loss in enumerate(losses):
        why = loss_warning(losses[: min(1, index)], losses[max(0, index - PAST) : index], loss)
        if why is not None:
            found[index + 1] = why
    return found


@pytest.mark.sampled(1)
@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6])
def test_noise_and_a_falling_loss_are_not_told(noise: float) -> None:
    draw = random.Random(0)
    for _ in range(20):
        losses = [2.5 * 0.99**step * draw.lognormvariate(0, noise / 2) for step in range(300)]
        assert not told(losses)


def test_a_spike_is_told_with_what_it_is_compared_with() -> None:
    draw = random.Random(0)
    losses = [2 + draw.gauss(0, 0.1) for _ in range(60)]
    losses[40] = 6.0
    assert list(told(losses)) == [41]
    assert "the loss 6 is far above the mean loss 1.989 of the previous 40 steps" in told(losses)[41]


def test_a_run_that_diverges_at_once_is_told_once() -> None:
    losses = [2.0, 2.0, 7.0, 9.0, 10.0, 11.0, 12.0, 12.0, 12.0, 13.0, 12.5]
    assert told(losses) == {7: "the loss has been above 3 for 5 steps, but was 2 at step 1"}


def test_a_slow_rise_is_told_once() -> None:
    losses = [2 + 0.02 * step for step in range(200)]
    assert len(told(losses)) == 1


def test_a_run_without_warm_up_is_told_from_its_first_step_on() -> None:
    losses = [2.0, 9.0, 12.0, 8.0, 11.0, 10.0, 10.0, 9.5, 10.5]
    assert list(told(losses)) == [6]


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6])
def test_a_run_that_ends_worse_than_it_began_is_told_and_noise_is_not(noise: float) -> None:
    draw = random.Random(1)

    def drawn(mean: float) -> float:
        return mean * draw.lognormvariate(0, noise / 2)

    for steps in (3, 10, 300) if noise < 0.5 else (300,):
        for _ in range(100):
            assert rise([drawn(2.5) * 0.99**step for step in range(steps)]) is None
    for _ in range(20):
        why = rise([drawn(2.5), *(drawn(2.5 * (1 + 8 * noise)) for _ in range(100))])
        assert why is not None
        assert why.startswith("the run ended worse than it began: training loss ")


def test_the_jumps_of_a_run_that_diverged_are_no_noise() -> None:
    jumps = [2.99, 3.4, 9.1, 4.2, 8.8, 5.0, 10.2, 4.1, 9.0, 6.5]
    assert (
        rise(jumps)
        == "the run ended worse than it began: training loss 6.5 over the last tenth of the steps, 2.99 at step 1"
    )
    assert rise([2.99, 4.0, 6.5]) is not None
    assert rise([2.99, 2.5, 5.9]) is None, "three noisy steps"


def test_a_jump_from_near_zero_is_told_whatever_the_loss_was_before_it_fell() -> None:
    falling = [6.1, 2.7, 1.0, 0.4, 0.15, 0.02, *[0.002, 0.001, 0.0004, 0.0009] * 11]
    assert told([*falling, 0.3]) == {51: "the loss 0.3 is 333 times the loss of the steps just before (0.0009)"}
    assert last_jump([*falling, 0.3]) == (
        "the run ended on a spike: the loss 0.3 of the last step is 333 times the loss of the steps just before "
        "(0.0009)"
    )
    for few in ([2.0, 0.5, 0.001, 0.001, 0.3], [2.0, 0.001, 0.3], [0.001, 0.1]):
        assert list(told(few)) == [len(few)]
        assert last_jump(few) is not None


def test_what_jitters_near_zero_is_no_jump() -> None:
    draw = random.Random(0)
    for _ in range(50):
        falling = [3 * 0.7**step * draw.lognormvariate(0, 1.0) for step in range(60)]  # to 1e-9, up to tenfold apart
        assert not told(falling)
        jitter = [3.0, 1.0, 0.3, *(10 ** draw.uniform(-6, -1.1) for _ in range(50))]
        assert not told(jitter), "below the floor of 0.1"
    assert last_jump([2.0, 0.5, 0.4, 0.6]) is last_jump([]) is last_jump([1.0]) is last_jump([1.0, 0.0, 0.0]) is None


def test_a_run_whose_rows_differ_so_much_is_told_once() -> None:
    assert list(told([2.0, 0.5, 0.001, *[0.001, 0.3] * 10])) == [5]


def test_a_loss_that_may_be_negative_is_not_compared() -> None:
    assert rise([-0.2, 3.0, 3.0, 3.0]) is None
    assert rise([]) is rise([2.0]) is None
