"""Rows of a data section: counted, split, weighted, cached by content."""

from __future__ import annotations

import errno
import json
import os
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.test_render import THINKING
from tests.data.test_render import tiny as tiny
from tests.support.data_case import settings, tokenizer_of, write_lines
from tunekit.contracts import Objective
from tunekit.data.encoding import cache as cache_module
from tunekit.data.encoding.encode import NO_TARGET, NO_TARGET_LEFT, TOO_LONG
from tunekit.data.encoding.notes import counted_note
from tunekit.data.rendering.render import AS_GIVEN, EMPTY_ANSWER
from tunekit.data.rows import LIKE_EVALUATION, RowSet, load_evaluation_rows, load_rows
from tunekit.errors import DataError, RecipeError, ResourceError
from tunekit.files.cache_folder import default_cache_folder
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.objectives.kto import KtoSettings
from tunekit.recipe.objectives.sft import SftSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pairs(*lengths: int) -> list[dict[str, str]]:
    """Rows of one prompt token, `length` completion tokens and the end."""
    return [{"prompt": "p", "completion": chr(97 + index % 26) * length} for index, length in enumerate(lengths)]


def sft(tokenizer: LoadedTokenizer) -> Objective:
    return make_objective(SftSettings(), tokenizer)


def load(tokenizer: LoadedTokenizer, *paths: Path, seed: int = 0, **changes: Any) -> RowSet:
    data = DataSection(train=tuple(Source(path=str(path)) for path in paths), **changes)
    return load_rows(data, sft(tokenizer), seed=seed)


def test_counts(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [*pairs(3, 20, 5), {"prompt": "p", "completion": ""}])
    rows = load(tiny, path, max_length=10)
    counts = rows.counts
    assert (counts.read, counts.trained, counts.dropped, counts.truncated) == (4, 2, 2, 0)
    assert counts.dropped_reasons == {EMPTY_ANSWER: 1, TOO_LONG: 1}
    assert (counts.tokens, counts.supervised_tokens, counts.longest_tokens) == (5 + 7, 4 + 6, 7)
    assert [rows.train[index].origin for index in range(2)] == ["d.jsonl:1", "d.jsonl:3"]
    assert rows.notes == (
        "d.jsonl: format prompt_completion (the first row has 'prompt' and 'completion')",
        f"warning: d.jsonl: 1 of 4 rows is dropped: {EMPTY_ANSWER}; correct these rows, or remove them from the file",
        f"warning: d.jsonl: 1 of 4 rows is dropped: {TOO_LONG}; raise data.max_length (the longest row has 22 tokens),"
        " or set data.excess_length: truncate or split",
    )


def test_dropped_rows_are_a_warning_where_they_are_many_or_evaluated_on(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", pairs(*[3] * 29, 20))
    many = write_lines(tmp_path / "many.jsonl", pairs(*[3] * 28, 20, 20))
    evaluated = DataSection(train=(Source(path=str(few)),), eval=(Source(path=str(few)),), max_length=10)

    def warned(rows: RowSet) -> list[str]:
        return [note.split(" rows")[0] for note in rows.notes if TOO_LONG in note]

    assert warned(load(tiny, few, many, max_length=10)) == ["warning: many.jsonl: 2 of 30"]
    assert warned(load_evaluation_rows(evaluated, sft(tiny), seed=0)) == ["warning: few.jsonl: 1 of 30"]
    assert warned(load_rows(evaluated, sft(tiny), seed=0)) == ["warning: few.jsonl: 1 of 30"]


def test_the_cure_of_a_cut_row_is_no_cut(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"question": q, "answer": "b"} for q in ("a long question", "a")])
    source = Source(path=str(path), columns={"question": "prompt", "answer": "completion"})
    rows = load_rows(DataSection(train=(source,), max_length=5, excess_length="truncate"), sft(tiny), seed=0)
    assert rows.notes == (
        "d.jsonl: format prompt_completion (the first row has 'prompt' and 'completion' once its columns are renamed)",
        "warning: d.jsonl: 1 of 2 rows is dropped: no supervised token after truncation; raise data.max_length (the "
        "longest row has 17 tokens)",
    )


