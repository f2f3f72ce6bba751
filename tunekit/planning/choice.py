"""What may be chosen, a way to predict a peak and an ordered cost go in; the fastest Choice that fits comes out.

The cost orders settings; it predicts no seconds. Every setting computes the same sums in another order, so the choice
is one of speed and memory alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tunekit.records import Choice

# A product of T rows costs as if it had so many more: weights are read (and unpacked) for each product, and kernels are
# launched. From 2 bytes per weight at 3 TB/s against 450 TFLOP/s, NF4 unpacked, and for a CPU 10 GB/s against 0.2.
OVERHEAD_TOKENS = {"cpu": 32, "cuda": 256}
TOLERANCE = 0.02  # of the time: the rule is not worth more, and each look costs a second
RECOMPUTED = 1 / 2  # of a step: one more forward of 2 N FLOPs a token beside 4 N, the base being frozen


@dataclass(frozen=True)
class Freedom:
    """What may be chosen, fastest first in each list. `micro_batches`: (rows, micro-batches of a step)."""

    micro_batches: Sequence[tuple[int | None, int]]
    logits_chunks: Sequence[int]
    gradient_checkpointing: str | bool | int  # as the recipe says: auto leaves the number free
    layers: int
    streaming: Sequence[str] = ("off",)
    passes: Sequence[int] = ()  # micro-batches of a pass, where that is not free
    written: Choice = field(default_factory=Choice)  # with what the recipe alone decides

    def grid(self) -> list[Choice]:
        """Every choice, with no layer recomputed."""
        axes = itertools.product(self.streaming, self.micro_batches, self.logits_chunks)
        return [
            self.choice(rows, steps, chunk, 0, tier, size)
            for tier, (rows, steps), chunk in axes
            for size in self.passes or pass_sizes(tier, steps)
        ]

    def choice(self, rows: int | None, steps: int, chunk: int, layers: int, tier: str, passed: int) -> Choice:
        """What is written, with these values of what is free."""
        return replace(
            self.written,
            micro_batch_size=rows,
            gradient_accumulation_steps=steps,
            logits_chunk_tokens=chunk,
            checkpointed_layers=layers,
            streaming=tier,
            pass_micro_batches=passed,
        )


@dataclass(frozen=True)
class Workload:
    """What the cost of a choice depends on besides the choice.

    `row_tokens`: padded tokens of one row of a micro-batch; `step_tokens`: tokens of an optimizer step; `head_share`:
    of all parameters; `break_even_tokens`: by tier, the tokens of a step that hide the weights' transfer.
    """

    device: str
    layers: int
    row_tokens: int
    step_tokens: int
    head_share: float
    break_even_tokens: Mapping[str, float] = field(default_factory=dict)

    def relative_time(self, choice: Choice) -> float:
        """Time of a step over that of the fastest setting there could be: nothing recomputed, all rows at once."""
        overhead = OVERHEAD_TOKENS[self.device]
        tokens = (choice.micro_batch_size or 1) * self.row_tokens
        streamed = choice.streaming != "off"  # then every layer is recomputed while its weights are there
        share = 1.0 if streamed else choice.checkpointed_layers / max(self.layers, 1)
        compute = 1.0 + share * RECOMPUTED
        compute += overhead / max(tokens, 1) + self.head_share * overhead / choice.logits_chunk_tokens
        passed = max(min(choice.pass_micro_batches * tokens, self.step_tokens), 1)  # tokens between two copies
        waited = self.break_even_tokens.get(choice.streaming, 0.0) / passed if streamed else 0.0
        return compute * max(1.0, waited)


def pass_sizes(tier: str, accumulation: int) -> list[int]:
    """Micro-batches of a pass, most first: all of a step, and halves of that."""
    if tier == "off":
        return [1]
    return sorted({max(1, accumulation >> shift) for shift in range(accumulation.bit_length())}, reverse=True)


def break_even_tokens(bytes_per_parameter: float, flops: float, bytes_per_second: float) -> float:
    """Tokens of an optimizer step that hide two transfers of the weights: T* = b F / (3 BW), whatever the model's size.

    6 N T / F seconds of computation against 2 b N / BW of transfer.
    """
    return bytes_per_parameter * flops / (3 * bytes_per_second)


def smaller_micro_batches(rows: int | None, accumulation: int) -> list[tuple[int | None, int]]:
    """(rows, micro-batches of a step) with the same rows in each step, in the same order, the written ones first."""
    if rows is None:  # cut by tokens: fewer tokens would end windows at other rows
        return [(None, accumulation)]
    return [(size, accumulation * rows // size) for size in range(rows, 0, -1) if rows % size == 0]


def fastest(
    freedom: Freedom, time: Callable[[Choice], float], peak_bytes: Callable[[Choice], int], limit: int
) -> Choice | None:
    """The choice with the least time whose peak is within the limit; None if there is none.

    A peak is dear to predict, so few are asked for. First comes a choice that fits: the fastest of those that recompute
    least, or the smallest of all with as many layers as it needs. Then, for every other grid point, the most layers
    with which it would still be faster (by more than the cost is worth) decide whether it is looked at any further.
    """
    fewest, most = layer_range(freedom.gradient_checkpointing, freedom.layers)
    starts = sorted((_with_layers(choice, fewest) for choice in freedom.grid()), key=time)
    smallest = _smallest(freedom, fewest)
    if any(peak_bytes(choice) <= limit for choice in smallest):
        best = next(start for start in starts if peak_bytes(start) <= limit)
    else:
        fitting = [_first_fitting(_deeper(choice, most), peak_bytes, limit) for choice in smallest]
        found = [choice for choice in fitting if choice is not None]
        if not found:
            return None
        best = min(found, key=time)
    unfit: list[Choice] = []
    for start in starts:
        bound = time(best) * (1 - TOLERANCE)
        faster = [choice for choice in _deeper(start, most) if time(choice) < bound]
        if not faster or any(_needs_no_less(faster[-1], other) for other in unfit):
            continue
        better = _first_fitting(faster, peak_bytes, limit)
        if better is None:
            unfit.append(faster[-1])
        else:
            best = better
    return best


def smallest_choice(freedom: Freedom, peak_bytes: Callable[[Choice], int]) -> Choice:
    """What needs the least memory, whatever it costs."""
    _, most = layer_range(freedom.gradient_checkpointing, freedom.layers)
    found = _smallest(freedom, most)
    return found[0] if len(found) == 1 else min(found, key=peak_bytes)


def _smallest(freedom: Freedom, layers: int) -> list[Choice]:
    """Of each tier, with so many layers recomputed."""
    rows, steps = freedom.micro_batches[-1]
    return [
        freedom.choice(rows, steps, min(freedom.logits_chunks), 0 if tier != "off" else layers, tier, min(sizes))
        for tier in freedom.streaming
        for sizes in [freedom.passes or pass_sizes(tier, steps)]
    ]


def _with_layers(choice: Choice, layers: int) -> Choice:
    return choice if choice.streaming != "off" else replace(choice, checkpointed_layers=layers)


def _deeper(start: Choice, most: int) -> list[Choice]:
    """The choice with its own and every higher number of recomputed layers; where weights are streamed, every layer
    is computed again in any case."""
    if start.streaming != "off":
        return [start]
    return [replace(start, checkpointed_layers=layers) for layers in range(start.checkpointed_layers, most + 1)]


def layer_range(setting: str | bool | int, layers: int) -> tuple[int, int]:
    """The fewest and the most layers that memory.gradient_checkpointing lets plan recompute: of itself never the last,
    whose recomputation would come at once."""
    if setting == "auto":
        return 0, max(layers - 1, 0)
    fixed = layers if setting is True else min(int(setting), layers)
    return fixed, fixed


def _first_fitting(choices: Sequence[Choice], peak_bytes: Callable[[Choice], int], limit: int) -> Choice | None:
    """The first of choices with falling peaks that is within the limit, by guesses along the line between two peaks,
    and by halves in turn, since a peak need not fall evenly."""
    low, high = 0, len(choices) - 1
    if high < 0 or peak_bytes(choices[high]) > limit:
        return None
    if peak_bytes(choices[low]) <= limit:
        return choices[low]
    for turn in itertools.count():  # low does not fit, high does
        if high - low <= 1:
            break
        above, below = peak_bytes(choices[low]) - limit, limit - peak_bytes(choices[high])
        share = above / (above + below) if turn % 2 == 0 else 0.5
        guess = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        low, high = (low, guess) if peak_bytes(choices[guess]) <= limit else (guess, high)
    return choices[high]


def _needs_no_less(choice: Choice, other: Choice) -> bool:
    """Whether a choice is at least as large as another in every axis."""
    return (
        choice.streaming == other.streaming
        and choice.pass_micro_batches >= other.pass_micro_batches
        and (choice.micro_batch_size or 0) >= (other.micro_batch_size or 0)
        and choice.logits_chunk_tokens >= other.logits_chunk_tokens
        and choice.checkpointed_layers <= other.checkpointed_layers
    )


def checkpointed_layers(
    setting: str | bool | int, layers: int, peak_bytes: Callable[[int], int], available: int | None
) -> tuple[int, str]:
    """The number of layers, from the first on, and why.

    `auto`: none if the step fits, else the fewest that fit, but never the last layer: its recomputation would come at
    once, and keep no less. More layers never need more memory.
    """
    if setting is True:
        return layers, "every layer, as the recipe says"
    if setting is False:
        return 0, "none, as the recipe says"
    if isinstance(setting, int):
        return min(setting, layers), f"{min(setting, layers)} layers, as the recipe says"
    if available is None:
        return 0, "none: the system does not tell how much memory is free"
    if peak_bytes(0) <= available:
        return 0, "none: the step fits without"
    most = layers - 1
    if peak_bytes(most) > available:
        return most, "every layer but the last: the step needs more memory than is free"
    low, high = 0, most  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if peak_bytes(middle) <= available else (middle, high)
    return high, "the fewest with which the step fits"
