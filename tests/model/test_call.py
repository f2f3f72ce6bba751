"""The current call, and seeds."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from tunekit.model.call import Call, calling, current_call, seed_for, seed_layer


def test_calls_nest_and_come_back_also_after_an_error() -> None:
    outer = Call(step=3, seed=7)
    assert current_call() == Call()
    with calling(outer):
        with pytest.raises(ValueError), calling(replace(outer, bypassed=True)) as inner:
            _fail_inside(inner)
        assert current_call() is outer
        seen: list[Call] = []
        thread = threading.Thread(target=lambda: seen.append(current_call()))
        thread.start()
        thread.join()
        assert seen == [Call()]  # another thread has a call of its own
    assert current_call() == Call()


def _fail_inside(expected: Call) -> None:
    assert current_call() is expected
    assert expected.bypassed
    raise ValueError


def test_seeds_are_stable_and_tell_parts_apart() -> None:
    assert seed_for("adapter", 0, "model.layers.0") == 5672934676623359303
    parts: list[tuple[int | str, ...]] = [(), (0,), ("0",), (1, 2), (12,), ("1", "2"), ("12",), (2, 1), ("a", "")]
    seeds = [seed_for(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_each_seed_step_micro_batch_and_layer_draws_its_own() -> None:
    def drawn(number: int, **parts: int) -> tuple[float, ...]:
        seed_layer(Call(**parts), number)
        return tuple(torch.rand(4).tolist())

    draws = [drawn(0), drawn(1), drawn(0, seed=1), drawn(0, step=1), drawn(0, micro_batch=1)]
    assert drawn(0) == draws[0]
    assert len(set(draws)) == len(draws)
