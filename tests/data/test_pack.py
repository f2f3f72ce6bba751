"""Packing keeps every row whole, once, within the capacity, and in first-fit order."""

from __future__ import annotations

import random

import pytest

from tunekit.data.batching.pack import first_fit
from tunekit.errors import DataError


def plain_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for position, length in enumerate(lengths):
        for pack in packs:
            if sum(lengths[index] for index in pack) + length <= capacity:
                pack.append(position)
                break
        else:
            packs.append([position])
    return packs


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_plain_algorithm(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.randint(1, 60)
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(0, 70))]
    packs = first_fit(lengths, capacity)
    assert packs == plain_first_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= capacity for pack in packs)


def test_many_rows_take_no_quadratic_number_of_looks() -> None:
    class Counting(int):
        looks = 0

        def __gt__(self, other: object) -> bool:
            Counting.looks += 1
            return int.__gt__(self, other)  # type: ignore[operator]

    count = 4096
    first_fit([Counting(33)] * count, 64)  # no two fit together: the worst case for a plain search
    assert 0 < Counting.looks < 2 * count * 13


def test_a_row_longer_than_the_capacity_is_refused() -> None:
    with pytest.raises(DataError, match="65 tokens"):
        first_fit([3, 65], 64)
