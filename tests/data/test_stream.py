"""Streamed sources: every row once a pass, bounded, the same for any rank count and after any interruption."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_render import tiny as tiny
from tests.support.data_case import settings, write_lines
from tunekit.contracts import Row, StepBatches
from tunekit.data.batching import stream
from tunekit.data.batching.steps import filled_batch
from tunekit.data.reading import shards
from tunekit.data.reading.data_file import inspect_file
from tunekit.data.reading.lines import read_json_lines
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.shards import shard_source
from tunekit.data.reading.source import read_source
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import DataError, RecipeError, TunekitError
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.objectives.kto import KtoSettings
from tunekit.recipe.objectives.sft import SftSettings

ROWS = 200


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 700)
    monkeypatch.setattr(stream, "BUFFER_ROWS", 30)
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, mark: str = "r") -> Path:
    return write_lines(path, [{"text": f"{mark}{index:03d}" + "x" * (index % 7)} for index in range(ROWS)])


def load(tokenizer: LoadedTokenizer, *sources: Source, **changes: Any) -> RowSet:
    objective = make_objective(SftSettings(), tokenizer)
    return load_rows(DataSection(train=sources, max_length=32, **changes), objective, seed=0)


def streamed(path: Path, **changes: Any) -> Source:
    return Source(path=str(path), streaming=True, **changes)


def origins(steps: list[StepBatches]) -> list[str]:
    return [row.origin for step in steps for batch in step.batches for row in batch.rows]


@pytest.mark.parametrize("size", [1, 37, 700, 701, 1400, 100_000])
def test_shards_cover_the_file_with_its_line_numbers(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + write_rows(path).read_bytes().replace(b"\n", b"\r\n\n").rstrip())
    sharded = shard_source(Source(path=str(path)))
    problems = Problems()
    found = [row for shard in sharded.shards for row in sharded.read(shard, problems)]
    assert found == list(read_json_lines(inspect_file(path), problems))
    assert (len(found), problems.count) == (ROWS, 0)
    assert sharded.lines == 2 * ROWS
    assert (len(sharded.shards) > 1) == (size < 10_000)


def test_one_pass_holds_every_row_once_in_another_order_each_time(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = load(tiny, streamed(write_rows(tmp_path / "d.jsonl")))
    steps = rows.steps(settings(micro_batch_size=4, max_steps=30, epochs=None))
    found = origins(list(steps.after(0)))
    passes = [found[start : start + ROWS] for start in (0, ROWS, 2 * ROWS)]
    assert all(Counter(part) == Counter(f"d.jsonl:{line}" for line in range(1, ROWS + 1)) for part in passes)
    assert len({tuple(part) for part in passes}) == 3
    near = sum(abs(int(one.split(":")[1]) - int(two.split(":")[1])) < 3 for one, two in pairwise(found))
    assert near < len(found) / 4


def test_without_shuffling_the_order_is_the_file_s(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = load(tiny, streamed(write_rows(tmp_path / "d.jsonl")), shuffle=False)
    steps = rows.steps(settings(micro_batch_size=4, max_steps=10, epochs=None, shuffle=False))
    assert origins(list(steps.after(0))) == [f"d.jsonl:{line}" for line in range(1, ROWS + 1)]


def test_max_rows_draws_the_rows_that_an_unstreamed_source_has(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl")
    streaming = load(tiny, streamed(path, max_rows=40))
    found = origins(list(streaming.steps(settings(micro_batch_size=4, max_steps=20, epochs=None)).after(0)))
    drawn = load(tiny, Source(path=str(path), max_rows=40))
    expected = [drawn.train[index].origin for index in range(40)]
    assert expected != [f"d.jsonl:{line}" for line in range(1, 41)]
    assert Counter(found[:40]) == Counter(found[40:80]) == Counter(expected)
    assert streaming.counts.trained == 40
    for rows in (streaming, drawn):
        assert any("40 rows, drawn from all rows" in note for note in rows.notes)


def test_the_draw_is_part_of_what_is_cached_and_compared(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl")
    drawn, other, first, whole = (
        load(tiny, Source(path=str(path), max_rows=rows, draw_seed=seed))
        for rows, seed in ((9, 0), (9, 1), (9, None), (None, 0))
    )
    found = [tuple(rows.train[index].origin for index in range(9)) for rows in (drawn, other, first)]
    assert len(set(found)) == 3
    assert len({rows.fingerprint for rows in (drawn, other, first, whole)}) == 4
    assert load(tiny, Source(path=str(path), draw_seed=3)).fingerprint == whole.fingerprint


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"micro_batch_size": None, "micro_batch_tokens": 64}])
def test_resume_and_ranks(tiny: LoadedTokenizer, tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = load(
        tiny, streamed(write_rows(tmp_path / "d.jsonl"), weight=2.0), streamed(write_rows(tmp_path / "e.jsonl", "s"))
    )
    chosen = settings(max_steps=12, epochs=None, max_length=32, gradient_accumulation_steps=3, **changes)
    whole = list(rows.steps(chosen).after(0))
    assert [step.step for step in whole] == list(range(12))
    for first in (1, 7, 11, 12):
        rest = list(rows.steps(chosen).after(first))
        assert [step.epoch for step in rest] == [step.epoch for step in whole[first:]]
        assert origins(rest) == origins(whole[first:])
    parts = [list(rows.steps(chosen, rank=rank, world=2).after(0)) for rank in (0, 1)]
    for number, step in enumerate(whole):
        assert parts[0][number].indices + parts[1][number].indices == (0, 2, 1)
        for index, batch in enumerate(step.batches):
            other = parts[index % 2][number].batches[index // 2]
            assert all(torch.equal(batch.inputs[name], other.inputs[name]) for name in batch.inputs)
            assert torch.equal(batch.targets["labels"], other.targets["labels"])
    assert all(length <= 32 for step in whole for batch in step.batches for length in batch.lengths)


def test_packed_streams_lose_no_row_of_a_block(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = load(tiny, streamed(write_rows(tmp_path / "d.jsonl")))
    chosen = settings(max_steps=80, epochs=None, max_length=32, gradient_accumulation_steps=1, packing=True)
    counts = Counter(origins(list(rows.steps(chosen).after(0))))
    assert set(counts.values()) <= {max(counts.values()), max(counts.values()) - 1, max(counts.values()) - 2}
    assert len(counts) == ROWS


def test_sources_are_drawn_in_proportion_to_their_weights(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    sources = streamed(write_rows(tmp_path / "d.jsonl"), weight=3.0), Source(path=str(write_rows(tmp_path / "e.jsonl")))
    steps = load(tiny, *sources).steps(settings(micro_batch_size=10, max_steps=40, epochs=None))
    share = sum(o.startswith("d.jsonl") for o in origins(list(steps.after(0)))) / 2000
    assert abs(share - 0.75) < 0.04


def test_counts_are_estimated_and_marked(
    tiny: LoadedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data.encoding import sample

    monkeypatch.setattr(sample, "SAMPLE_ROWS", 50)
    path = write_rows(tmp_path / "d.jsonl")
    exact = load(tiny, Source(path=str(path))).counts
    rows = load(tiny, streamed(path))
    assert (bool(rows.streams), rows.counts.estimated, exact.estimated) == (True, True, False)
    assert rows.counts.read == exact.read == ROWS
    assert rows.counts.tokens == pytest.approx(exact.tokens, rel=0.05)
    assert len(rows.train) == 50
    assert filled_batch(rows.train, rows.objective.rows, settings(max_length=32)).lengths == [32, 32]


def test_what_streaming_needs(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl")
    with pytest.raises(TunekitError, match=r"training\.max_steps"):
        load(tiny, streamed(path)).steps(settings())
    with pytest.raises(RecipeError, match=r"data\.eval"):
        load(tiny, streamed(path), eval=0.1)
    array = tmp_path / "d.json"
    array.write_text(json.dumps([{"text": "a"}]), encoding="utf-8")
    with pytest.raises(DataError, match="JSON Lines"):
        load(tiny, streamed(array))
    held = write_rows(tmp_path / "e.jsonl", "s")
    rows = load(tiny, streamed(path), eval=(Source(path=str(held)),))
    assert rows.evaluation is not None
    assert len(rows.evaluation) == ROWS


def test_a_column_may_be_missing_in_the_first_row_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 60)
    rows = [{"q": f"{number}", "a": "b"} | ({"sys": "s"} if number % 5 == 0 else {}) for number in range(30)]
    path = write_lines(tmp_path / "d.jsonl", rows)
    source = streamed(path, columns={"q": "instruction", "a": "output", "sys": "system"})
    sharded, problems = shard_source(source), Problems()
    found = [row for shard in sharded.shards for row in sharded.read(shard, problems)]
    assert found == list(read_source(source, problems))
    assert len(found) == 30
    assert len(sharded.shards) > 5
    with pytest.raises(DataError, match="maps the column 'w', which does not exist"):
        list(shard_source(streamed(path, columns={"w": "output"})).read(sharded.shards[0], problems))


def test_pairs_are_streamed_as_the_same_two_rows(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{number:03d}", "chosen": "a", "rejected": "b"} for number in range(ROWS)]
    path = write_lines(tmp_path / "d.jsonl", pairs)
    whole, parts = (
        load_rows(DataSection(train=(source,), max_length=32), make_objective(KtoSettings(), tiny), seed=0)
        for source in (Source(path=str(path)), streamed(path))
    )

    def content(row: Row) -> tuple[str, ...]:
        return row.origin, *(f"{name} {values.tolist()}" for name, values in sorted(row.parts.items()))

    expected = Counter(content(whole.train[index]) for index in range(len(whole.train)))
    rows = (row for row, _ in islice(parts.streams[0].rows(0, True), 2 * ROWS))
    assert Counter(map(content, rows)) == expected
    assert len(expected) == parts.counts.trained == 2 * ROWS
    assert any("each pair becomes two rows" in note for note in parts.notes)


@pytest.mark.parametrize("most", [None, 7])
def test_a_folder_of_classes_is_streamed_file_by_file(most: int | None, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number // 5}").mkdir(exist_ok=True)
        (tmp_path / f"{number // 5}" / f"{number:02d}.png").touch()
    source = streamed(tmp_path, max_rows=most)
    sharded, problems = shard_source(source), Problems()
    rows = [row for shard in sharded.shards for row in sharded.read(shard, problems)]
    assert rows == list(read_source(source, problems))
    assert (len(rows), sharded.lines, len(sharded.shards)) == (most or 20,) * 3
    before = sharded.content
    (tmp_path / "0" / "new.png").touch()
    assert shard_source(source).content != before


def test_a_wrong_row_stops_with_its_line(
    tiny: LoadedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data.encoding import sample

    monkeypatch.setattr(sample, "SAMPLE_ROWS", 50)
    path = write_rows(tmp_path / "d.jsonl")
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[150] = "3"
    path.write_text("\n".join(lines), encoding="utf-8")
    steps = load(tiny, streamed(path)).steps(settings(max_steps=40, epochs=None))
    with pytest.raises(DataError, match=r"d\.jsonl:151: a number, not an object"):
        list(steps.after(0))


def test_only_what_is_asked_for_is_read(tiny: LoadedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load(tiny, streamed(write_rows(tmp_path / "d.jsonl")))
    read: list[Any] = []
    original = shards.Sharded.read

    def counting(self: shards.Sharded, shard: shards.Shard, problems: Problems) -> Any:
        read.append(shard)
        return original(self, shard, problems)

    monkeypatch.setattr(shards.Sharded, "read", counting)
    steps = rows.steps(settings(max_steps=1000, epochs=None))
    list(islice(steps.after(0), 2))  # 20 rows: one buffer of 30, about 30 rows a shard
    assert 0 < len(read) <= 3


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl.gz", "d.parquet"])
def test_other_kinds_stream_too(name: str, tiny: LoadedTokenizer, tmp_path: Path) -> None:
    import gzip

    texts = [f"r{index:03d}" for index in range(ROWS)]
    path = tmp_path / name
    if name == "d.csv":
        path.write_text("text\n" + "\n".join(texts), encoding="utf-8")
    elif name == "d.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=40)
    else:
        path.write_bytes(gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)))
    rows = load(tiny, streamed(path))
    steps = list(rows.steps(settings(micro_batch_size=4, max_steps=10, epochs=None)).after(0))
    found = [
        tiny.decode(ids[:n].tolist())
        for w in steps
        for b in w.batches
        for ids, n in zip(b.inputs["input_ids"], b.lengths, strict=True)
    ]
    assert sorted(found) == [text + "<|im_end|>" for text in texts]
    assert found != sorted(found)
