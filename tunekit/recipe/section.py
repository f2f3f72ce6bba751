"""The base of every section of a recipe: frozen, strict, no unknown keys; and the number types sections share.

Comes in: plain values read from YAML.  Goes out: validated, immutable settings.  Next: the section files, then load.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Frozen settings; an unknown key is an error; a value is never coerced from another kind (no "5" for 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, protected_namespaces=())


def _number(value: Any) -> Any:
    """Accept int or float (never bool, NaN or infinity) and hand on a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)


def _whole(value: Any) -> Any:
    """Accept an int, or a float without a fraction such as 1e3; never a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a whole number")
    if not math.isfinite(value) or value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[Whole, Field(ge=1)]
CountOrZero = Annotated[Whole, Field(ge=0)]
