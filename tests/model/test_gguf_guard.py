"""What is replaced in other libraries while a base is read is theirs again afterwards, also after an error."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import tqdm
from transformers.utils import is_kernels_available

from tunekit.model.storage.gguf import parsed_once
from tunekit.model.transformers_guard import FETCHERS, KERNEL_USERS, _imported, _module, no_fetched_code, quiet


def state() -> dict[str, Any]:
    """Everything that these blocks replace."""
    return {
        "reader": gguf.GGUFReader,
        "names": gguf.get_tensor_name_map,
        "fetchers": {name: dict(vars(module)) for name in FETCHERS if (module := _imported(name)) is not None},
        "switch": os.environ.get("USE_HUB_KERNELS"),
        "answers": [module.is_kernels_available for module in filter(None, map(_module, KERNEL_USERS))],
        "bars": vars(tqdm.tqdm)["__init__"],
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("block", [lambda: parsed_once("a.gguf"), lambda: no_fetched_code(gguf=True), quiet])
@pytest.mark.parametrize("installed", [False, True])
def test_everything_is_as_it_was(
    block: Callable[[], AbstractContextManager[None]], fails: bool, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_kernels_available()  # it keeps its first answer, which must not be that about the stand-in
    stand_in = ModuleType("kernels")
    stand_in.get_kernel = lambda: "downloaded code"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", stand_in if installed else None)
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


@pytest.mark.parametrize("function", [(name, each) for name, functions in FETCHERS.items() for each in functions])
def test_code_is_not_downloaded(function: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of the real package refuses before it reaches the network, and works again afterwards."""
    module = pytest.importorskip(function[0])
    if not hasattr(module, function[1]):
        pytest.skip(f"this release of {function[0]} has no {function[1]}")

    def connect(*_arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    original = getattr(module, function[1])
    with no_fetched_code():
        assert getattr(importlib.import_module(function[0]), function[1]) is not original
        with pytest.raises(ImportError, match="downloaded"):
            getattr(module, function[1])("kernels-community/activation", version=1)
    assert getattr(module, function[1]) is original


def test_an_attention_kernel_of_the_hub_is_refused(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    reason = "downloaded" if is_kernels_available() else "not installed"
    with no_fetched_code(), pytest.raises((ImportError, ValueError), match=reason):
        AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="kernels-community/flash-attn2")
