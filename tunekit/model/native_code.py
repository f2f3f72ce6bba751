"""Keeps libraries from fetching native code and running it, which some do when the package `kernels` is installed.

Comes in: nothing.  Goes out: a block inside which no such code can be fetched.
Next: codec.py (bitsandbytes asks for it at import, on some CPUs), load.py (transformers asks for it with GGUF files).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Modules of transformers that look for `kernels` when a GGUF file is loaded.
ASKING = ("transformers.integrations.gguf.kernels", "transformers.quantizers.quantizer_gguf")


@contextmanager
def no_fetched_code(*, gguf: bool = False) -> Iterator[None]:
    """Make `kernels` unimportable inside the block and, for GGUF, tell transformers that it is not installed."""
    kernels = sys.modules.get("kernels")
    asking = [module for name in ASKING if (module := _module(name)) is not None] if gguf else []
    answers = [(module, module.is_kernels_available) for module in asking]
    sys.modules["kernels"] = None  # type: ignore[assignment]
    for module in asking:
        module.is_kernels_available = lambda *_versions: False
    try:
        yield
    finally:
        for module, answer in answers:
            module.is_kernels_available = answer
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def _module(name: str) -> Any:
    """The module, where this version of transformers has it and it asks at all."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return module if hasattr(module, "is_kernels_available") else None
