"""Rows of a long source are encoded by processes of their own: the same rows, counts, notices and problems."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.support.data_case import tokenizer_of, write_lines
from tunekit.contracts import EncodeOptions
from tunekit.data.encoding import outcomes
from tunekit.data.encoding.sources import EncodedSource, load_source
from tunekit.data.reading.first import format_maker
from tunekit.data.reading.lines import RawRow
from tunekit.errors import DataError, Problem
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import Source
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.recipe.reading.names import known_names

OPTIONS = EncodeOptions("assistant", None, 64, "split")


def load(rows: Path, model: Path, cache: Path) -> EncodedSource:
    objective = make_objective(SftSettings(), tokenizer_of(model), options=OPTIONS)
    return load_source(Source(path=str(rows)), objective.rows, cache_folder=cache)


def in_processes(patch: pytest.MonkeyPatch) -> None:
    """Two of them, from the tenth row on."""
    patch.setattr(outcomes, "LONG_ROWS", 10)
    patch.setattr(outcomes, "CHUNK_ROWS", 3)
    patch.setattr(outcomes.os, "sched_getaffinity", lambda _: {0, 1})


@pytest.mark.drawn
def test_processes_make_the_same_entry(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = [
        {"prompt": f"{number}: " + "a word " * (number % 20), "completion": f"done {number}"} for number in range(32)
    ]
    written[7]["completion"] = ""
    written[29]["completion"] = ""
    rows = write_lines(tmp_path / "rows.jsonl", written)
    alone = load(rows, tiny_llama, tmp_path / "alone")
    in_processes(monkeypatch)
    together = load(rows, tiny_llama, tmp_path / "together")
    assert together.counts == alone.counts
    assert len(alone.store) > alone.counts.kept  # some are split
    assert alone.counts.dropped["empty answer"] == 2
    assert together.notices == alone.notices
    files = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "together" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "a", "output": "b"},
    "alpaca_prompt": {"instruction": "a", "input": "c", "output": "b"},
    "alpaca_turn": {"instruction": "a", "output": "b"},
    "alpaca_with_input": {"instruction": "a", "input": "", "output": "b"},
    "audio_label": {"audio": "a.wav", "label": "b"},
    "chat": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "images": ["a.png"],
    },
    "reranking": {"query": "a", "documents": ["b", "c"], "labels": [1, 0]},
    "conll": {"tokens": ["a"], "ner_tags": ["O"]},
    "document": {"text": "a"},
    "embedding": {"anchor": "a", "positive": "b", "negative_1": "c"},
    "image": {"image": "a.png", "text": "b"},
    "image_label": {"image": "a.png", "label": "b"},
    "label_pairs": {"text": "a", "text_pair": "b", "label": "c"},
    "labels": {"text": "a", "label": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompt": {"question": "a", "answer": "b", "kept": "c"},
    "prompt_completion": {"prompt": "a", "completion": "b", "sample_weight": 2},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "tags": {"words": ["a"], "tags": ["O"]},
    "text": {"text": "a"},
    "transcript": {"audio": "a.wav", "text": "b"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
}


@pytest.mark.parametrize("name", known_names("formats"))
def test_a_process_reads_the_rows_of_every_format(name: str, tmp_path: Path) -> None:
    make_example = format_maker(name, str(tmp_path / "rows.jsonl"))
    sent = pickle.loads(pickle.dumps((make_example, RawRow(3, ROWS[name]))))
    assert sent[0](sent[1].values) == make_example(ROWS[name])


def test_a_wrong_row_is_told_to_the_process_that_asked() -> None:
    problems = (Problem("what", "how", "rows.jsonl", 3, "key"), Problem("other", line=4))
    told = pickle.loads(pickle.dumps(DataError.of(problems)))
    assert type(told) is DataError
    assert told.problems == problems
    assert str(told) == str(DataError.of(problems))
