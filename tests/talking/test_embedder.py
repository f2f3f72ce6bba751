"""`tunekit generate` and `tunekit chat` with an embedding model: the vectors of training, the files in which they are
written, and a search."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import write_tiny_llama
from tests.support.embed_case import write_bert, write_newer_schema
from tests.support.loop_case import CPU
from tests.support.train_case import write_sections
from tunekit.chat import chat_verb
from tunekit.errors import InputError, TunekitError
from tunekit.formats.embedding import EmbeddingExample
from tunekit.generate import generate_verb
from tunekit.talking.embedder import make_embedder
from tunekit.targets.target import find_target, load_target


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers whose queries have a prompt, and whose texts have up to 24 tokens."""
    folder = write_bert(tmp_path_factory.mktemp("encoder"), llama, 0.0)
    write_newer_schema(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}), encoding="utf-8")
    return folder


def embeddings_of(target: Path, rows: list[dict[str, str]], output: Path) -> list[dict[str, Any]]:
    """The lines that `tunekit generate` writes for these rows."""
    prompts = output.with_suffix(".prompts.jsonl")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    generate_verb(str(target), None, None, str(prompts), [], output=str(output))
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_texts_have_the_embeddings_of_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = f"it is {'so ' * 30}2 here"
    texts = [{"query": "what is 1"}, {"document": long}, {"prompt": "3"}, {"query": "3"}] * 3
    lines = embeddings_of(folder, texts, tmp_path / "all.jsonl")
    assert [line["prompt"] for line in lines] == [text for row in texts for text in row.values()]
    loaded = load_target(find_target(str(folder), None, []), CPU)
    rows, loss = loaded.objective.rows, loaded.objective.loss
    batch = rows.collate([[rows.encode(EmbeddingExample(("what is 1", long)), "")]])
    with torch.no_grad(), loaded.model.training_mode(False):
        expected = loss.embed(loaded.model.output(batch.inputs), batch)
    torch.testing.assert_close(torch.tensor([line["embedding"] for line in lines[:2]]), expected)
    assert lines[2]["embedding"] != lines[3]["embedding"]  # only a query has the prompt
    assert "3 texts cut to the model's maximum length" in " ".join(capsys.readouterr().err.split())

    generate_verb(str(folder), None, ["what is 1", "3"], None, [])
    printed, notices = capsys.readouterr()
    assert [json.loads(line)["embedding"] for line in printed.splitlines()][1] == pytest.approx(
        lines[2]["embedding"], abs=1e-6
    )
    assert "cut" not in notices


def write_recipe(folder: Path, base: Path) -> Path:
    rows = [{"query": f"what is {number}", "document": f"it is {number % 9}", "negative": "no"} for number in range(12)]
    for name, part in (("train", rows[:10]), ("eval", rows[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]},
        "objective": {"method": "embed"},
        "output": {"dir": "run"},
    }
    return write_sections(folder, recipe, {})


def test_chat_searches_the_documents_of_the_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, folder))
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 3\n/help\n\n/quit\nnever read\n"))
    chat_verb(recipe, None, [], [], None, None, (0.0, 1.0, 0, 0), None)
    printed, notices = capsys.readouterr()
    assert "embedding 10 documents" in printed
    assert "there is no command /help" in notices
    answers = [line.split("  ", 1) for line in printed.splitlines() if line[:2] in ("0.", "1.", "-0")]
    embedder = make_embedder(load_target(find_target(recipe, None, []), CPU), 4)
    documents = [*(f"it is {number}" for number in range(9)), "no"]
    rows = [embedder.encode("what is 3", "query"), *(embedder.encode(text, "document") for text in documents)]
    query, *vectors = F.normalize(embedder.embed(rows), dim=-1)
    scores = {text: float(query @ vector) for text, vector in zip(documents, vectors, strict=True)}
    assert [text for _, text in answers] == sorted(documents, key=lambda text: -scores[text])[:5]
    assert [float(score) for score, _ in answers] == pytest.approx([scores[text] for _, text in answers], abs=6e-4)

    with pytest.raises(InputError, match="options of conversations have no effect"):
        chat_verb(recipe, None, [], [], "Be short.", None, (0.0, 1.0, 0, 0), None)
    with pytest.raises(InputError, match="names no rows"):
        chat_verb(str(folder), None, [], [], None, None, (0.0, 1.0, 0, 0), None)


def test_texts_are_cut_at_the_positions_of_a_base_without_a_stated_length(llama: Path, tmp_path: Path) -> None:
    loaded = load_target(find_target(str(write_recipe(tmp_path, llama)), None, []), CPU)
    positions = json.loads((llama / "config.json").read_text("utf-8"))["max_position_embeddings"]
    row = make_embedder(loaded, 4).encode("so " * positions, "document")
    assert row.sizes[0] == positions


def test_embeddings_are_written_as_matrix_table_and_lines(folder: Path, tmp_path: Path) -> None:
    rows = [{"document": f"text {number}"} for number in range(5)]
    lines = embeddings_of(folder, rows, tmp_path / "vectors.jsonl")
    prompts = str(tmp_path / "vectors.prompts.jsonl")
    for ending in ("npy", "parquet"):
        generate_verb(str(folder), None, None, prompts, [], output=str(tmp_path / f"vectors.{ending}"))
    matrix = np.load(tmp_path / "vectors.npy")
    assert matrix.dtype == np.float32
    assert matrix.tolist() == np.array([line["embedding"] for line in lines], np.float32).tolist()
    table = pyarrow.parquet.read_table(tmp_path / "vectors.parquet").to_pydict()
    assert table == {"prompt": [line["prompt"] for line in lines], "embedding": matrix.tolist()}


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("vectors.txt", {}, "vectors.txt does not end in .npy, .parquet, .jsonl"),
        ("old.npy", {}, "old.npy exists"),
        ("new.npy", {"temperature": 1.0}, "embeds texts, so --temperature has no effect"),
        ("new.npy", {"system": "Be short."}, "embeds texts, so --system has no effect"),
        ("new.npy", {"prompt": [" "]}, "the text is empty"),
    ],
)
def test_options_without_effect_on_embeddings_are_refused(
    folder: Path, tmp_path: Path, output: str, more: dict[str, Any], message: str
) -> None:
    (tmp_path / "old.npy").touch()
    arguments = {"prompt": ["text"], **more, "output": str(tmp_path / output)}
    with pytest.raises(TunekitError, match=message):
        generate_verb(str(folder), None, prompts=None, overrides=[], **arguments)
    assert not (tmp_path / "new.npy").exists()


def test_only_embedding_models_read_queries_and_documents(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "what is 1"}), encoding="utf-8")
    with pytest.raises(InputError, match="only embedding models read the key query"):
        generate_verb(str(llama), None, None, str(tmp_path / "rows.jsonl"), [])