def test_a_column_that_is_not_read_is_mentioned(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,answer\na,b\n", encoding="utf-8")
    note = "d.csv: format text (the first row has 'text'), which does not read 'answer'"
    assert load(tiny, path).notes == (
        f"warning: {note}; map columns to the fields of a format with `columns`, or confirm with format: text",
    )
    for source, said in (
        (
            Source(path=str(path), format="text"),
            "d.csv: format text (the recipe says so), which does not read 'answer'",
        ),
        (
            Source(path=str(path), columns={"text": "prompt", "answer": "completion"}),
            "d.csv: format prompt_completion "
            "(the first row has 'prompt' and 'completion' once its columns are renamed)",
        ),
    ):
        assert load_rows(DataSection(train=(source,)), sft(tiny), seed=0).notes == (said,)


def test_a_misspelt_field_is_warned_of(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "a", "sample_weights": 0.5}])
    assert load(tiny, path).notes == (
        "warning: d.jsonl: format prompt_completion (the first row has 'prompt' and 'completion'), which does not read "
        "'sample_weights'; did you mean 'sample_weight' by 'sample_weights'?",
    )


def test_truncation_keeps_the_start_and_invents_no_end(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [*pairs(20), {"prompt": "q" * 30, "completion": "a"}])
    rows = load(tiny, path, max_length=10, excess_length="truncate")
    assert tiny.decode(rows.train[0].parts["ids"].tolist()) == "p" + "a" * 9
    assert (rows.counts.trained, rows.counts.truncated, rows.counts.dropped_reasons) == (1, 1, {NO_TARGET_LEFT: 1})


def test_splitting_keeps_every_token(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    text = "".join(chr(97 + index % 26) for index in range(101))
    path = write_lines(tmp_path / "d.jsonl", [{"text": text}])
    rows = load(tiny, path, max_length=10, excess_length="split")
    pieces = [rows.train[index] for index in range(len(rows.train))]
    assert "".join(tiny.decode(piece.parts["ids"].tolist()) for piece in pieces) == text + "<|im_end|>"
    assert {piece.origin for piece in pieces} == {"d.jsonl:1"}
    assert (rows.counts.trained, len(pieces)) == (1, 11)


def test_excess_length_error_names_the_rows(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", pairs(3, 20, 30))
    with pytest.raises(DataError) as failed:
        load(tiny, path, max_length=10, excess_length="error")
    assert [(problem.file, problem.line) for problem in failed.value.problems] == [(str(path), 2), (str(path), 3)]


def test_a_row_of_one_token_has_no_target(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "<|im_end|>"}])
    with pytest.raises(DataError, match=f"1 {NO_TARGET}"):
        load(tiny, path)


