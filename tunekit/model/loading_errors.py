"""What transformers raises while it reads a model, in one line that a user can act on.

Comes in: the model section.  Goes out: ModelError.  Next: load.py.
"""

from __future__ import annotations

from typing import Any

import torch

from tunekit.errors import ModelError, TunekitError
from tunekit.recipe.model import ModelSection


class ModelErrors:
    """Turns what transformers raises while reading a model into ModelError, first line only."""

    def __init__(self, section: ModelSection) -> None:
        self.section = section

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, TunekitError):
            return
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return
        name = self.section.name_or_path
        text = str(error)
        if "trust_remote_code" in text:
            how = "read that code, and set model.trust_remote_code: true if you trust it"
            raise ModelError(f"{name} runs code of its own", how, key="model.trust_remote_code") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"{name} cannot be loaded: {lines[0]}", key="model.name_or_path") from error
