"""The order of training: every row once an epoch, the same for any rank count and after any interruption."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.support.data_case import Rows, objective_of, settings
from tunekit.contracts import IGNORED, Batch, StepBatches
from tunekit.data.batching.order import Share, epoch_rows, held_out
from tunekit.data.batching.steps import BatchSettings, StoredSteps, collate, evaluation_batches, filled_batch

LENGTHS = [2 + (7 * index) % 30 for index in range(23)]  # 2 .. 31 tokens


def windows_of(lengths: list[int], chosen: BatchSettings, **changes: int) -> StoredSteps:
    return StoredSteps(Rows(lengths), objective_of().rows, chosen, **changes)


def groups_of(batch: Batch) -> list[list[int]]:
    return [[row.number for row in sequence] for sequence in batch.sequences]


def rows_of(step: StepBatches) -> list[int]:
    return [row.number for batch in step.batches for row in batch.rows]


def same(one: Batch, other: Batch) -> bool:
    left, right = {**one.inputs, **one.targets}, {**other.inputs, **other.targets}
    equal = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return groups_of(one) == groups_of(other) and equal


def test_the_last_partial_window_is_stepped() -> None:
    steps = windows_of(LENGTHS, settings())
    assert (steps.count, steps.steps_per_epoch, steps.micro_batches_per_epoch) == (3, 3, 12)
    found = list(steps.after(0))
    assert [len(step.batches) for step in found] == [5, 5, 2]
    assert [len(rows_of(step)) for step in found] == [10, 10, 3]
    assert sorted(row for step in found for row in rows_of(step)) == list(range(23))
    assert [step.epoch for step in found] == [1 / 3, 2 / 3, 1.0]
    assert [len(step) for step in steps.steps_of(0)] == [5, 5, 2], "the forecast looks at the last one too"


def test_without_shuffling_the_order_is_the_file_s() -> None:
    found = [rows_of(step) for step in windows_of(LENGTHS, settings(shuffle=False, epochs=2.0)).after(0)]
    assert [row for rows in found for row in rows] == [*range(23), *range(23)]


def test_epochs_differ_and_seeds_differ_and_both_repeat() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_rows((Share(0, 23),), seed=seed, epoch=epoch, shuffle=True).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2)}) == 9


def test_the_order_does_not_depend_on_the_process() -> None:
    code = (
        "from tunekit.data.batching.order import Share, epoch_rows;"
        "print(epoch_rows((Share(0, 9), Share(9, 20, 1.5)), seed=7, epoch=3, shuffle=True).tolist())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert len(json.loads(found.pop())) == 9 + 11 + 6


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (0.1, 1), (0.5, 2), (1.5, 5), (2.0, 6), (2.34, 8)])
def test_fractional_epochs_round_their_last_part_up(epochs: float, steps: int) -> None:
    assert windows_of(LENGTHS, settings(epochs=epochs)).count == steps


def test_max_steps_goes_through_as_many_epochs_as_it_needs() -> None:
    found = list(windows_of(LENGTHS, settings(epochs=None, max_steps=7)).after(0))
    assert [round(step.epoch, 6) for step in found] == [round(step / 3, 6) for step in range(1, 8)]
    assert sorted(row for step in found[3:6] for row in rows_of(step)) == list(range(23))


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"micro_batch_size": None, "micro_batch_tokens": 70}])
def test_resuming_at_any_step_gives_the_same_windows(changes: dict[str, object]) -> None:
    def make() -> StoredSteps:
        return windows_of(LENGTHS, settings(epochs=3.0, gradient_accumulation_steps=2, **changes))

    whole = list(make().after(0))
    assert len(whole) == make().count
    for first in range(len(whole)):
        rest = list(make().after(first))
        assert [step.step for step in rest] == list(range(first, len(whole)))
        for step, expected in zip(rest, whole[first:], strict=True):
            assert step.epoch == expected.epoch
            assert all(same(*pair) for pair in zip(step.batches, expected.batches, strict=True))
    assert list(make().after(len(whole))) == []


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_each_window(world: int) -> None:
    one = list(windows_of(LENGTHS, settings()).after(0))
    ranks = [list(windows_of(LENGTHS, settings(), rank=rank, world=world).after(0)) for rank in range(world)]
    for number, step in enumerate(one):
        parts = [steps[number] for steps in ranks]
        together = {index: batch for part in parts for index, batch in zip(part.indices, part.batches, strict=True)}
        assert sorted(together) == list(step.indices)
        assert all(index % world == rank for rank, part in enumerate(parts) for index in part.indices)
        assert all(same(together[index], batch) for index, batch in zip(step.indices, step.batches, strict=True))
    assert len(ranks[-1][2].batches) == (1 if world == 2 else 0)  # the last step may leave a rank without work


@pytest.mark.parametrize("seed", range(10))
def test_packs_hold_every_token_once_within_max_length(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 64) for _ in range(draw.randint(1, 90))]
    steps = windows_of(lengths, settings(packing=True, seed=seed, epochs=2.0))
    found = list(steps.after(0))
    assert len(found) == steps.count
    batches = [batch for step in found for batch in step.batches]
    assert all(length <= 64 for batch in batches for length in batch.lengths)
    tokens = Counter(
        token
        for batch in batches
        for ids, length in zip(batch.inputs["input_ids"], batch.lengths, strict=True)
        for token in ids[:length].tolist()
    )
    assert tokens == Counter({1000 * row + at: 2 for row, length in enumerate(lengths) for at in range(length)})
    supervised = sum(int((batch.targets["labels"] != IGNORED).sum()) for batch in batches)
    assert supervised == 2 * sum(length - 1 for length in lengths)


def test_steps_are_counted_from_packs() -> None:
    steps = windows_of([8] * 64, settings(packing=True, micro_batch_size=1, gradient_accumulation_steps=2))
    assert steps.micro_batches_per_epoch == 8
    assert steps.count == 4


def test_micro_batches_by_padded_tokens() -> None:
    steps = windows_of(LENGTHS, settings(micro_batch_size=None, micro_batch_tokens=40))
    batches = [batch for step in steps.after(0) for batch in step.batches]
    assert all(batch.inputs["input_ids"].numel() <= 40 for batch in batches)
    assert max(len(batch.lengths) for batch in batches) > 1
    assert sorted(row.number for batch in batches for row in batch.rows) == list(range(23))
    alone = windows_of([50, 3], settings(micro_batch_size=None, micro_batch_tokens=40, shuffle=False))
    assert [batch.lengths for step in alone.after(0) for batch in step.batches] == [[50], [3]]


def test_collation_restarts_positions_and_hides_first_labels() -> None:
    batch = collate(Rows([3, 2, 4]), [(0, 1), (2,), (1,)], objective_of(pad_id=9).rows)
    assert batch.inputs["input_ids"].tolist() == [
        [0, 1, 2, 1000, 1001],
        [2000, 2001, 2002, 2003, 9],
        [1000, 1001, 9, 9, 9],
    ]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]
    assert batch.targets["labels"].tolist() == [
        [-100, 1, 2, -100, 1001],
        [-100, 2001, 2002, 2003, -100],
        [-100, 1001, -100, -100, -100],
    ]
    assert (batch.lengths, batch.tokens, batch.width, batch.padded, batch.supervised) == ([5, 4, 2], 11, 5, 15, 7)
    assert [[row.origin for row in rows] for rows in batch.sequences] == [["rows:0", "rows:1"], ["rows:2"], ["rows:1"]]


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"micro_batch_size": None, "micro_batch_tokens": 64}])
def test_end_to_end_the_same_rows_are_trained_together_without_padding(changes: dict[str, object]) -> None:
    padded = list(windows_of(LENGTHS, settings(**changes)).after(0))
    laid = list(windows_of(LENGTHS, settings(**changes, end_to_end=True)).after(0))
    assert [rows_of(step) for step in laid] == [rows_of(step) for step in padded]
    for batch in (batch for step in laid for batch in step.batches):
        lengths = [LENGTHS[row.number] for row in batch.rows]
        assert batch.inputs["input_ids"].shape == (1, sum(lengths))
        assert batch.inputs["position_ids"][0].tolist() == [
            position for length in lengths for position in range(length)
        ]
        starts = np.cumsum([0, *lengths[:-1]])
        assert (batch.targets["labels"][0, starts] == IGNORED).all()


def test_copies_of_a_row_in_a_step_are_counted_over_all_ranks() -> None:
    """The random numbers of a row follow from its number and its occurrence in the step, not from the rank."""

    def of_steps(**ranks: int) -> list[dict[int, list[tuple[int, int]]]]:
        shares = (Share(0, 4, weight=3.0),)
        steps = StoredSteps(Rows(LENGTHS[:4]), objective_of().rows, settings(), draws=shares, **ranks)
        return [
            {
                at: [(row.number, row.occurrence) for row in batch.rows]
                for at, batch in zip(step.indices, step.batches, strict=True)
            }
            for step in steps.after(0)
        ]

    alone = of_steps()
    assert [len({place for rows in step.values() for place in rows}) for step in alone] == [10, 2]
    ranks = zip(*(of_steps(rank=rank, world=2) for rank in range(2)), strict=True)
    assert [{**one, **other} for one, other in ranks] == alone


def test_weights_take_whole_copies_and_a_fresh_draw_of_the_rest() -> None:
    shares = (Share(0, 10, 2.3), Share(10, 30, 0.5), Share(30, 33, 1.0))
    epochs = [Counter(epoch_rows(shares, seed=1, epoch=epoch, shuffle=True).tolist()) for epoch in (0, 1)]
    for counts in epochs:
        assert sorted(counts[row] for row in range(10)) == [2] * 7 + [3] * 3
        assert sum(counts[row] for row in range(10, 30)) == 10
        assert max(counts[row] for row in range(10, 30)) == 1
        assert [counts[row] for row in range(30, 33)] == [1, 1, 1]
    assert epochs[0] != epochs[1]


def test_evaluation_sees_every_row_once() -> None:
    for size in (1, 4):
        batches = list(evaluation_batches(Rows(LENGTHS), objective_of().rows, batch_size=size))
        assert sorted(row.number for batch in batches for row in batch.rows) == list(range(23))
        assert sum(int((batch.targets["labels"] != IGNORED).sum()) for batch in batches) == sum(LENGTHS) - 23


@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"micro_batch_size": None, "micro_batch_tokens": 128}])
def test_no_epoch_has_a_larger_batch_than_one_of_full_sequences(changes: dict[str, object], end_to_end: bool) -> None:
    chosen = settings(epochs=20.0, **changes, end_to_end=end_to_end and "packing" not in changes)
    full = filled_batch(Rows(LENGTHS), objective_of().rows, chosen)
    assert full.lengths == [64, 64]
    found = [batch for step in windows_of(LENGTHS, chosen).after(0) for batch in step.batches]
    assert max(batch.inputs["input_ids"].numel() for batch in found) <= full.inputs["input_ids"].numel() == full.padded


def test_held_out_rows_are_the_nearest_number_and_equal_rows_stay_together() -> None:
    digests = np.arange(1000, dtype=np.uint64)
    assert held_out(digests, 0.05, 0).sum() == 50
    assert (held_out(digests, 0.05, 0) != held_out(digests, 0.05, 1)).any()
    assert held_out(digests[:3], 0.05, 0).sum() == 1
    twice = np.concatenate([digests, digests[::-1]])
    chosen = held_out(twice, 0.101, 3)
    assert chosen.tolist()[:1000] == chosen.tolist()[:999:-1]
