"""`start: gaussian`: A from a normal distribution of deviation 1 / r, B = 0."""

from __future__ import annotations

NEEDS_EVEN_RANK = False