def test_problems_of_all_sources_are_raised_together(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    one, two = write_lines(tmp_path / "a.jsonl", [3]), write_lines(tmp_path / "b.jsonl", [*pairs(1), {"prompt": "p"}])
    with pytest.raises(DataError) as failed:
        load(tiny, one, two)
    assert [problem.file for problem in failed.value.problems] == [str(one), str(two)]


def test_a_problem_of_the_template_is_said_once(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_lines(tmp_path / "d.jsonl", [row] * 30)
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no such role') }}", encoding="utf-8")
    with pytest.raises(DataError) as failed:
        load(tiny, path, chat_template=str(template))
    assert str(failed.value) == (
        f"{path}:1: data.chat_template: the chat template refused the row: no such role"
        " (29 more: line 2, 3, 4, 5, 6, ...); repair the row, or name a different template in data.chat_template"
    )


def test_the_eval_fraction_is_taken_by_content_before_weights(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index:02d}", "completion": "c"} for index in range(100)]
    path = write_lines(tmp_path / "d.jsonl", rows)
    mixed = write_lines(tmp_path / "e.jsonl", rows[::-1])

    def split(path: Path, seed: int, weight: float = 1.0) -> tuple[set[str], set[str], RowSet]:
        data = DataSection(train=(Source(path=str(path), weight=weight),), eval=0.1)
        found = load_rows(data, sft(tiny), seed=seed)
        assert found.evaluation is not None
        parts = [
            {tiny.decode(part[i].parts["ids"].tolist()) for i in range(len(part))}
            for part in (found.train, found.evaluation)
        ]
        return parts[0], parts[1], found

    train, held, found = split(path, 0, weight=2.5)
    assert (len(train), len(held), train & held) == (90, 10, set())
    assert found.eval_counts is not None
    assert (found.counts.read, found.counts.trained, found.eval_counts.trained) == (90, 90, 10)
    assert found.counts.tokens == 225 * found.train.lengths[0]
    assert split(mixed, 0)[1] == held
    assert split(path, 1)[1] != held
    assert len(list(found.evaluation_prompts())) == 10


def test_equal_rows_never_stand_on_both_sides(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index // 4}", "completion": "c"} for index in range(100)]
    found = load(tiny, write_lines(tmp_path / "d.jsonl", rows), eval=0.1)
    assert found.evaluation is not None
    assert len(found.evaluation) in (8, 12)
    assert not any(note.startswith("warning") for note in found.notes)


def test_equal_rows_of_two_sources_never_stand_on_both_sides(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index:03d}", "completion": "c"} for index in range(150)]
    paths = write_lines(tmp_path / "d.jsonl", rows[:100]), write_lines(tmp_path / "e.jsonl", rows[50:])
    for seed in range(4):
        found = load(tiny, *paths, eval=0.1, seed=seed)
        assert found.evaluation is not None
        assert not np.isin(found.evaluation.digests, found.train.digests).any()
        assert 20 <= len(found.evaluation) < 40
        assert not any(note.startswith("warning") for note in found.notes)


def word_tokenizer(*words: str) -> LoadedTokenizer:
    """One token for each of the words, in lower case; one for all other words."""
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(("?", ".", *words))}, unk_token="?")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return LoadedTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="."), None)


def origins(rows: RowSet) -> tuple[list[str], list[str]]:
    """The places of the training rows and of the evaluation rows."""
    assert rows.evaluation is not None
    train, evaluation = ([part[index].origin for index in range(len(part))] for part in (rows.train, rows.evaluation))
    return train, evaluation


