"""Every kind of bad data file: one message with file and line, exit code 2, never a traceback and never a hang."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tunekit.cli import app

GOOD = b'{"prompt": "a", "completion": "b"}\n'
MANY = b"".join(b'{"prompt": "%d", "completion": "b"}\n' % (number**7) for number in range(5000))
Write = Callable[[Path], None]


def row(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def chat(*messages: object) -> bytes:
    return row(messages=list(messages))


USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
GOOD_CHAT = chat(USER, ANSWER)


def call_of(arguments: object) -> bytes:
    return chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})


# name of the case: (file name, content or a function that makes the file, line named (None: the file), words)
CASES: dict[str, tuple[str, bytes | Write, int | None, str]] = {
    "cut_json": ("d.jsonl", GOOD + b'{"prompt": "a", "comp\n', 2, "not valid JSON"),
    "two_values": ("d.jsonl", GOOD + GOOD.strip() + GOOD, 2, "more text after"),
    "trailing_comma": ("d.jsonl", GOOD + b'{"prompt": "a",}\n', 2, "not valid JSON"),
    "single_quotes": ("d.jsonl", b"{'prompt': 'a'}\n", 1, "not valid JSON"),
    "list_row": ("d.jsonl", GOOD + b'["a", "b"]\n', 2, "a list, not an object"),
    "text_row": ("d.jsonl", GOOD + b'"a"\n', 2, "text, not an object"),
    "number_row": ("d.jsonl", GOOD + b"3\n", 2, "a number, not an object"),
    "null_row": ("d.jsonl", GOOD + b"null\n", 2, "null, not an object"),
    "nan": (
        "d.jsonl",
        GOOD + b'{"prompt": "a", "completion": NaN}\n',
        2,
        "NaN is not JSON; correct the row, or leave it out",
    ),
    "infinity": ("d.jsonl", GOOD + b'{"prompt": "a", "completion": -Infinity}\n', 2, "Infinity is not JSON"),
    "huge_integer": ("d.jsonl", GOOD + b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}\n", 2, "digits"),
    "deep_nesting": ("d.jsonl", GOOD + b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}\n", 2, "too deeply"),
    "duplicate_key": (
        "d.jsonl",
        GOOD + b'{"prompt": "a", "prompt": "c", "completion": "b"}\n',
        2,
        "twice; correct the row",
    ),
    "missing_field": ("d.jsonl", GOOD + row(prompt="a"), 2, "no field 'completion'"),
    "null_text": ("d.jsonl", GOOD + row(prompt="a", completion=None), 2, "not null"),
    "number_text": ("d.jsonl", GOOD + row(prompt="a", completion=7), 2, "must be text"),
    "true_text": ("d.jsonl", GOOD + row(prompt=True, completion="b"), 2, "must be text"),
    "lone_surrogate": ("d.jsonl", GOOD + b'{"prompt": "a", "completion": "\\ud800"}\n', 2, "lone surrogate"),
    "escaped_nul": ("d.jsonl", GOOD + b'{"prompt": "a", "completion": "\\u0000"}\n', 2, "NUL"),
    "raw_nul": ("d.jsonl", GOOD + b'{"prompt": "\x00", "completion": "b"}\n', 2, "NUL"),
    "raw_tab": ("d.jsonl", GOOD + b'{"prompt": "\t", "completion": "b"}\n', 2, "not valid JSON"),
    "invalid_utf8": ("d.jsonl", GOOD + b'{"prompt": "\xff\xfe", "completion": "b"}\n', 2, "not UTF-8"),
    "latin1": ("d.jsonl", GOOD + '{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), 2, "not UTF-8"),
    "utf16": ("d.jsonl", GOOD.decode().encode("utf-16"), 1, "UTF-16"),
    "utf16_without_bom": ("d.jsonl", GOOD.decode().encode("utf-16-le"), 1, "NUL"),
    "no_known_fields": ("d.jsonl", row(question="a", answer="b"), 1, "'question', 'answer'"),
    "preference_pairs": ("d.jsonl", row(prompt="a", chosen="b", rejected="c"), 1, "preference"),
    "array_named_jsonl": ("d.jsonl", b"[" + GOOD.strip() + b"]", 1, "array"),
    "bad_array_item": ("d.json", b"[\n" + GOOD.strip() + b",\n3\n]", 3, "a number, not an object"),
    "nan_in_array": (
        "d.json",
        b'[{"prompt": "a", "completion": NaN}]',
        1,
        "not JSON; correct the row, or leave it out",
    ),
    "array_cut_short": ("d.json", b"[\n" + GOOD.strip() + b",\n", 3, "not valid JSON"),
    "array_without_comma": ("d.json", b"[\n" + GOOD.strip() + b"\n" + GOOD + b"]", 3, "expected ','"),
    "array_and_more": ("d.json", b"[" + GOOD.strip() + b"]\nx", 2, "more text after"),
    "json_of_one_object": (
        "d.json",
        json.dumps({"version": 1, "data": [{"prompt": "a"}]}, indent=1).encode(),
        1,
        "its rows are the list under 'data'; write the list alone: jq .data d.json > rows.json",
    ),
    "json_of_one_row": (
        "d.json",
        json.dumps({"prompt": "a"}, indent=1).encode(),
        1,
        "neither a JSON array",
    ),
    "csv_row_too_short": ("d.csv", b"prompt,completion\na,b\nc\n", 3, "1 fields, but the header has 2"),
    "csv_unquoted_comma": ("d.csv", b'prompt,completion\n"a\nb",c\nd,e,f\n', 4, "3 fields"),
    "csv_open_quote": (
        "d.csv",
        b'prompt,completion\na,"b\nc,d\ne,f\n',
        2,
        "a quote is never closed; this row and all rows after it are not read",
    ),
    "csv_semicolons": ("d.csv", b"prompt;completion\na;b\n", 1, "separated by ';'"),
    "csv_tabs": ("d.csv", b"prompt\tcompletion\na\tb\n", 1, "name the file .tsv"),
    "csv_column_twice": ("d.csv", b"prompt,prompt\na,b\n", 1, "twice"),
    "csv_not_utf8": ("d.csv", b"prompt,completion\na,\xff\n", 2, "not UTF-8"),
    "csv_only_header": ("d.csv", b"prompt,completion\n", None, "the source has no rows; add rows to it, or name"),
    "parquet_by_name_only": ("d.parquet", GOOD, None, "not"),
    "parquet_cut_short": ("d.parquet", b"PAR1" + b"\0" * 100, 1, "damaged"),
    "parquet_named_jsonl": ("d.jsonl", b"PAR1" + b"\0" * 100, None, "Parquet"),
    "zip_named_jsonl": ("d.jsonl", b"PK\x03\x04" + b"\0" * 100, None, "ZIP"),
    "gzip_without_name": ("d.jsonl", gzip.compress(GOOD), None, "gzip"),
    "name_without_gzip": ("d.jsonl.gz", GOOD, None, "not compressed"),
    "gzip_cut_short": ("d.jsonl.gz", gzip.compress(MANY)[:-4000], None, "cut short"),
    "unknown_ending": ("d.docx", GOOD, None, "known endings"),
    "no_ending": ("data", GOOD, None, "known endings"),
    "empty": ("d.jsonl", b"", None, "the file is empty; add rows to it, or name another file"),
    "only_newlines": ("d.jsonl", b"\n\r\n\n", None, "no row"),
    "only_bom": ("d.jsonl", b"\xef\xbb\xbf", None, "no row"),
    "all_rows_dropped": ("d.jsonl", row(prompt="a", completion="") * 3, None, "3 empty answer"),
    "role_typo": ("d.jsonl", GOOD_CHAT + chat(USER, {"role": "asistant", "content": "b"}), 2, "mean 'assistant'"),
    "role_of_another_format": ("d.jsonl", chat(USER, {"role": "gpt", "content": "b"}), 1, "known roles"),
    "content_null": ("d.jsonl", GOOD_CHAT + chat(USER, {"role": "assistant", "content": None}), 2, "null"),
    "content_missing": ("d.jsonl", chat(USER, {"role": "assistant"}), 1, "missing"),
    "content_number": ("d.jsonl", chat({"role": "user", "content": 3}, ANSWER), 1, "must be text"),
    "image_part": (
        "d.jsonl",
        chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
        1,
        "0 images in its columns",
    ),
    "no_messages": ("d.jsonl", GOOD_CHAT + row(messages=[]), 2, "is empty"),
    "messages_text": ("d.jsonl", GOOD_CHAT + row(messages="a"), 2, "list of messages"),
    "message_is_text": ("d.jsonl", chat("a"), 1, "must be an object"),
    "no_role": ("d.jsonl", chat({"content": "a"}), 1, "no role"),
    "bad_weight": ("d.jsonl", chat(USER, {**ANSWER, "weight": -0.5}), 1, "0 or more"),
    "tool_arguments_no_json": ("d.jsonl", call_of("{city"), 1, "not JSON"),
    "sender_typo": (
        "d.jsonl",
        row(conversations=[{"from": "humam", "value": "a"}, {"from": "gpt", "value": "b"}]),
        1,
        "mean 'human'",
    ),
    "folder": ("d.jsonl", lambda path: path.mkdir(), None, "folder"),
    "pipe": ("d.jsonl", lambda path: os.mkfifo(path), None, "pipe"),
    "device": ("d.jsonl", lambda path: path.symlink_to("/dev/zero"), None, "device"),
    "dangling_link": ("d.jsonl", lambda path: path.symlink_to("nowhere.jsonl"), None, "does not exist"),
    "looping_link": ("d.jsonl", lambda path: path.symlink_to(path), None, "itself"),
    "absent": ("d.jsonl", lambda path: None, None, "no such file"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file_name, content, line, words = CASES[name]
    path = tmp_path / file_name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_llama}\ndata: {{train: ./{file_name}}}\noutput: {{dir: run}}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        app(["preview", str(recipe)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2, printed.err
    assert f"{path}:{line}: " in printed.err if line else f"{path}:" in printed.err, printed.err
    assert words in printed.err
    assert "bug in tunekit" not in printed.err
    assert name == "all_rows_dropped" or not list((tmp_path / "cache").rglob("*.bin"))


def test_every_problem_is_named_and_the_rest_counted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"".join(b'{"text%d": "a"}\n' % number for number in range(30)))
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_llama}\ndata: {{train: d.jsonl}}\noutput: {{dir: run}}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        app(["preview", str(recipe)])
    lines = capsys.readouterr().err.strip().split("\n")
    assert [f"{path}:{number}: " in line for number, line in enumerate(lines[:20], 2)] == [True] * 20
    assert lines[20].endswith("and 10 more problems")
    assert len(lines) == 21
    path.write_bytes(GOOD + b"3\n" * 15 + row(prompt="a") * 2 + b"3\n")
    with pytest.raises(SystemExit):
        app(["preview", str(recipe)])
    lines = capsys.readouterr().err.strip().split("\n")
    assert [line.removeprefix("error: ") for line in lines] == [
        f"{path}:2: a number, not an object (15 more: line 3, 4, 5, 6, 7, ...); write {{...}}",
        f"{path}:17: no field 'completion'; this row has 'prompt' (1 more: line 18); "
        "add this field, or map a column to it under data.train[].columns",
    ]
