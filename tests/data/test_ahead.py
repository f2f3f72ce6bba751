"""Rows encoded ahead by a child: used where all goes well, and otherwise without a trace."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tunekit.plan as plan_file
from tests.data.test_rows import Counting, pairs
from tests.data_case import recording_fork, tokenizer_of, write_lines
from tests.machine.test_children import is_gone, until
from tunekit.data.encoding import ahead
from tunekit.data.encoding.ahead import encoded_ahead
from tunekit.data.encoding.sources import encode_options, load_source
from tunekit.data.rows import load_rows
from tunekit.errors import DataError
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.load import load_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> LoadedTokenizer:
    return tokenizer_of(tiny_llama)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Children of the test, on a machine that has two cores for certain."""
    pids: list[int] = []
    monkeypatch.setattr(ahead, "fork_child", recording_fork(pids))
    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)
    return pids


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "d.jsonl", pairs(3, 4, 5))


def section(*paths: Path, **changes: Any) -> DataSection:
    return DataSection(train=tuple(Source(path=str(path)) for path in paths), **changes)


def test_the_entry_made_ahead_is_the_one_used(tiny: LoadedTokenizer, path: Path, forked: list[int]) -> None:
    counting: Any = Counting(tiny)
    other = write_lines(path.with_name("e.jsonl"), pairs(6, 7))
    data = section(path, eval=(Source(path=str(other)),))
    with encoded_ahead(data, counting):
        pass
    rows = load_rows(data, counting, seed=0)
    assert counting.calls == 0
    assert (rows.counts.trained, len(rows.evaluation or ())) == (3, 2)
    assert len(forked) == 1
    assert is_gone(forked[0])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any, **__: Any) -> None:
    raise ValueError("for the child alone")


@pytest.mark.parametrize("ending", [die, fail])
def test_a_child_that_fails_changes_nothing(
    tiny: LoadedTokenizer,
    path: Path,
    forked: list[int],
    ending: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ahead, "load_source", ending)
    counting: Any = Counting(tiny)
    with encoded_ahead(section(path), counting):
        pass
    assert load_rows(section(path), counting, seed=0).counts.trained == 3
    assert counting.calls > 0
    assert is_gone(forked[0])
    assert capfd.readouterr() == ("", "")


def test_wrong_rows_are_told_by_the_parent_alone(
    tiny: LoadedTokenizer, path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = write_lines(path.with_name("w.jsonl"), [*pairs(3), {"prompt": 1, "completion": "a"}, {"prompt": "p"}])
    counting: Any = Counting(tiny)
    with encoded_ahead(section(wrong, path), counting):
        pass
    with pytest.raises(DataError) as caught:
        load_rows(section(wrong, path), tiny, seed=0)
    assert [problem.line for problem in caught.value.problems] == [2, 3]
    load_rows(section(path), counting, seed=0)
    assert counting.calls == 0  # the other source was encoded all the same
    assert capfd.readouterr() == ("", "")
    assert not [name for name in os.listdir(cache / "tokens") if name.startswith(".")]


def test_an_exception_stops_the_child_and_leaves_no_half_entry(
    tiny: LoadedTokenizer, path: Path, cache: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.data.encoding.sources.encode_in_parts", lambda *_, **__: iter([time.sleep(600)]))

    def interrupted() -> None:
        with encoded_ahead(section(path), tiny):
            assert until(lambda: bool(list(cache.glob("tokens/*/ids.bin"))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert is_gone(forked[0])
    assert os.listdir(cache / "tokens") == []


def test_ahead_nothing_is_done_that_helps_nobody(
    tiny: LoadedTokenizer, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting: Any = Counting(tiny)
    wrong = write_lines(path.with_name("w.jsonl"), [{"prompt": 1, "completion": "a"}, *pairs(*[3] * 50)])
    options = encode_options(section(wrong), counting)
    with pytest.raises(DataError):
        load_source(Source(path=str(wrong)), counting, options, cache_folder=cache, ahead=True)
    assert counting.calls < 5  # the rows after the wrong one are the parent's to look through

    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("tunekit.data.encoding.cache._fill_folder", full_disk)
    before = counting.calls
    with pytest.raises(OSError):
        load_source(Source(path=str(path)), counting, options, cache_folder=cache, ahead=True)
    assert counting.calls == before


def test_no_child_where_it_cannot_help(
    tiny: LoadedTokenizer, path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = DataSection(train=(Source(path=str(path), streaming=True),))
    hub = DataSection(train=(Source(path="owner/rows"),))
    for data, tokenizer in [(streamed, tiny), (hub, tiny), (section(path), None)]:
        with encoded_ahead(data, tokenizer):
            pass
    load_rows(section(path), tiny, seed=0)
    with encoded_ahead(section(path), tiny):  # encoded before
        pass
    with encoded_ahead(section(path.with_name("absent.jsonl")), tiny):
        pass
    monkeypatch.setattr(ahead, "usable_cores", lambda: 1)
    with encoded_ahead(section(path, train_on="all"), tiny):
        pass
    monkeypatch.setattr(ahead, "usable_cores", lambda: 2)
    monkeypatch.setenv("TUNEKIT_CACHE", str(path / "cache"))
    with encoded_ahead(section(path), tiny):
        pass
    assert forked == []


def test_what_stops_a_plan_stops_the_child_too(
    tiny_llama: Path, path: Path, tmp_path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        assert not is_gone(forked[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead, "load_source", lambda *_, **__: time.sleep(600))
    monkeypatch.setattr(plan_file, "make_meta_model", interrupted)
    recipe = tmp_path / "recipe.yaml"
    text = f"model: {{name_or_path: {tiny_llama}}}\ndata: {{train: {path}}}\nadapter: {{method: lora}}\n"
    recipe.write_text(text + f"output: {{dir: {tmp_path / 'run'}}}\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        plan_file.make_plan(load_recipe(str(recipe), []))
    assert len(forked) == 1
    assert is_gone(forked[0])


def test_a_plan_uses_what_was_encoded_ahead(
    tiny_llama: Path, path: Path, tmp_path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, encoded = os.getpid(), []
    encode = LoadedTokenizer.encode_with_offsets

    def noted(self: LoadedTokenizer, text: str, **options: Any) -> Any:
        if os.getpid() == parent and text.startswith("p"):
            encoded.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(LoadedTokenizer, "encode_with_offsets", noted)
    recipe = tmp_path / "recipe.yaml"
    text = f"model: {{name_or_path: {tiny_llama}}}\ndata: {{train: {path}}}\nadapter: {{method: lora}}\n"
    recipe.write_text(text + f"output: {{dir: {tmp_path / 'run'}}}\n", encoding="utf-8")
    plan, _ = plan_file.make_plan(load_recipe(str(recipe), []))
    assert (plan.rows.training.trained, len(forked), encoded) == (3, 1, [])
    monkeypatch.setattr(ahead, "usable_cores", lambda: 1)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "other"))
    plan_file.make_plan(load_recipe(str(recipe), []))
    assert encoded  # else the test would not have noticed
