"""The settings that the recipe decides, and the search for the fastest settings that fit into memory.

Times are only compared with each other; their unit is not seconds. All settings compute the same sums, in different
orders. So they affect only speed and memory.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from tunekit.objectives.losses.logprobs import LEAST_CHUNK_TOKENS
from tunekit.recipe.recipe import Recipe
from tunekit.records import ExecutionSettings

# Fixed cost of each product, in rows: weights are read (and unpacked), and kernels are launched. Computed from 2 bytes
# per weight at 3 TB/s and 450 TFLOP/s, with NF4 unpacked; for a CPU, from 10 GB/s and 0.2 TFLOP/s.
OVERHEAD_TOKENS = {"cpu": 32}
ON_ACCELERATOR = 256
TOLERANCE = 0.02  # smaller gains of time are ignored: the rule is rough, and each predicted peak costs a second
Estimate = Callable[[ExecutionSettings], float]
RECOMPUTED = 1 / 2  # cost of recomputing, as a share of a step: 2 N more FLOPs per token, besides 4 N (frozen base)


def written_execution(recipe: Recipe, kernels: str, ranks: int) -> ExecutionSettings:
    """The recipe's settings. Fields that plan chooses have default values."""
    training, memory = recipe.training, recipe.memory
    return ExecutionSettings(
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        logits_chunk_tokens=LEAST_CHUNK_TOKENS,
        streamed_head=memory.streamed_head,
        activation_offload=memory.activation_offload,
        mlp_tile_tokens=memory.mlp_tile_tokens,
        kernels=kernels,
        # a resumed run uses the number of threads in its checkpoint, which is already in effect
        threads=training.threads if isinstance(training.threads, int) else torch.get_num_threads(),
        shares=ranks,
    )


@dataclass(frozen=True)
class SearchSpace:
    """The settings that plan can choose from; in each list, the fastest setting comes first.

    `micro_batches`: pairs of (rows per micro-batch, micro-batches per step).
    """

    micro_batches: Sequence[tuple[int | None, int]]
    logits_chunks: Sequence[int]
    gradient_checkpointing: str | bool | int  # the recipe's value; with auto, plan chooses the number of layers
    layers: int
    tiers: Sequence[str] = ("off",)  # values of memory.streaming
    passes: Sequence[int] = ()  # micro-batches per pass; (): plan chooses
    written: ExecutionSettings = field(default_factory=ExecutionSettings)  # the settings that only the recipe decides

    def grid(self, tier: str) -> list[ExecutionSettings]:
        """All choices of a tier (device, host or disk) that recompute as few layers as allowed. The last choice needs
        the least memory."""
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

    def deeper(self, start: ExecutionSettings) -> list[ExecutionSettings]:
        """Copies of a choice that recompute more and more layers, starting with the choice's own number.

        If weights are streamed, all layers are recomputed anyway. Then only the choice itself is returned.
        """
        if start.streaming != "off":
            return [start]
        most = self.layer_range()[1]
        return [replace(start, checkpointed_layers=count) for count in range(start.checkpointed_layers, most + 1)]

    def smallest(self, tier: str) -> ExecutionSettings:
        """The choice of a tier (device, host or disk) that needs the least memory."""
        return self.deeper(self.grid(tier)[-1])[-1]

    def layer_range(self) -> tuple[int, int]:
        """The minimum and maximum number of layers that plan can recompute.

        With auto, the last layer is never recomputed: its backward pass follows at once, so no memory is saved.
        """
        if self.gradient_checkpointing == "auto":
            return 0, max(self.layers - 1, 0)
        written = self.layers if self.gradient_checkpointing is True else int(self.gradient_checkpointing)
        return (min(written, self.layers),) * 2


