"""Rerankers against sentence_transformers, where it is installed: 20 steps of training, and files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.conftest import write_tiny_llama
from tests.support.embed_case import write_bert
from tests.support.train_case import losses, train, write_sections
from tunekit.evaluate import evaluate_verb
from tunekit.export import export_verb
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb

st = pytest.importorskip("sentence_transformers", reason="sentence_transformers is not installed")
STEPS, ROWS_OF_STEP = 20, 8
RATE = 1e-3


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama = write_tiny_llama(tmp_path_factory.mktemp("decoder"))
    folder = write_bert(tmp_path_factory.mktemp("encoder"), llama, 0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.bos_token, None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def rows_of(loss: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(STEPS * ROWS_OF_STEP):
        query, documents = f"what is {number % 9}", [f"it is {'so ' * (each % 4)}{number}" for each in range(3)]
        labels = [(number + each) % 3 for each in range(3)]
        if loss == "lambda":
            rows.append({"query": query, "documents": documents, "labels": labels})
        else:
            rows.append({"query": query, "document": documents[0], "label": number % 2})
    return rows


def write_case(folder: Path, base: Path, loss: str, adapter: dict[str, Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(loss))
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    training = {"learning_rate": RATE, "scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0, "epochs": 1.0}
    training |= {"micro_batch_size": 2, "gradient_accumulation_steps": ROWS_OF_STEP // 2, "max_grad_norm": None}
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "max_length": 64, "shuffle": False},
        "adapter": adapter,
        "objective": {"method": "rerank", "loss": loss},
        "training": training,
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, {})


@pytest.mark.parametrize(
    ("loss", "method"), [("binary_cross_entropy", "full"), ("lambda", "full"), ("binary_cross_entropy", "lora")]
)
def test_training_equals_sentence_transformers(loss: str, method: str, bert: Path, tmp_path: Path) -> None:
    """Losses of 20 steps and the scores of the resulting folder, from the same initial head. The micro-batches of a
    step are joined there."""
    adapter: dict[str, Any] = {"method": "full"}
    if method == "lora":
        adapter = {"method": "lora", "r": 4, "alpha": 8, "target_modules": ["query", "value"], "dropout": 0.0}
    recipe = write_case(tmp_path, bert, loss, adapter)
    run = train(recipe)
    still = train(recipe, f"output.dir={tmp_path / 'still'}", "training.learning_rate=1e-30")
    model = start_model(bert, still, method)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    made = st.cross_encoder.losses
    loss_of = made.LambdaLoss(model) if loss == "lambda" else made.BinaryCrossEntropyLoss(model)
    model.train()
    theirs, rows = [], rows_of(loss)
    for start in range(0, len(rows), ROWS_OF_STEP):
        some = rows[start : start + ROWS_OF_STEP]
        columns = [[row[name] for row in some] for name in list(rows[0])[:2]]
        labels: Any = (
            [torch.tensor(row["labels"]) for row in some] if loss == "lambda" else [row["label"] for row in some]
        )
        value = loss_of(columns, labels if loss == "lambda" else torch.tensor(labels))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        theirs.append(float(value.detach()))
    assert losses(run) == pytest.approx(theirs, rel=1e-5)
    folder = run / "model"
    if method == "lora":
        folder = tmp_path / "merged"
        merge_verb(str(run / "adapter"), str(folder), str(bert), None, [])
    model.eval()
    pairs = [("what is it", "it is " * 30), ("what", "no"), ("what is 3", "it is 12")]
    loaded = st.CrossEncoder(str(folder), device="cpu")
    ours, wanted = (each.predict(pairs, activation_fn=torch.nn.Identity()) for each in (loaded, model))
    if loss == "lambda":  # only differences of scores have a gradient, and Adam moves the bias by rounding errors
        ours, wanted = ours - ours[0], wanted - wanted[0]
    assert ours.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def start_model(base: Path, still: Path, method: str) -> Any:
    """A CrossEncoder with tunekit's values before step 1, which a run of no step has written."""
    if method == "full":
        return st.CrossEncoder(str(still / "model"), device="cpu")
    import peft

    model = st.CrossEncoder(str(base), num_labels=1, device="cpu")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    module = next(module for module in model.modules() if type(module).__name__ == "BertForSequenceClassification")
    wrapped = peft.get_peft_model(module, config)
    result = peft.set_peft_model_state_dict(wrapped, load_file(still / "adapter" / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    return model


def test_a_decoders_folder_reads_the_template_and_gives_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_tiny_llama(tmp_path / "decoder")
    recipe = write_case(tmp_path, base, "binary_cross_entropy", {"method": "lora", "r": 4})
    run = train(recipe, "training.max_steps=2", "~training.epochs", "data.max_length=512")
    export_verb(str(run), "sentence-transformers", str(tmp_path / "ours"))
    pairs = [("what is it", "it is"), ("what {document} is", 'a "quoted" {query}\nline')]
    rows = "".join(json.dumps({"query": query, "document": document}) + "\n" for query, document in pairs)
    (tmp_path / "score.jsonl").write_text(rows, encoding="utf-8")
    for target in (run, tmp_path / "ours"):
        capsys.readouterr()
        generate_verb(str(target), None, None, None, ["model.dtype=float32"], score=str(tmp_path / "score.jsonl"))
        scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
        theirs = st.CrossEncoder(str(tmp_path / "ours"), device="cpu").predict(pairs)
        assert scores == pytest.approx(theirs.tolist(), abs=2e-6)


def test_an_exported_reranker_is_recognised_and_a_crossencoders_folder_is_a_base(bert: Path, tmp_path: Path) -> None:
    recipe = write_case(tmp_path, bert, "binary_cross_entropy", {"method": "lora", "r": 4})
    run = train(recipe, "training.max_steps=2", "~training.epochs")
    export_verb(str(run), "sentence-transformers", str(tmp_path / "ours"))
    model = st.CrossEncoder(str(tmp_path / "ours"), device="cpu")
    assert type(model.activation_fn).__name__ == "Sigmoid"
    model.save_pretrained(str(tmp_path / "theirs"))
    found = []
    for name, target in (("run", run), ("ours", tmp_path / "ours"), ("theirs", tmp_path / "theirs")):
        path = tmp_path / f"{name}.json"
        settings = ["model.dtype=float32"]
        evaluate_verb(str(target), None, str(tmp_path / "train.jsonl"), None, (), path, settings)
        found.append(json.loads(path.read_text("utf-8")))
    for other in found[1:]:
        for name in ("loss", "ndcg_at_10", "mrr_at_10", "map"):
            assert other[name] == pytest.approx(found[0][name], rel=1e-5)
