"""What may be chosen, a way to predict a peak and an ordered cost go in; the fastest Choice that fits comes out.

The cost orders settings; it predicts no seconds. Every setting computes the same sums in another order, so the choice
is one of speed and memory alone.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tunekit.records import Choice

# A product of T rows costs as if it had so many more: weights are read (and unpacked) for each product, and kernels are
# launched. From 2 bytes per weight at 3 TB/s against 450 TFLOP/s, NF4 unpacked, and for a CPU 10 GB/s against 0.2.
OVERHEAD_TOKENS = {"cpu": 32}
ON_ACCELERATOR = 256
TOLERANCE = 0.02  # of the time: the rule is not worth more, and each look costs a second
RECOMPUTED = 1 / 2  # of a step: one more forward of 2 N FLOPs a token beside 4 N, the base being frozen


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen, fastest first in each list. `micro_batches`: (rows, micro-batches of a step)."""

    micro_batches: Sequence[tuple[int | None, int]]
    logits_chunks: Sequence[int]
    gradient_checkpointing: str | bool | int  # as the recipe says: auto leaves the number free
    layers: int
    tiers: Sequence[str] = ("off",)  # values of memory.streaming
    passes: Sequence[int] = ()  # micro-batches of a pass, where that is not free
    written: Choice = field(default_factory=Choice)  # with what the recipe alone decides

    def grid(self, tier: str) -> list[Choice]:
        """Every choice of a tier, with the fewest layers recomputed; what needs the least memory comes last."""
        fewest = self.layer_range()[0] if tier == "off" else 0
        return [
            replace(
                self.written,
                micro_batch_size=rows,
                gradient_accumulation_steps=steps,
                logits_chunk_tokens=chunk,
                checkpointed_layers=fewest,
                streaming=tier,
                pass_micro_batches=size,
            )
            for (rows, steps), chunk in itertools.product(self.micro_batches, self.logits_chunks)
            for size in self.passes or pass_sizes(tier, steps)
        ]

    def deeper(self, start: Choice) -> list[Choice]:
        """The choice with its own and every higher number of recomputed layers; where weights are streamed, every layer
        is recomputed in any case."""
        if start.streaming != "off":
            return [start]
        most = self.layer_range()[1]
        return [replace(start, checkpointed_layers=count) for count in range(start.checkpointed_layers, most + 1)]

    def smallest(self, tier: str) -> Choice:
        """What needs the least memory in a tier, whatever it costs."""
        return self.deeper(self.grid(tier)[-1])[-1]

    def layer_range(self) -> tuple[int, int]:
        """The fewest and the most layers that plan may recompute: of itself never the last, whose recomputation would
        come at once."""
        if self.gradient_checkpointing == "auto":
            return 0, max(self.layers - 1, 0)
        written = self.layers if self.gradient_checkpointing is True else int(self.gradient_checkpointing)
        return (min(written, self.layers),) * 2


@dataclass(frozen=True)
class Workload:
    """What the cost of a choice depends on besides the choice.

    `row_tokens`: padded tokens of one row of a micro-batch; `step_tokens`: tokens of an optimizer step; `head_share`:
    of all parameters.
    """

    device: str
    layers: int
    row_tokens: int
    step_tokens: int
    head_share: float

    def relative_time(self, choice: Choice) -> float:
        """Time of a step over that of the fastest setting there could be: nothing recomputed, all rows at once.

        A streamed step counts as if it only waited for copies of the weights, of which each pass needs the same number.
        """
        overhead = OVERHEAD_TOKENS.get(self.device, ON_ACCELERATOR)
        tokens = (choice.micro_batch_size or 1) * self.row_tokens
        share = choice.checkpointed_layers / max(self.layers, 1) if choice.streaming == "off" else 1.0
        compute = 1.0 + share * RECOMPUTED
        compute += overhead / max(tokens, 1) + self.head_share * overhead / choice.logits_chunk_tokens
        if choice.streaming == "off":
            return compute
        return compute * max(1.0, self.step_tokens / max(choice.pass_micro_batches * tokens, 1))


def pass_sizes(tier: str, accumulation: int) -> list[int]:
    """Micro-batches of a pass, most first: all of a step, and halves of that."""
    if tier == "off":
        return [1]
    return sorted({max(1, accumulation >> shift) for shift in range(accumulation.bit_length())}, reverse=True)


def smaller_micro_batches(rows: int | None, accumulation: int) -> list[tuple[int | None, int]]:
    """(rows, micro-batches of a step) with the same rows in each step, in the same order, the written ones first."""
    if rows is None:  # cut by tokens: fewer tokens would end windows at other rows
        return [(None, accumulation)]
    return [(size, accumulation * rows // size) for size in range(rows, 0, -1) if rows % size == 0]


def fastest(space: SearchSpace, time: Callable[[Choice], float], excess: Callable[[Choice], float]) -> Choice | None:
    """The choice with the least time that fits (`excess`: bytes of its peak beyond the limit), of the first tier in
    which one does; None if none does."""
    found = (_fastest_of_tier(space, tier, time, excess) for tier in space.tiers)
    return next((choice for choice in found if choice is not None), None)


def _fastest_of_tier(
    space: SearchSpace, tier: str, time: Callable[[Choice], float], excess: Callable[[Choice], float]
) -> Choice | None:
    """A peak is dear to predict, so few are asked for. First comes a choice that fits: the fastest of those that
    recompute least, or the smallest of all with as many layers as it needs. Then, for every other grid point, the most
    layers with which it would still be faster (by more than the cost is worth) decide whether it is looked at further.
    """
    grid = space.grid(tier)
    starts, smallest = sorted(grid, key=time), grid[-1]
    if excess(smallest) <= 0:
        best = next(start for start in starts if excess(start) <= 0)
    else:
        deepest = _first_fitting(space.deeper(smallest), excess)
        if deepest is None or len(grid) == 1:
            return deepest
        best = deepest
    unfit: list[Choice] = []
    for start in starts:
        bound = time(best) * (1 - TOLERANCE)
        faster = [choice for choice in space.deeper(start) if time(choice) < bound]
        if not faster or any(_needs_no_less(faster[-1], other) for other in unfit):
            continue
        better = _first_fitting(faster, excess)
        if better is None:
            unfit.append(faster[-1])
        else:
            best = better
    return best


def _first_fitting(choices: Sequence[Choice], excess: Callable[[Choice], float]) -> Choice | None:
    """The first of choices with falling peaks that fits, by guesses along the line between two peaks, and by halves in
    turn, since a peak need not fall evenly."""
    low, high = 0, len(choices) - 1
    if excess(choices[high]) > 0:
        return None
    if excess(choices[low]) <= 0:
        return choices[low]
    for turn in itertools.count():  # low does not fit, high does
        if high - low <= 1:
            break
        above, below = excess(choices[low]), -excess(choices[high])
        share = above / (above + below) if turn % 2 == 0 else 0.5
        guess = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        low, high = (low, guess) if excess(choices[guess]) <= 0 else (guess, high)
    return choices[high]


def _needs_no_less(choice: Choice, other: Choice) -> bool:
    """Whether a choice of the same tier is at least as large as another in every axis."""
    return (
        choice.pass_micro_batches >= other.pass_micro_batches
        and (choice.micro_batch_size or 0) >= (other.micro_batch_size or 0)
        and choice.logits_chunk_tokens >= other.logits_chunk_tokens
        and choice.checkpointed_layers <= other.checkpointed_layers
    )
