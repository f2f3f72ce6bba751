"""The last comparison of every table of classifiers: each side reads what the other trained, and the merged model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tunekit.merge import merge_verb


def close(ours: Tensor, theirs: Tensor) -> None:
    """Logits are equal to 1e-5 of the largest one, or of 1."""
    scale = max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def check_each_reads_the_other(
    theirs: Any,
    run: Path,
    base: Path,
    folder: Path,
    classifier: Callable[[Path], Any],
    ours: Callable[[Path], Tensor],
    logits: Callable[[Any], Tensor],
) -> Path:
    """PEFT's adapter is read by tunekit, the run's by PEFT, and the merged model by transformers; returns its folder.

    `classifier`: a folder's model as an Auto class reads it; `ours`: logits of an adapter on the base; `logits`: of
    such a model.
    """
    theirs.eval().save_pretrained(str(folder / "theirs"))
    close(ours(folder / "theirs"), logits(theirs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = peft.PeftModel.from_pretrained(classifier(base), str(run / "adapter")).eval()
    assert not [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    expected = ours(run / "adapter")
    close(logits(read), expected)
    merge_verb(str(run / "adapter"), str(folder / "merged"), str(base), None, [])
    close(logits(classifier(folder / "merged")), expected)
    return folder / "merged"
