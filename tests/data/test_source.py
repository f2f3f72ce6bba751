"""Files are read as they are: lines end at \\n alone, every kind of file gives the same rows."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.conftest import REPOSITORY
from tunekit.data.reading.lines import RawRow
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import hub_fingerprint, is_hub_name, read_source
from tunekit.errors import DataError
from tunekit.recipe.data import Source

ROWS = [{"prompt": "a\u2028b\x85c", "completion": 'd, "e"\n'}, {"prompt": "é𝄞", "completion": "x"}]


def read(path: Path, **changes: Any) -> list[RawRow]:
    problems = Problems()
    rows = list(read_source(Source(path=str(path), **changes), problems))
    problems.raise_if_any()
    return rows


def write(path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        text = json.dumps(ROWS, indent=1, ensure_ascii=False) if kind == "json" else "\n".join(lines)
        path.write_bytes(text.encode())
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.ndjson", "d.JSONL", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.json.gz"]
)
def test_every_kind_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert [row.values for row in read(write(tmp_path / name))] == ROWS


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a\xe2\x80\xa8b"}\r\n\r\n  \n{"text": "c"}')
    assert read(path) == [RawRow(1, {"text": "a\u2028b"}), RawRow(4, {"text": "c"})]
    path = tmp_path / "d.json"
    path.write_text('\n[\n{"text": "a"},\n\n {"text":\n "b"}]\n', encoding="utf-8")
    assert [row.line for row in read(path)] == [3, 5]
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbftext\r\n"a\nb"\r\nc\r\n')
    assert read(path) == [RawRow(2, {"text": "a\nb"}), RawRow(4, {"text": "c"})]


def test_json_lines_named_json(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert [row.line for row in read(path)] == [1, 2]


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"a\r\n\n b ")
    assert read(path) == [RawRow(1, {"text": "a\r\n\n b "})]


def test_a_line_of_6_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "x" * 6_000_000}) + '\n{"text": "y"}\n', encoding="utf-8")
    assert [len(row.values["text"]) for row in read(path)] == [6_000_000, 1]


def test_columns_and_max_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"q": "a", "prompt": "other"}\n' * 3, encoding="utf-8")
    assert [row.values for row in read(path, columns={"q": "prompt"}, max_rows=2)] == [{"prompt": "a"}] * 2
    with pytest.raises(DataError, match=r"no column 'w'.*'q', 'prompt'"):
        read(path, columns={"w": "prompt"})
    with pytest.raises(DataError, match=r"no column 'completion'.*write columns: \{q: completion\}"):
        read(path, columns={"completion": "q"})


def test_what_is_a_hub_name(tmp_path: Path) -> None:
    assert is_hub_name("gsm8k")
    assert is_hub_name("openai/gsm8k")
    assert not any(is_hub_name(path) for path in ("/a/b", "./a", "a.jsonl", "x/y.csv", "a/b/c", str(tmp_path)))


def test_the_hub_is_asked_for_split_and_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        if path == "no/such":
            logging.getLogger("huggingface_hub").warning("retrying 1/5")
            raise FileNotFoundError("no such data set\nmore")
        return datasets.Dataset.from_list([{"q": "a"}, {"q": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="some/set", split="test", revision="abc", columns={"q": "prompt"}, max_rows=1)
    assert list(read_source(source, Problems())) == [RawRow(1, {"prompt": "a"})]
    assert asked == [("some/set", {"split": "test", "revision": "abc", "streaming": False})]
    absent = Source(path="no/such")
    for read in (lambda: list(read_source(absent, Problems())), lambda: hub_fingerprint(absent)):
        with pytest.raises(DataError, match=r"no/such: no such file.*no such data set.*loaded before"):
            read()
    assert not logging.root.manager.disable
    printed = capsys.readouterr()
    assert not printed.out + printed.err
    (tmp_path / "some" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert len(list(read_source(source, Problems()))) == 1
    assert asked[-1][0] == "hf://datasets/some/set", "a folder of that name in the working directory is not meant"


def test_local_files_import_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl")
    code = (
        "import sys; from tunekit.data.reading.source import read_source;"
        "from tunekit.data.reading.problems import Problems;"
        "from tunekit.recipe.data import Source;"
        f"assert len(list(read_source(Source(path={str(path)!r}), Problems()))) == 2;"
        "assert not {'datasets', 'pyarrow', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