def test_the_evaluation_share_is_the_same_for_three_tokenizers(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    """Also if one drops rows that are too long, and another encodes several rows alike."""
    rows = [{"prompt": f"word{index} " * (1 + index % 9), "completion": "a b"} for index in range(100)]
    path = write_lines(tmp_path / "d.jsonl", rows)
    words = word_tokenizer("a", "b", *(f"word{index}" for index in range(100)))
    coarse = word_tokenizer("a", "b", *(f"word{index}" for index in range(0, 100, 2)))
    long = [load(each, path, eval=0.2, max_length=1000) for each in (tiny, words, coarse)]
    (train, held), *others = map(origins, long)
    assert (len(train), len(held)) == (80, 20)
    assert others[0] == (train, held)
    assert others[1][1] == held
    assert set(others[1][0]) < set(train)
    short = load(tiny, path, eval=0.2, max_length=40)
    assert set(origins(short)[1]) < set(held)
    assert set(origins(short)[0]) < set(train)
    missing = 20 - len(origins(short)[1])
    what = (
        f"warning: {missing} of the 20 evaluation rows are dropped, so a different base may be evaluated on different"
    )
    assert short.notes[-1].startswith(what)


def test_no_encoded_row_is_on_both_sides(tmp_path: Path) -> None:
    """A training row that is encoded like an evaluation row is left out, counted and named."""
    texts = [f"w{index % 50}" if index % 3 else f"W{index % 50}" for index in range(200)]
    path = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    other = write_lines(tmp_path / "e.jsonl", [{"text": f"w{index}"} for index in range(60)])
    rows = load(word_tokenizer(*(f"w{index}" for index in range(60))), path, other, eval=0.1)
    train, held = origins(rows)
    assert rows.evaluation is not None
    assert not np.isin(rows.evaluation.digests, rows.train.digests).any()
    left_out = 260 - len(train) - len(held)
    assert left_out > 0
    assert rows.counts.dropped_reasons == {LIKE_EVALUATION: left_out}
    assert (rows.counts.read, rows.counts.trained) == (len(train) + left_out, len(train))
    places = [f"{name}:{line}" for name, count in (("d.jsonl", 200), ("e.jsonl", 60)) for line in range(1, count + 1)]
    missing = [place for place in places if place not in {*train, *held}]
    assert rows.notes[-1] == (
        f"warning: {left_out} training rows are left out, because they are encoded like an evaluation row: "
        f"{', '.join(missing[:5])} and {left_out - 5} more"
    )


def test_a_share_that_leaves_no_training_row_names_the_reason(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": f"p{index}", "completion": "a"} for index in range(40)])
    spaces = [{"text": f"a{' ' * (index + 1)}a"} for index in range(40)]
    what = r"^data\.eval: all training rows are encoded like evaluation rows \(e\.jsonl:\d.* more\); name a separate"
    with pytest.raises(DataError, match=what):
        load(word_tokenizer("a"), write_lines(tmp_path / "e.jsonl", spaces), eval=0.1)
    with pytest.raises(DataError, match=r"^model: .* 50% of their tokens are unknown; use the tokenizer that belongs"):
        load(word_tokenizer("a"), path, eval=0.1)


def test_many_unknown_tokens_are_a_warning(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a b " * 45 + "c"}] * 10)
    what = "warning: 1.1% of the tokens of the first 10 training rows are unknown to the tokenizer; use the tokenizer"
    assert load(word_tokenizer("a", "b"), path).notes[-1].startswith(what)
    assert not any("unknown" in note for note in load(word_tokenizer("a", "b", "c"), path).notes)


def test_equal_pieces_of_different_documents_are_not_on_both_sides(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    """Only the equal pieces are left out: a licence before every document does not empty the training rows."""
    path = write_lines(tmp_path / "d.jsonl", [{"text": "x" * 20 + f"{index:02d}" * 10} for index in range(40)])
    rows = load(tiny, path, eval=0.2, max_length=20, excess_length="split")
    train, held = origins(rows)
    assert rows.evaluation is not None
    assert not np.isin(rows.evaluation.digests, rows.train.digests).any()
    assert (len(set(held)), len(set(train))) == (8, 32)
    assert len(held) / 8 == len(train) / 32 + 1, "the first piece"
    assert rows.counts.dropped == 0, "each document still has a piece"


def test_both_rows_of_a_preference_pair_are_on_one_side(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{index:02d}", "chosen": "good", "rejected": "bad"} for index in range(60)]
    data = DataSection(train=(Source(path=str(write_lines(tmp_path / "d.jsonl", rows))),), eval=0.2)
    train, held = origins(load_rows(data, make_objective(KtoSettings(), tiny), seed=0))
    assert (len(train), len(held)) == (96, 24)
    assert not set(train) & set(held)


def test_columns_that_no_format_reads_do_not_change_the_share(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    """Else repeated rows with different numbers would be on both sides, and would be left out of training."""
    rows = [{"prompt": f"p{index % 25:02d}", "completion": "c"} for index in range(100)]
    numbered = [{**row, "id": number} for number, row in enumerate(rows)]
    plain, other = (
        load(tiny, write_lines(tmp_path / f"{name}.jsonl", each), eval=0.2)
        for name, each in (("d", rows), ("e", numbered))
    )
    assert [origins(plain)[side] for side in (0, 1)] == [
        [place.replace("e.", "d.") for place in origins(other)[side]] for side in (0, 1)
    ]
    assert other.counts.dropped == 0


def test_pieces_of_one_document_are_held_out_together(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    texts = [f"{index:02d}" * (5 + 8 * index) for index in range(20)]  # 1 to 16 pieces
    path = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    found = load(tiny, path, eval=0.2, max_length=20, excess_length="split")
    assert found.evaluation is not None
    sides = [{part[index].origin for index in range(len(part))} for part in (found.train, found.evaluation)]
    assert sides[0] | sides[1] == {f"d.jsonl:{line}" for line in range(1, 21)}
    assert not sides[0] & sides[1]
    assert len(found.evaluation) > len(sides[1]) > 1, "whole documents, of several pieces"
    assert len(found.evaluation) <= 0.2 * (len(found.train) + len(found.evaluation)) + 1
    assert found.eval_counts is not None
    assert (found.counts.trained, found.eval_counts.trained) == (len(sides[0]), len(sides[1]))
    assert found.counts.tokens + found.eval_counts.tokens == sum(len(text) + 1 for text in texts)


def test_answers_of_one_conversation_are_held_out_together(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    """Where each is a row of its own, as it was given; one that is too long leaves the others."""
    (tmp_path / "t.jinja").write_text(THINKING, encoding="utf-8")
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": r, "content": f"{c}{n:02d}"} for r, c in turns]} for n in range(40)]
    rows[3]["messages"][3]["content"] = "b" * 500
    path = write_lines(tmp_path / "d.jsonl", rows)
    options = {"chat_template": str(tmp_path / "t.jinja"), "rewritten_answers": "each", "max_length": 400}
    found = load(tiny, path, eval=0.2, **options)
    assert found.evaluation is not None
    sides = [[part[index].origin for index in range(len(part))] for part in (found.train, found.evaluation)]
    assert not set(sides[0]) & set(sides[1])
    twice = [f"d.jsonl:{number}" for number in range(1, 41) if number != 4] * 2
    assert sorted(sides[0] + sides[1]) == sorted([*twice, "d.jsonl:4"])
    assert found.eval_counts is not None
    assert (found.counts.read + found.eval_counts.read, found.counts.truncated) == (40, 1)
    assert any(AS_GIVEN in note for note in found.notes)


def test_of_a_single_document_nothing_can_be_held_out(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("".join(f"line {index}\n" for index in range(200)), encoding="utf-8")
    assert len(load(tiny, path, max_length=20, excess_length="split").train) == 85
    for file in (path, write_lines(tmp_path / "d.jsonl", pairs(3))):
        with pytest.raises(DataError, match="only one row"):
            load(tiny, file, eval=0.1, max_length=20, excess_length="split")


def test_leaks_are_told(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", pairs(1, 2, 3))
    other = write_lines(tmp_path / "e.jsonl", pairs(1, 2, 9))
    found = load(tiny, path, eval=(Source(path=str(other)),))
    assert found.notes[-1] == "warning: 2 of 3 evaluation rows are also training rows"
    same = load(tiny, path, eval=(Source(path=str(path)),))
    assert [note for note in same.notes if note.startswith("warning")] == [
        f"warning: {path} is both in data.train and data.eval",
        "warning: 3 of 3 evaluation rows are also training rows",
    ]
    alone = load_evaluation_rows(
        DataSection(train=(Source(path="absent.jsonl"),), eval=(Source(path=str(path)),)), sft(tiny), seed=0
    )
    assert alone.evaluation is not None
    assert len(alone.evaluation) == 3


def test_prompts_of_evaluation_rows(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_lines(tmp_path / "d.jsonl", [{"messages": messages}, {"messages": messages[:1]}])
    found = load(tiny, path, eval=(Source(path=str(path)),)).evaluation_prompts()
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [(tiny.decode(prompt.prompt), *prompt[1:]) for prompt in found] == [(asked, "a", asked)]


def test_weights_reach_the_windows(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    one, two = write_lines(tmp_path / "a.jsonl", pairs(*[1] * 10)), write_lines(tmp_path / "b.jsonl", pairs(*[2] * 10))
    data = DataSection(train=(Source(path=str(one), weight=3.0), Source(path=str(two), weight=0.5)))
    rows = load_rows(data, sft(tiny), seed=0)
    steps = rows.steps(settings(gradient_accumulation_steps=1))
    origins = [row.origin for step in steps.after(0) for batch in step.batches for row in batch.rows]
    assert sum(origin.startswith("a.jsonl") for origin in origins) == 30
    assert sum(origin.startswith("b.jsonl") for origin in origins) == 5
    assert rows.counts.tokens == 30 * 3 + 5 * 4


def test_a_custom_template_is_read_from_its_file(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}", encoding="utf-8")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write_lines(tmp_path / "d.jsonl", [row])
    rows = load(tiny, path, chat_template=str(template))
    assert tiny.decode(rows.train[0].parts["ids"].tolist()) == "<|im_start|>q<|im_end|><|im_start|>a<|im_end|>"
    with pytest.raises(RecipeError, match=r"data\.chat_template"):
        load(tiny, path, chat_template=str(tmp_path))


class Counting:
    """A tokenizer that counts how often it encodes."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        self._tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("encode"):
            self.calls += 1
        return getattr(self._tokenizer, name)


def test_the_cache_is_keyed_by_everything_that_matters(tiny: LoadedTokenizer, tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", pairs(3, 4))
    counting: Any = Counting(tiny)

    def encodes(data_path: Path = path, **changes: Any) -> bool:
        before = counting.calls
        load(counting, data_path, **changes)
        return bool(counting.calls > before)

    assert encodes()
    assert not encodes()
    assert not encodes(write_lines(tmp_path / "copy.jsonl", pairs(3, 4)))  # content, not name
    assert encodes(max_length=7)
    assert encodes(train_on="all")
    assert encodes(excess_length="split")
    template = tmp_path / "t.jinja"
    template.write_text("x", encoding="utf-8")
    assert encodes(chat_template=str(template))
    write_lines(path, pairs(3, 5))
    assert encodes()
    assert not encodes()
    assert not [name for name in os.listdir(cache / "tokens") if name.startswith(".")]


@pytest.mark.parametrize(
    ("file", "damage"),
    [*product(["ids.bin", "trained.bin", "rows.bin", "meta.json"], ["flip", "cut", "remove"]), ("meta.json", "forget")],
)
def test_a_damaged_cache_is_made_anew(
    tiny: LoadedTokenizer, tmp_path: Path, cache: Path, file: str, damage: str
) -> None:
    path = write_lines(tmp_path / "d.jsonl", pairs(3, 4))
    good = [load(tiny, path).train[index].parts["ids"].tolist() for index in range(2)]
    (entry,) = (cache / "tokens").iterdir()
    content = bytearray((entry / file).read_bytes())
    if damage == "remove":
        (entry / file).unlink()
    elif damage == "forget":
        meta = json.loads(content)
        del meta["facts"]["columns"]
        (entry / file).write_text(json.dumps(meta), encoding="utf-8")
    elif damage == "cut":
        (entry / file).write_bytes(content[:-3])
    else:
        content[2] ^= 1
        (entry / file).write_bytes(content)
    assert [load(tiny, path).train[index].parts["ids"].tolist() for index in range(2)] == good
    counting: Any = Counting(tiny)
    load(counting, path)
    assert counting.calls == 0


def test_no_cache_folder_is_no_obstacle(tiny: LoadedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("TUNEKIT_CACHE", str(blocked / "cache"))
    assert len(load(tiny, write_lines(tmp_path / "d.jsonl", pairs(3, 4))).train) == 2


@pytest.mark.parametrize("is_large", [False, True])
def test_a_full_disk_is_an_obstacle_only_to_what_is_too_large_for_the_memory(
    is_large: bool, tiny: LoadedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all rows of 100 GB of text would be encoded a second time, into memory."""
    path, fill = write_lines(tmp_path / "d.jsonl", pairs(3, 4)), cache_module._fill_folder

    def full(*values: Any) -> None:
        fill(*values)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "_fill_folder", full)
    if not is_large:
        assert len(load(tiny, path).train) == 2
        return
    monkeypatch.setattr(cache_module, "MOST_IN_MEMORY_BYTES", 10)
    with pytest.raises(ResourceError, match=r"no room for the encoded rows in .*cache.* after .*TUNEKIT_CACHE"):
        load(tiny, path)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_CACHE", "/a")
    assert default_cache_folder() == Path("/a")
    monkeypatch.delenv("TUNEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_folder() == Path("/b/tunekit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert default_cache_folder() == Path("/c/.cache/tunekit")


def test_the_fingerprint_follows_content_and_options(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", pairs(*[3] * 30))
    first = load(tiny, path).fingerprint
    assert load(tiny, path, seed=1).fingerprint == first
    assert load(tiny, path, eval=0.1).fingerprint != first
    assert load(tiny, path, eval=0.1).fingerprint != load(tiny, path, eval=0.1, seed=1).fingerprint
    weighted = DataSection(train=(Source(path=str(path), weight=2.0),))
    assert load_rows(weighted, sft(tiny), seed=0).fingerprint != first
    os.utime(path, (1, 1))
    assert load(tiny, path).fingerprint == first
    write_lines(path, pairs(*[3] * 29, 4))
    assert load(tiny, path).fingerprint != first


def test_notes_and_counts_come_from_the_cache_too(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [*pairs(3), {"prompt": "p", "completion": ""}])
    one, two = load(tiny, path), load(tiny, path)
    assert (one.notes, one.counts) == (two.notes, two.counts)


def test_stored_rows_are_copies(tiny: LoadedTokenizer, tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", pairs(3))
    rows = load(tiny, path)
    rows.train[0].parts["ids"][:] = 7
    assert not np.array_equal(rows.train[0].parts["ids"], np.full(5, 7))
    with pytest.raises(IndexError):
        rows.train[1]


@pytest.mark.drawn
def test_real_chat_rows_train_exactly_their_answers(smollm2: Path, shared: Path, cache: Path) -> None:
    tokenizer = tokenizer_of(smollm2)
    path = shared / "data" / "chat_multiturn" / "fastchat_identity.jsonl"
    data = DataSection(train=(Source(path=str(path)),))
    loaded = load_rows(data, sft(tokenizer), seed=0)
    written = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert loaded.counts.trained == len(written)
    for index, messages in enumerate(written):
        row = loaded.train[index]
        answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
        assert tokenizer.decode(row.parts["ids"][row.parts["trained"]].tolist()) == "".join(answers)
        expected = tokenizer.native.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert row.parts["ids"].tolist() == expected


def test_rows_of_a_json_array_on_one_line_are_rows_of_their_own(tiny: LoadedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(pairs(*range(3, 23))), encoding="utf-8")
    rows = load(tiny, path, eval=0.2)
    assert rows.evaluation is not None
    assert rows.eval_counts is not None
    assert rows.counts.trained + rows.eval_counts.trained == rows.counts.read + rows.eval_counts.trained == 20
    assert len(list(rows.evaluation_prompts())) == len(rows.evaluation) < 10


def test_an_error_of_an_evaluation_row_keeps_its_cure() -> None:
    def prompt(example: object) -> NoReturn:
        raise DataError("'messages' is empty", "leave the row out")

    kind = SimpleNamespace(counting=lambda: SimpleNamespace(prompt=prompt))
    rows: Any = SimpleNamespace(
        objective=SimpleNamespace(rows=kind), evaluation_examples=lambda: [("rows.jsonl", 3, None)]
    )
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: 'messages' is empty; leave the row out$"):
        list(RowSet.evaluation_prompts(rows))


@pytest.mark.parametrize("start", ["", "warning: "])
def test_a_note_of_one_row_is_about_one_row(start: str) -> None:
    what = f"{start}rows whose text contains a special token"
    assert counted_note("d", 1200, what) == f"{start}d: 1,200 rows whose text contains a special token"
    assert counted_note("d", 1, what) == f"{start}d: 1 row whose text contains a special token"
