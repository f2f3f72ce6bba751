"""What is replaced in other libraries while a base is read is theirs again afterwards, also after an error."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import gguf
import pytest
import tqdm

from tunekit.model.storage.gguf import parsed_once
from tunekit.model.transformers_guard import KERNEL_USERS, _module, no_fetched_code, quiet


def state() -> dict[str, Any]:
    """Everything that these blocks replace."""
    return {
        "reader": gguf.GGUFReader,
        "names": gguf.get_tensor_name_map,
        "kernels": sys.modules.get("kernels", "absent"),
        "answers": [module.is_kernels_available for module in filter(None, map(_module, KERNEL_USERS))],
        "bars": vars(tqdm.tqdm)["__init__"],
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("block", [lambda: parsed_once("a.gguf"), lambda: no_fetched_code(gguf=True), quiet])
@pytest.mark.parametrize("installed", [False, True])
def test_everything_is_as_it_was(
    block: Callable[[], AbstractContextManager[None]], fails: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kernels", sys)
    if not installed:
        del sys.modules["kernels"]
    before = state()
    with contextlib.suppress(ZeroDivisionError), block():
        inside = state()
        _ = 1 / (not fails)
    assert inside != before
    assert state() == before


def test_blocks_of_two_threads_may_overlap() -> None:
    logger, before = logging.getLogger("transformers"), state()
    level = logger.level
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.CRITICAL
    second.__exit__(None, None, None)
    assert (logger.level, state()) == (level, before)
