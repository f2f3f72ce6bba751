"""A pattern or a folder of data files is one source, as if its files were one file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_render import tiny as tiny
from tests.support.data_case import settings, write_lines
from tunekit.data.batching import stream
from tunekit.data.looking.first_look import look_at
from tunekit.data.looking.look import look_at_rows
from tunekit.data.looking.similar import SimilarityIndex
from tunekit.data.reading import folder as folder_module
from tunekit.data.reading import several, shards, source
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.data.reading.shards import shard_source
from tunekit.data.reading.source import place_of, read_source
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import DataError, InputError
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.train import train_verb
from tunekit.validate import validate, validate_verb

SIZES = (30, 1, 25)
TEXTS = [f"r{number:03d}" + "x" * (number % 5) for number in range(sum(SIZES))]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)
    monkeypatch.setattr(stream, "BUFFER_ROWS", 10)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))


def parts(folder: Path, ending: str = "jsonl", key: str = "text") -> Path:
    """The texts, cut into files of different sizes."""
    folder.mkdir()
    start = 0
    for number, size in enumerate(SIZES):
        rows, place = [{key: text} for text in TEXTS[start : start + size]], folder / f"part-{number}.{ending}"
        start += size
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), place, row_group_size=7)
        elif ending == "csv":
            place.write_text("".join(f"{line}\n" for line in [key, *(row[key] for row in rows)]), "utf-8")
        else:
            content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
            place.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    return folder


def read(path: Path | str, **changes: Any) -> list[Any]:
    problems = Problems()
    rows = list(read_source(Source(path=str(path), **changes), problems))
    problems.raise_if_any()
    return rows


def load(tokenizer: LoadedTokenizer, path: Path | str, **changes: Any) -> RowSet:
    sources = (Source(path=str(path), **changes),)
    return load_rows(DataSection(train=sources, max_length=32), make_objective(SftSettings(), tokenizer), seed=0)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv", "jsonl.gz"])
@pytest.mark.parametrize("pattern", ["", "*", "part-[0-9].*", "../**/part-*"])
def test_the_files_are_read_in_the_order_of_their_names(ending: str, pattern: str, tmp_path: Path) -> None:
    folder = parts(tmp_path / "d", ending)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "hidden.jsonl").write_text("{}")
    rows = read(folder / pattern)
    assert [row.values for row in rows] == [{"text": text} for text in TEXTS]
    assert len({row.line for row in rows}) == len(TEXTS)
    drawn = read(folder / pattern, max_rows=20)
    assert len(drawn) == 20
    assert {row.values["text"] for row in drawn} & set(TEXTS[-25:])


def test_rows_and_fingerprint_follow_from_all_files(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    folder = parts(tmp_path / "d")
    one = write_lines(tmp_path / "one.jsonl", [{"text": text} for text in TEXTS])
    alone, folded, pattern = (load(tiny, path) for path in (one, folder, folder / "*.jsonl"))
    ids = [[rows.train[number].parts["ids"].tolist() for number in range(len(TEXTS))] for rows in (alone, folded)]
    assert ids[0] == ids[1]
    assert folded.train[31].origin == "part-2.jsonl:1"
    assert folded.fingerprint == pattern.fingerprint != alone.fingerprint
    write_lines(folder / "part-3.jsonl", [{"text": "more"}])
    assert load(tiny, folder).fingerprint != folded.fingerprint


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv", "jsonl.gz"])
def test_a_stream_reads_every_row_of_every_file_once_an_epoch(
    ending: str, tiny: LoadedTokenizer, tmp_path: Path
) -> None:
    folder = parts(tmp_path / "d", ending, key="words")
    sharded = shard_source(Source(path=f"{folder}/*", streaming=True, columns={"words": "text"}))
    found = [row for shard in sharded.shards for row in sharded.read(shard, Problems())]
    whole = read(folder, columns={"words": "text"})
    assert [row.values for row in found] == [row.values for row in whole]
    assert sharded.lines == (None if ending.endswith(".gz") else len(TEXTS) + 3 * (ending == "csv"))
    rows = load(tiny, folder, streaming=True, columns={"words": "text"})
    steps = settings(micro_batch_size=4, gradient_accumulation_steps=1, max_steps=14, epochs=None)
    trained = [row.origin for step in rows.steps(steps).after(0) for batch in step.batches for row in batch.rows]
    assert len(trained) == len(TEXTS)
    places = [sharded.origin(row.line) for row in found]
    assert sorted(trained) == sorted(places) != trained
    assert places[SIZES[0]] == f"part-1.{ending}:{2 if ending == 'csv' else 1}"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_names_the_file_and_its_line(streaming: bool, tiny: LoadedTokenizer, tmp_path: Path) -> None:
    folder = parts(tmp_path / "d")
    lines = (folder / "part-2.jsonl").read_text().splitlines()
    (folder / "part-2.jsonl").write_text("\n".join([*lines[:4], '{"text": 7}', *lines[4:]]))
    with pytest.raises(DataError, match=r"part-2\.jsonl:5: "):
        load(tiny, folder, streaming=streaming)
    (folder / "part-2.jsonl").write_text("\n".join([*lines[:4], "{", *lines[4:]]))
    with pytest.raises(DataError, match=r"part-2\.jsonl:5: not valid JSON"):
        load(tiny, folder, streaming=streaming)


def test_rows_are_named_by_their_file_and_its_line(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        write_lines(
            folder / name / "rows.jsonl", [{"prompt": f"{name}{number}", "completion": "c"} for number in (1, 2)]
        )
    source, objective = Source(path=str(folder)), make_objective(SftSettings(), tiny)
    rows = load_rows(DataSection(train=(source,), eval=(source,), max_length=32), objective, seed=0)
    names = ["a/rows.jsonl:1", "a/rows.jsonl:2", "b/rows.jsonl:1", "b/rows.jsonl:2"]
    assert [rows.train[number].origin for number in range(4)] == names
    written = [f"{row.file}:{row.line}" for row in rows.evaluation_examples()]
    assert written == [f"{folder}/{name}" for name in names]
    findings = look_at_rows(source, "d", "text", DataSection(train=(source,)), SimilarityIndex(), None, False)
    assert not findings.lines
    (folder / "b" / "rows.jsonl").write_text((folder / "a" / "rows.jsonl").read_text() + "{\n")
    findings = look_at_rows(source, "d", "text", DataSection(train=(source,)), SimilarityIndex(), None, False)
    places = {kind: [findings.place(line) for line in lines] for kind, lines in findings.lines.items()}
    assert places == {"exact": ["b/rows.jsonl:1", "b/rows.jsonl:2"], "broken": ["b/rows.jsonl:3"]}
    assert findings.first["exact"] == "as a/rows.jsonl:1"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file_of_several_is_one_warning(streaming: bool, tiny: LoadedTokenizer, tmp_path: Path) -> None:
    folder = parts(tmp_path / "d")
    whole = [load(tiny, folder, streaming=streaming).train[number].origin for number in range(len(TEXTS))]
    (folder / "part-00.jsonl").touch()
    rows = load(tiny, folder, streaming=streaming)
    assert [rows.train[number].origin for number in range(len(TEXTS))] == whole
    assert [note for note in rows.notes if "empty" in note or "not read" in note] == [
        "warning: d: 1 file is empty: part-00.jsonl; copy or remove it"
    ]
    for file in folder.iterdir():
        file.write_text("")
    with pytest.raises(DataError, match="all files are empty; add rows to them"):
        load(tiny, folder, streaming=streaming)


def test_folders_that_are_not_one_source_are_refused(tmp_path: Path) -> None:
    folder = parts(tmp_path / "d")
    with pytest.raises(DataError, match=r"no file matches this pattern"):
        read(folder / "*.csv")
    (folder / "test-0.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"rows for evaluation, as the name test-0\.jsonl says; .*/d/train\*\.jsonl"):
        read(folder)
    assert len(read(folder / "part-*.jsonl")) == len(TEXTS)
    (folder / "test-0.jsonl").rename(folder / "notes.txt")
    with pytest.raises(DataError, match=r"several formats: notes\.txt, part-0\.jsonl.*; .*/d/\*\*/\*\.jsonl"):
        read(folder)
    (folder / "notes.txt").rename(folder / "README.md")
    assert len(read(folder)) == len(TEXTS)


def test_a_folder_with_files_for_another_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    parts(folder / "train")
    parts(folder / "test")
    with pytest.raises(DataError, match=r"as the name test/part-0\.jsonl says; .*/d/train/\*\*/\*\.jsonl"):
        read(folder)
    assert len(read(folder / "train/**/*.jsonl")) == len(read(folder / "test")) == len(TEXTS)
    (folder / "test").rename(folder / "runs")
    assert len(read(folder)) == 2 * len(TEXTS)
    (folder / "runs" / "plan.json").write_text("{}")
    with pytest.raises(DataError, match=r"the folder also contains the run runs; move the run"):
        read(folder)


def test_a_run_cannot_write_into_its_data(tmp_path: Path, tiny_llama: Path) -> None:
    parts(tmp_path / "d")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_llama}\ndata: {{train: .}}\noutput: {{dir: runs/first}}\n")
    with pytest.raises(
        InputError, match=r"output\.dir: the run's file .*/metrics\.jsonl would become one of the files"
    ):
        train_verb(load_recipe(str(recipe)), resume=False, dry_run=False)


def test_the_place_of_a_wrong_row_reads_no_file(
    tmp_path: Path, tiny: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parts(tmp_path / "d")
    lines = [row.line for row in read(folder)]
    opened: list[str] = []
    inspect = source.inspect_file
    monkeypatch.setattr(source, "inspect_file", lambda path: opened.append(path.name) or inspect(path))
    assert place_of(str(folder), lines[30]) == (str(folder / "part-1.jsonl"), 1)
    assert place_of(str(folder), lines[29]) == (str(folder / "part-0.jsonl"), 30)
    assert place_of(str(folder), lines[32]) == (str(folder / "part-2.jsonl"), 2)
    assert not opened
    streamed = parts(tmp_path / "e")
    sharded = shard_source(Source(path=str(streamed), streaming=True))
    opened.clear()
    first = next(sharded.read(sharded.shards[0], Problems()))
    assert place_of(str(streamed), first.line) == (str(streamed / "part-0.jsonl"), 1)
    assert not opened
    with pytest.raises(DataError, match=r"e/part-0\.jsonl:1: data\.train\[\]\.columns maps"):
        load(tiny, streamed, streaming=True, columns={"absent": "text"})


def test_a_folder_of_pictures_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").touch()
    walked: list[Path] = []
    walk = folder_module.files_in
    for module in (folder_module, several):
        monkeypatch.setattr(module, "files_in", lambda path: (walked.append(file) or file for file in walk(path)))
    assert len(read(tmp_path)) == 10
    assert len(walked) == 11  # all files, and the first one, which shows that the folder contains pictures


@pytest.mark.parametrize("train", ["data/*.jsonl", "data", "data/part-0.jsonl", "missing.jsonl"])
def test_the_recipes_folder_may_have_brackets(train: str, tmp_path: Path, tiny_llama: Path) -> None:
    project = tmp_path / "my [old] project"
    project.mkdir()
    parts(project / "data")
    recipe = project / "recipe.yaml"
    recipe.write_text(f"model: {tiny_llama}\ndata: {{train: {train}}}\noutput: {{dir: run}}\n")
    if train == "missing.jsonl":
        with pytest.raises(DataError.__base__, match="no such file"):  # type: ignore[arg-type]
            validate(str(recipe))
    else:
        loaded = validate(str(recipe))
        assert len(read(loaded.recipe.data.train[0].path)) == (SIZES[0] if "part" in train else len(TEXTS))
        with pytest.raises(InputError, match="would replace"):
            refuse_to_replace("--json", str(project / "data" / "part-0.jsonl"), loaded)


def test_only_rows_can_be_a_pattern(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\ndata: {{train: 'd/*'}}\nevaluation: {{tasks: ['mmlu_*']}}\noutput: {{dir: run}}\n"
    )
    assert load_recipe(str(recipe)).recipe.evaluation.tasks == ("mmlu_*",)


def test_a_recipe_may_name_a_folder_or_a_pattern(tmp_path: Path, tiny_llama: Path) -> None:
    parts(tmp_path / "d")
    recipe = tmp_path / "recipe.yaml"
    text = "model: {model}\ndata: {train: {train}}\noutput: {dir: run}\n".replace("{model}", str(tiny_llama))
    for train in ("d", "d/", "d/*.jsonl", "d/*", "'d/part-?.jsonl'"):
        recipe.write_text(text.replace("{train}", train) if "{" not in train else text)
        validate(str(recipe))
        assert load_recipe(str(recipe)).recipe.data.train[0].path.startswith(str(tmp_path / "d"))
    recipe.write_text(text.replace("{train}", "e/*.jsonl"))
    with pytest.raises(DataError.__base__, match="no file matches this pattern"):  # type: ignore[arg-type]
        validate(str(recipe))


@pytest.mark.parametrize("train", ["d", "d/*.jsonl", "**/part-*", "d/[!x]*"])
def test_no_option_replaces_a_file_of_the_data_or_adds_one(train: str, tmp_path: Path, tiny_llama: Path) -> None:
    folder = parts(tmp_path / "d")
    (tmp_path / "link.jsonl").symlink_to(folder / "part-1.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(folder / "part-1.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_llama}\ndata: {{train: '{train}'}}\noutput: {{dir: run}}\n")
    loaded = load_recipe(str(recipe))
    for name in ("d/part-1.jsonl", "link.jsonl", "hard.jsonl"):
        with pytest.raises(InputError, match=rf"{name} would replace one of the files of data\.train\.0\.path: .*/"):
            refuse_to_replace("--json", str(tmp_path / name), loaded)
    with pytest.raises(InputError, match=r"would become one of the files of data\.train\.0\.path"):
        validate_verb(str(recipe), (), str(folder / "part-9.jsonl"))
    assert not (folder / "part-9.jsonl").exists()
    validate_verb(str(recipe), (), str(folder / ".part-9.jsonl"))
    validate_verb(str(recipe), (), str(tmp_path / "result.json"))


def test_init_reads_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    look = look_at("d/*.jsonl")
    assert look is not None
    assert (look.rows, look.format_name) == (len(TEXTS), "text")
    with pytest.raises(DataError, match="no file matches this pattern"):
        look_at("e/*.jsonl")
