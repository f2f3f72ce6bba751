"""How many layers to recompute in the backward pass, so that a step fits.

Comes in: the setting, a way to predict a peak, the memory there is.  Goes out: a number of layers.  Next: plan.py.
"""

from __future__ import annotations

from collections.abc import Callable


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
