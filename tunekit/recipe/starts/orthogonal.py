"""`start: orthogonal`: neither A nor B is 0, but B A is: their rows span orthogonal halves of the rank."""

from __future__ import annotations

NEEDS_EVEN_RANK = True
