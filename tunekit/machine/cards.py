"""Graphics cards that `tunekit plan --card` can plan for, although they are not in this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunekit.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card with CUDA. `gib`: memory that torch reports, in GiB, which is less than the memory in the name;
    `capability`: NVIDIA's number of its instruction set; `processors`: multiprocessors; `bandwidth`: of its memory,
    in GB/s; `tflops`: dense 16-bit products that are summed in float32, in TFLOP/s."""

    gib: float
    capability: tuple[int, int]
    processors: int
    bandwidth: int
    tflops: float

    @property
    def total_bytes(self) -> int:
        """The memory that torch reports."""
        return round(self.gib * GIB)

    @property
    def bfloat16(self) -> bool:
        """Whether the card computes in bfloat16 natively."""
        return self.capability >= (8, 0)


# Multiprocessors, bandwidth and TFLOP/s: NVIDIA's data sheets and architecture white papers of each card, without
# sparsity. Memory: the total capacity in torch's messages about a lack of memory, rounded down. Capability: NVIDIA's
# list of CUDA GPUs.
CARDS = {
    "t4-16": Card(14.5, (7, 5), 40, 320, 65),
    "v100-32": Card(31.7, (7, 0), 80, 900, 125),
    "rtx3060-12": Card(11.7, (8, 6), 28, 360, 25.5),
    "rtx3090-24": Card(23.6, (8, 6), 82, 936, 71),
    "rtx4090-24": Card(23.5, (8, 9), 128, 1008, 165.2),
    "rtx5090-32": Card(31.3, (12, 0), 170, 1792, 209.5),
    "a10-24": Card(22.0, (8, 6), 72, 600, 125),
    "l4-24": Card(22.0, (8, 9), 58, 300, 121),
    "l40s-48": Card(44.3, (8, 9), 142, 864, 362),
    "a100-40": Card(39.3, (8, 0), 108, 1555, 312),
    "a100-80": Card(79.1, (8, 0), 108, 2039, 312),
    "h100-80": Card(79.1, (9, 0), 132, 3350, 989.4),
    "h200-141": Card(139.7, (9, 0), 132, 4800, 989.4),
    "b200-180": Card(178.3, (10, 0), 148, 8000, 2250),
}
_planned: list[Card] = []  # the card of --card, while a plan for it is made


def card_named(name: str) -> Card:
    """The card with this name. Raises: RecipeError that lists the names."""
    if name not in CARDS:
        raise RecipeError(f"--card is {name!r}, which is not in the table of cards", f"choose {', '.join(CARDS)}")
    return CARDS[name]


def planned_card() -> Card | None:
    """The card that a plan is made for; None if the plan is for a device of this machine."""
    return _planned[-1] if _planned else None


@contextmanager
def planning_for(card: Card | None) -> Iterator[None]:
    """A context manager: inside the block, CUDA devices have the properties of this card."""
    if card is None:
        yield
        return
    _planned.append(card)
    try:
        yield
    finally:
        _planned.remove(card)
