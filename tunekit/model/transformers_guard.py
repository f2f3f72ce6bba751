"""The one place that silences transformers, huggingface_hub and bitsandbytes, and puts everything back afterwards.

Comes in: nothing.  Goes out: `quiet()`, a block inside which those libraries print neither warnings nor progress bars.
Next: load.py, tokenizer.py and sample.py; what matters to a user is said by tunekit itself.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOISY = ("transformers", "huggingface_hub", "bitsandbytes", "accelerate", "torch", "gguf")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence inside the block. Errors are raised as ever: only what would be printed is gone."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    try:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), _no_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off every tqdm bar, whoever makes it: the switches of the libraries miss some of their own."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging.tqdm_lib.tqdm
    base: Any = next((cls for cls in bars.__mro__ if cls.__module__ == "tqdm.std"), bars)
    original = base.__init__

    def disabled(self: Any, *positional: Any, **named: Any) -> None:
        original(self, *positional, **{**named, "disable": True})

    base.__init__ = disabled
    try:
        yield
    finally:
        base.__init__ = original
