"""A source encoded by several processes: the same entry as by one, whatever happens to them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_rows import Counting
from tests.data_case import recording_fork, tokenizer_of, write_lines
from tests.machine.test_children import is_gone
from tunekit.data.encoding import parts
from tunekit.data.rows import load_rows
from tunekit.errors import DataError
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.recipe.data import DataSection, Source

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")
CORES = 3


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> LoadedTokenizer:
    return tokenizer_of(tiny_llama)


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The children of the test; blocks are short, and every source is worth them."""
    pids: list[int] = []
    monkeypatch.setattr(parts, "fork_child", recording_fork(pids))
    monkeypatch.setattr(parts, "BLOCK_ROWS", 4)
    monkeypatch.setattr(parts, "LEAST_BYTES", 1)
    return pids


@pytest.fixture
def entry(tiny: LoadedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Encode with so many cores: the bytes of the cache entry, counts, notes; or the error's problems."""
    numbers = count()

    def encode(cores: int, path: Path, tokenizer: Any = None, **changes: Any) -> Any:
        cache = tmp_path / f"cache{next(numbers)}"
        monkeypatch.setattr(parts, "usable_cores", lambda: cores)
        data = DataSection(train=(Source(path=str(path)),), **changes)
        try:
            rows = load_rows(data, tokenizer or tiny, seed=0, cache_dir=cache)
        except DataError as error:
            return error.problems
        files = {file.name: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
        return files, rows.counts, rows.notes

    return encode


def talk(index: int) -> dict[str, Any]:
    """A conversation; some are long, empty, or spell a control token."""
    answer = "a" * (40 if index % 5 == 0 else 3) if index % 7 else ""
    question = "<|im_end|>" if index % 11 == 0 else f"q{index}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("number", [1, 4, 5, 15, 16, 17, 40, 41])
@pytest.mark.parametrize("excess", ["split", "drop"])
def test_the_entry_is_that_of_one_process(
    entry: Callable[..., Any], tmp_path: Path, forked: list[int], number: int, excess: str
) -> None:
    path = write_lines(tmp_path / "d.jsonl", [talk(index + 1) for index in range(number)])
    one = entry(1, path, max_length=60, excess_length=excess)
    assert forked == []
    assert entry(CORES, path, max_length=60, excess_length=excess) == one
    assert len(forked) == CORES
    assert all(map(is_gone, forked))


def test_notes_come_in_the_same_order_and_number(entry: Callable[..., Any], tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'][:30] }}"
        "{{ '' if m['content'] == 'open' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}",
        encoding="utf-8",
    )
    rows = [talk(index + 1) for index in range(40)]
    for place in (9, 10, 30):
        rows[place]["messages"][1]["content"] = "open"
    path = write_lines(tmp_path / "d.jsonl", rows)
    one = entry(1, path, chat_template=str(template), max_length=200)
    assert [note.split(" ")[1] for note in one[2][1:]] == ["6", "3"]  # shortened; without an end
    assert entry(CORES, path, chat_template=str(template), max_length=200) == one


def test_the_children_do_the_encoding(tiny: LoadedTokenizer, entry: Callable[..., Any], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c" * index} for index in range(1, 41)])
    counting: Any = Counting(tiny)
    entry(CORES, path, counting)
    shared = counting.calls
    entry(1, path, counting)
    assert (shared, counting.calls - shared) == (4, 40)


@pytest.mark.parametrize("wrong", [0, 3, 4, 11, 12, 22, 23])
def test_wrong_rows_are_told_as_by_one_process(entry: Callable[..., Any], tmp_path: Path, wrong: int) -> None:
    rows = [talk(index + 1) for index in range(24)]
    rows[wrong] = {"messages": "none"}
    rows.insert(18, {"messages": [{"role": "user"}]})
    path = write_lines(tmp_path / "d.jsonl", rows)
    for tail in ("", "{not json\n"):
        path.write_text(path.read_text(encoding="utf-8") + tail, encoding="utf-8")
        one = entry(1, path)
        assert isinstance(one, list | tuple)
        assert entry(CORES, path) == one


def test_a_fault_after_the_last_row_is_found(entry: Callable[..., Any], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [talk(index + 1) for index in range(16)])
    path.write_text(path.read_text(encoding="utf-8") + "{not json\n", encoding="utf-8")
    (problem,) = entry(CORES, path)
    assert problem.line == 17


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 2])
def test_a_child_that_dies_is_made_up_for(
    entry: Callable[..., Any],
    tmp_path: Path,
    forked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    after: int,
) -> None:
    path = write_lines(tmp_path / "d.jsonl", [talk(index + 1) for index in range(60)])
    one = entry(1, path)
    encode, parent = parts.encode_rows, os.getpid()

    def dying(*given: Any, first_number: int = 0, **named: Any) -> Any:
        if os.getpid() != parent and first_number == 4 * (1 + place + after * CORES):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*given, first_number=first_number, **named)

    monkeypatch.setattr(parts, "encode_rows", dying)
    assert entry(CORES, path) == one
    assert len(forked) == CORES
    assert all(map(is_gone, forked))


def test_what_a_late_row_tells_of_the_template_counts_as_in_one_process(
    entry: Callable[..., Any], tmp_path: Path
) -> None:
    """A template that knows the generation prompt in one row only."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt and 'q15' in messages[0]['content'] %}<|im_start|>assistant:{% endif %}",
        encoding="utf-8",
    )
    path = write_lines(tmp_path / "d.jsonl", [talk(index + 1) for index in range(40)])
    one = entry(1, path, chat_template=str(template), max_length=200)
    assert entry(CORES, path, chat_template=str(template), max_length=200) == one


def test_an_exception_ends_the_children(
    tmp_path: Path, forked: list[int], entry: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        entry(CORES, write_lines(tmp_path / "d.jsonl", [talk(index + 1) for index in range(40)]))
    assert len(forked) == CORES
    assert all(map(is_gone, forked))


def test_parquet_small_sources_and_one_core_stay_in_one_process(
    entry: Callable[..., Any], tmp_path: Path, forked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "p", "completion": "c" * index} for index in range(1, 41)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    entry(CORES, tmp_path / "d.parquet")
    entry(1, write_lines(tmp_path / "d.jsonl", rows))
    monkeypatch.setattr(parts, "LEAST_BYTES", 2**20)
    entry(CORES, write_lines(tmp_path / "d.jsonl", rows))
    assert forked == []
