"""Files are read as they are: lines end at \\n alone, every kind of file gives the same rows."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY
from tests.support.data_case import write_lines
from tunekit.data.reading.first import format_maker
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
    with pytest.raises(DataError, match=r"maps the column 'w', which does not exist.*'q', 'prompt'"):
        read(path, columns={"w": "prompt"})
    with pytest.raises(
        DataError, match=r"maps the column 'completion', which does not exist.*write columns: \{q: completion\}"
    ):
        read(path, columns={"completion": "q"})


def test_parquet_adds_no_fields_to_tools(tmp_path: Path) -> None:
    def row(name: str, arguments: dict[str, str], city: str | None) -> dict[str, Any]:
        properties = {key: {"type": "string"} for key in arguments}
        function = {"name": name, "parameters": {"type": "object", "properties": properties}}
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        return {"messages": turns, "functions": [{"type": "function", "function": function}], "city": city}

    rows = [row("weather", {"city": "Rome"}, None), row("date", {"day": "today"}, "Oslo")]
    write_lines(tmp_path / "d.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [read(tmp_path / name, columns={"functions": "tools"}) for name in ("d.jsonl", "d.parquet")]
    lines, columns = ([format_maker("chat")(each.values) for each in some] for some in found)
    assert columns == lines
    assert [each.values["city"] for each in found[1]] == [None, "Oslo"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_max_rows_draws_from_the_whole_source(kind: str, tmp_path: Path) -> None:
    labels = [f"{number // 50}" for number in range(1000)]  # sorted, as files of classes often are
    path = tmp_path / ("classes" if kind == "folder" else f"d.{kind}")
    if kind == "folder":
        for number, label in enumerate(labels):
            (path / label).mkdir(parents=True, exist_ok=True)
            (path / label / f"{number:03d}.png").touch()
    elif kind == "parquet":
        pq.write_table(pa.table({"label": labels}), path, row_group_size=300)
    else:
        rows = [json.dumps({"label": label}) for label in labels]
        if kind == "json":
            path.write_text(f"[{','.join(rows)}]", "utf-8")
        else:
            path.write_text("\n\n".join(rows) if kind == "jsonl" else "\n".join(["label", *labels]), "utf-8")
    drawn = read(path, max_rows=200)
    assert len(drawn) == 200
    assert len({row.values["label"] for row in drawn}) == 20
    assert read(path, max_rows=200) == drawn
    assert read(path, max_rows=200, draw_seed=1) != drawn
    whole = read(path)
    places = [whole.index(row) for row in drawn] if kind != "json" else []  # whose rows share a line here
    assert places == sorted(set(places))
    assert read(path, max_rows=1000) == read(path, max_rows=2000) == whole
    assert read(path, max_rows=200, draw_seed=None) == whole[:200]


def test_every_row_is_drawn_equally_often(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(20)), "utf-8")
    counts = Counter(row.line for seed in range(400) for row in read(path, max_rows=5, draw_seed=seed))
    assert len(counts) == 20
    assert sum((count - 100) ** 2 / 75 for count in counts.values()) < 45  # chi squared, 19 degrees: p < 0.001


def test_rows_of_a_streamed_hub_data_set_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"text": str(number)} for number in range(30)])

    def load_dataset(path: str, streaming: bool, **options: Any) -> Any:
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    whole = Source(path="some/set", max_rows=10)
    assert [row.line for row in read_source(whole, Problems())] not in ([], list(range(1, 11)))
    streamed = whole.model_copy(update={"streaming": True})
    with pytest.raises(DataError, match="draw_seed: null to take the first rows"):
        read_source(streamed, Problems())
    first = streamed.model_copy(update={"draw_seed": None})
    assert [row.line for row in read_source(first, Problems())] == list(range(1, 11))


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
    source = Source(path="some/set", split="test", revision="abc", columns={"q": "prompt"}, max_rows=1, draw_seed=None)
    assert list(read_source(source, Problems())) == [RawRow(1, {"prompt": "a"})]
    assert asked == [("some/set", {"split": "test", "revision": "abc", "streaming": False})]
    absent = Source(path="no/such")
    for read in (lambda: list(read_source(absent, Problems())), lambda: hub_fingerprint(absent)):
        with pytest.raises(DataError, match=r"no/such: there is no such file.*no such data set.*in the cache"):
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
