"""Rows whose text says nothing to the tokenizer: its normaliser leaves out all of their characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from tests.conftest import write_tiny_llama
from tests.support.data_case import tokenizer_of
from tests.support.plans import make_plan
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.looking.look import look_at_rows
from tunekit.data.looking.similar import SimilarityIndex
from tunekit.data.reading.first import format_maker
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import make_objective
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.names import objective_class

LOST, KEPT = "\x01\x02", "a word"
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {  # objective, format, and a row whose LOST is to be read as KEPT
    "text": ("sft", "text", {"text": LOST}),
    "completion": ("sft", "prompt_completion", {"prompt": KEPT, "completion": LOST}),
    "chat": ("sft", "chat", {"messages": [("user", KEPT), ("assistant", LOST)]}),
    "seq2seq": ("seq2seq", "prompt_completion", {"prompt": KEPT, "completion": LOST}),
    "dpo": ("dpo", "preference", {"prompt": KEPT, "chosen": LOST, "rejected": KEPT + KEPT}),
    "reward": ("reward", "preference", {"prompt": KEPT, "chosen": KEPT + KEPT, "rejected": LOST}),
    "kto": ("kto", "unpaired", {"prompt": KEPT, "completion": LOST, "label": True}),
    "classify": ("classify", "labels", {"text": LOST, "label": "yes"}),
    "pair": ("classify", "label_pairs", {"text": KEPT, "text_pair": LOST, "label": "yes"}),
    "token_classify": ("token_classify", "tags", {"words": [LOST], "tags": ["O"]}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose tokenizer leaves out control characters, as BERT's does."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("base"))
    native = AutoTokenizer.from_pretrained(folder)
    native.backend_tokenizer.normalizer = normalizers.Replace(LOST, "")
    native.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> LoadedTokenizer:
    tokenizer = tokenizer_of(base)
    tokenizer.answer_start_id = 0
    return tokenizer


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_a_token_is_dropped(name: str, tokenizer: LoadedTokenizer) -> None:
    objective, format_name, values = ROWS[name]
    rows = make_objective(objective_class(objective)(method=objective), tokenizer).rows
    for text, dropped in ((LOST, True), (KEPT, False)):
        row = json.loads(json.dumps(values).replace(json.dumps(LOST)[1:-1], text.replace(LOST, "\\u0001\\u0002")))
        if "messages" in row:
            row["messages"] = [{"role": role, "content": content} for role, content in row["messages"]]
        example = format_maker(format_name)(row)
        if dropped:
            with pytest.raises(Dropped, match=r"^(empty (text|answer)|a text of the pair has no token)$"):
                rows.encode(example, "")
        else:
            assert rows.encode(example, "").supervised


@pytest.mark.drawn
def test_they_are_counted_by_plan_and_data_check(base: Path, tmp_path: Path) -> None:
    texts = [("one", "no"), (LOST, "yes"), ("two", "yes"), ("three", "no")]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in texts]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    sections = {"model": str(base), "data": {"train": "rows.jsonl"}, "objective": "classify"}
    recipe.write_text(json.dumps(sections | {"output": {"dir": "run"}}), encoding="utf-8")
    loaded = load_recipe(recipe)
    plan, prepared = make_plan(loaded)
    assert (plan.rows.training.read, plan.rows.training.dropped_reasons) == (4, {"empty text": 1})
    data, kind = loaded.recipe.data, prepared.rows.objective.rows
    found = look_at_rows(data.train[0], "rows", "label", data, SimilarityIndex(), None, False, kind)
    assert found.lines["dropped"] == [2]