def relative_time(
    execution: ExecutionSettings, *, device: str, layers: int, row_tokens: int, step_tokens: int, head_share: float
) -> float:
    """Time of a step, relative to an ideal step that recomputes nothing and computes all rows at once.

    A step with streamed weights is assumed to wait only for copies of the weights. So its time is proportional to the
    number of passes. `row_tokens`: padded tokens of one row of a micro-batch. `step_tokens`: tokens of an optimizer
    step. `head_share`: the output head's share of all parameters.
    """
    overhead = OVERHEAD_TOKENS.get(device, ON_ACCELERATOR)
    tokens = (execution.micro_batch_size or 1) * row_tokens
    share = execution.checkpointed_layers / max(layers, 1) if execution.streaming == "off" else 1.0
    compute = 1.0 + share * RECOMPUTED
    compute += overhead / max(tokens, 1) + head_share * overhead / execution.logits_chunk_tokens
    if execution.streaming == "off":
        return compute
    return compute * max(1.0, step_tokens / max(execution.pass_micro_batches * tokens, 1))


def pass_sizes(tier: str, accumulation: int) -> list[int]:
    """The possible numbers of micro-batches per pass: all micro-batches of a step, half of them, a quarter, and so on.

    `accumulation`: the number of micro-batches per step.
    """
    if tier == "off":
        return [1]
    return sorted({max(1, accumulation >> shift) for shift in range(accumulation.bit_length())}, reverse=True)


def smaller_micro_batches(rows: int | None, accumulation: int) -> list[tuple[int | None, int]]:
    """Pairs of (rows per micro-batch, micro-batches per step) that keep the rows of each step. The recipe's pair comes
    first."""
    if rows is None:  # micro-batches are cut by tokens, and fewer tokens would change the rows of each step
        return [(None, accumulation)]
    return [(size, accumulation * rows // size) for size in range(rows, 0, -1) if rows % size == 0]


def fastest(space: SearchSpace, time: Estimate, excess: Estimate) -> ExecutionSettings | None:
    """The fastest choice that fits into memory, from the first tier that has one; None if no choice fits. A tier is
    where weights are stored: device, host or disk.

    `time`: returns the relative time of a choice. `excess`: returns by how many bytes a choice's peak exceeds the
    limit.
    """
    found = (_fastest_of_tier(space, tier, time, excess) for tier in space.tiers)
    return next((execution for execution in found if execution is not None), None)


def _fastest_of_tier(space: SearchSpace, tier: str, time: Estimate, excess: Estimate) -> ExecutionSettings | None:
    """The fastest choice of a tier that fits into memory. Only a few peaks are predicted, because a prediction is slow.

    The search starts with a choice that fits: the fastest one that recomputes as few layers as allowed. If none fits,
    it starts with the smallest setting, which recomputes more layers.
    Then each other setting is tried. It recomputes as many layers as possible while it is still faster than the best
    choice so far. If it fits, fewer recomputed layers are tried too.
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
    unfit: list[ExecutionSettings] = []
    for start in starts:
        bound = time(best) * (1 - TOLERANCE)
        faster = [execution for execution in space.deeper(start) if time(execution) < bound]
        if not faster or any(_needs_no_less(faster[-1], other) for other in unfit):
            continue
        better = _first_fitting(faster, excess)
        if better is None:
            unfit.append(faster[-1])
        else:
            best = better
    return best


def _first_fitting(executions: Sequence[ExecutionSettings], excess: Estimate) -> ExecutionSettings | None:
    """The first choice that fits into memory; None if no choice fits. Later choices in the list must have lower peaks.

    The search alternates between linear interpolation of the peaks and bisection, because peaks can fall unevenly.
    """
    low, high = 0, len(executions) - 1
    if excess(executions[high]) > 0:
        return None
    if excess(executions[low]) <= 0:
        return executions[low]
    for turn in itertools.count():  # choice `low` does not fit, choice `high` fits
        if high - low <= 1:
            break
        above, below = excess(executions[low]), -excess(executions[high])
        share = above / (above + below) if turn % 2 == 0 else 0.5
        guess = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        low, high = (low, guess) if excess(executions[guess]) <= 0 else (guess, high)
    return executions[high]


def _needs_no_less(execution: ExecutionSettings, other: ExecutionSettings) -> bool:
    """Whether a choice certainly needs at least as much memory as `other`, a choice of the same tier. This is true if
    none of its settings saves more memory."""
    return (
        execution.pass_micro_batches >= other.pass_micro_batches
        and (execution.micro_batch_size or 0) >= (other.micro_batch_size or 0)
        and execution.logits_chunk_tokens >= other.logits_chunk_tokens
        and execution.checkpointed_layers <= other.checkpointed_layers
    )
