"""Sequence classification: encoder and decoder from recipe to merged model, against transformers and peft."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaConfig,
    DebertaModel,
    T5Config,
    T5ForConditionalGeneration,
    get_scheduler,
)
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

from tests.conftest import write_tiny_llama
from tests.support.data_case import tokenizer_of
from tests.support.plans import make_plan
from tests.support.train_case import check_a_resume, lose_the_end, losses, tensors_of, train, write_sections
from tunekit.adapter import combine_verb, convert_verb, diff_verb, export_checkpoint_verb
from tunekit.adapters.folder.config import read_adapter_config
from tunekit.contracts import AnswerLimits, EncodeOptions, Row
from tunekit.errors import DataError, InputError, RecipeError, RunFolderError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.merge import merge_verb
from tunekit.metrics import accuracy, macro_f1, micro_f1
from tunekit.model.load import load_model
from tunekit.objectives.base import make_objective
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.classify import ClassifySettings
from tunekit.targets.labels import head_facts
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb
from tunekit.validate import validate

CPU = torch.device("cpu")
WORDS = {"good": "yes", "bad": "no", "odd": "perhaps"}
STEPS = 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def bert(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder without a head, saved as sentence encoders are, with the tiny llama's tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(tokenizer) + 5, **sizes, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder-decoder, whose texts end with the token that its classifier reads."""
    folder = tmp_path_factory.mktemp("both")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ending = TemplateProcessing(single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, 2)])
    tokenizer.backend_tokenizer.post_processor = ending
    tokenizer.pad_token = tokenizer.bos_token
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer) + 5, **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["bert", "llama"])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def texts(count: int) -> list[tuple[str, str]]:
    """Rows of three labels, of different lengths."""
    kinds = list(WORDS.items())
    return [(f"{kinds[number % 3][0]}{' so' * (number % 5)}", kinds[number % 3][1]) for number in range(count)]


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 42), ("test", 12)):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in texts(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": "train.jsonl", "eval": "test.jsonl", "max_length": 64, "packing": False},
        "objective": "classify",
        "adapter": {"method": "lora", "r": 4},
        "training": {"learning_rate": 0.01, "micro_batch_size": 6, "gradient_accumulation_steps": 1, "epochs": 3},
        "output": {"dir": "run"},
    }
    return write_sections(folder, values, sections)


@pytest.mark.sampled(1)
def test_a_run_learns_and_its_folder_is_used_by_every_verb(base: Path, tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path, base, training={"epochs": 30}))
    evaluate_verb(str(run), None, str(tmp_path / "test.jsonl"), "labels", [], str(tmp_path / "after.json"), [])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert after["accuracy"] == 1.0
    assert after["macro_f1"] == 1.0
    assert after["rows"] == 12
    loaded = load_target(find_target(str(run), None, []), CPU)
    assert answer(loaded, ["good so", "bad"]) == ["yes", "no"]
    # The adapter's folder alone says what it was trained for, and its head is in PEFT's configuration.
    alone = tmp_path / "alone"
    (run / "adapter").rename(alone)
    loaded = load_target(find_target(str(alone), str(base), []), CPU)
    assert answer(loaded, ["odd so so"]) == ["perhaps"]
    config = json.loads((alone / "adapter_config.json").read_text("utf-8"))
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"]
    export_checkpoint_verb(f"{run}@last", None, str(tmp_path / "exported"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "exported" / name).read_bytes() == (alone / name).read_bytes()
    merge_verb(str(alone), str(tmp_path / "merged"), str(base), None, [])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("odd so so", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert merged.config.id2label[int(merged(input_ids=ids).logits.argmax())] == "perhaps"
    evaluate_verb(
        str(tmp_path / "merged"), None, str(tmp_path / "test.jsonl"), "labels", [], str(tmp_path / "merged.json"), []
    )
    merged_values = json.loads((tmp_path / "merged.json").read_text("utf-8"))
    assert merged_values.pop("classes") == after.pop("classes")
    assert merged_values == pytest.approx(after, abs=1e-5)
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text("utf-8"))
    assert report["largest_logit_difference"] < 1e-4 * max(1.0, report["logit_spread"])


def test_the_untuned_base_of_a_recipe_is_measured_with_the_labels_of_its_rows(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base)
    evaluate_verb(str(recipe), None, None, None, [], str(tmp_path / "before.json"), [])
    before = json.loads((tmp_path / "before.json").read_text("utf-8"))
    assert 0 <= before["accuracy"] < 1
    assert before["loss"] == pytest.approx(math.log(3), rel=0.3), "a drawn head knows nothing"


@pytest.mark.drawn
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_packed_pooler_of_the_base_is_not_new(quantization: str, bert: Path, tmp_path: Path) -> None:
    training = {"epochs": None, "max_steps": 2}
    run = train(write_recipe(tmp_path, bert, model={"quantization": quantization}, training=training))
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "found.json"), [])
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert found["loss"] == pytest.approx(report["evaluations"][-1]["eval"]["loss"], rel=1e-6)


@pytest.mark.drawn
def test_padding_is_not_taken_for_the_end_that_a_head_looks_for(t5: Path, tmp_path: Path) -> None:
    shutil.copytree(t5, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(t5)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = write_recipe(tmp_path, tmp_path / "base", training={"epochs": None, "max_steps": 4})
    padded = losses(train(recipe))
    train(
        recipe,
        "training.micro_batch_size=1",
        "training.gradient_accumulation_steps=6",
        f"output.dir={tmp_path / 'alone'}",
    )
    assert padded == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


@pytest.mark.drawn
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_two_classifiers_of_a_base_without_a_head_are_compared(method: str, bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, adapter={"method": method}, training={"epochs": None, "max_steps": 3})
    for seed in (0, 1):
        train(recipe, f"training.seed={seed}", f"output.dir={tmp_path / f'run{seed}'}")
    left, right = (str(tmp_path / f"run{seed}" / "adapter") for seed in (0, 1))
    diff_verb(left, right, None, str(tmp_path / "test.jsonl"), None, str(tmp_path / "diff.json"), None)
    found = {each["name"]: each for each in json.loads((tmp_path / "diff.json").read_text("utf-8"))}
    assert found["base_model.model.classifier.weight"]["distance"] > 0
    assert found["bert.encoder.layer.0.attention.self.query"]["distance"] > 0
    diff_verb(left, left, None, None, None, str(tmp_path / "same.json"), None)
    assert all(each["distance"] == 0 for each in json.loads((tmp_path / "same.json").read_text("utf-8")))


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert", "bert"])
def test_a_text_may_fill_the_table_of_positions_and_no_more(kind: str, llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1, **sizes)
    net = AutoModel.from_config(config)
    net.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    usable = 34 if kind == "bert" else 32  # the others' positions count from 2 on
    with pytest.raises((IndexError, RuntimeError)):
        net(input_ids=torch.full((1, usable + 1), 7))
    recipe = write_recipe(tmp_path, tmp_path / "base", training={"epochs": None, "max_steps": 1})
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": "s" * usable, "label": "yes"}) + "\n")
    train(recipe)
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": "s" * (usable + 1), "label": "yes"}) + "\n")
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    (refusal,) = plan.refusals
    what = f"the longest row has {usable + 1} tokens, too many for the model's {usable} positions"
    assert refusal.message == f"{what}; set data.max_length to at most {usable}"


@pytest.mark.sampled(1)
def test_twenty_steps_equal_transformers_and_peft(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, base, data={"shuffle": False}, training={"learning_rate": 2e-3, "epochs": None, "max_steps": STEPS}
    )
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    run = train(recipe)
    ours = losses(run)
    labels = ["no", "perhaps", "yes"]
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, dtype=torch.float32, pad_token_id=prepared.processor.tokenizer.pad_id
    )
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    )
    start_as_ours(theirs, recipe, tmp_path)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), texts(42)

    def loss_of(step: int) -> torch.Tensor:
        batch = rows[step % 7 * 6 : step % 7 * 6 + 6]
        total = torch.zeros(())
        for text, label in batch:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([labels.index(label)]))
        return total / len(batch)

    assert ours == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), rel=1e-5)


def losses_of(
    theirs: torch.nn.Module, recipe: Path, warmup_steps: int, steps: int, loss_of: Callable[[int], torch.Tensor]
) -> list[float]:
    """Of a plain loop with torch's optimizer and transformers' schedule, set up as the recipe says."""
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    settings = load_recipe(recipe).recipe.training
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(settings.scheduler, optimizer, warmup_steps, steps)
    found = []
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def start_as_ours(theirs: peft.PeftModel, recipe: Path, folder: Path) -> None:
    """The adapter and the head of a run without a step: its first rate is 0, so one step changes nothing."""
    train_verb(load_recipe(recipe, [f"output.dir={folder / 'start'}", "training.max_steps=1"]), False, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = peft.load_peft_weights(str(folder / "start" / "adapter"))
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key or "modules_to_save" in key]


def test_peft_reads_the_folder_and_its_own_is_read(base: Path, tmp_path: Path) -> None:
    run = train(write_recipe(tmp_path, base))
    loaded = load_target(find_target(str(run), None, []), CPU)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, str(run / "adapter")).eval()
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(loaded.model.base.family.logits(loaded.model.base.net, {"input_ids": ids}), expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_target(find_target(str(tmp_path / "theirs"), str(base), ["model.dtype=float32"]), CPU)
    assert again.objective.facts["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    with torch.no_grad():
        torch.testing.assert_close(again.model.base.family.logits(again.model.base.net, {"input_ids": ids}), expected)


@pytest.mark.sampled(1)
def test_a_resumed_run_is_the_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    check_a_resume(write_recipe(tmp_path, base, adapter={"dropout": 0.1}, training={"save_steps": 5}))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", [["training.loraplus_ratio=4"], ["adapter.method=full", "~adapter.r"]])
def test_the_head_has_a_rate_of_its_own(method: list[str], bert: Path, tmp_path: Path) -> None:
    """AdamW's first step moves a weight by its rate, whatever the ratio of LoRA+; a rate of 0 moves nothing."""
    step = {"epochs": None, "max_steps": 1, "warmup_steps": 0, "scheduler": "constant"}

    def state(rate: float, head_rate: float | None) -> dict[str, torch.Tensor]:
        rates = {"learning_rate": rate, "head_learning_rate": head_rate}
        run = train(write_recipe(tmp_path / f"{rate} {head_rate}", bert, training={**step, **rates}), *method)
        [file] = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
        return load_file(file)

    still, head, others, both = state(0.0, None), state(0.0, 0.01), state(0.01, 0.0), state(0.01, None)
    for name, first in still.items():
        is_head = "classifier." in name
        moved = (head if is_head else others)[name] - first
        assert torch.equal((others if is_head else head)[name], first), name
        assert torch.equal(both[name] - first, moved), name
        if is_head:
            assert float(moved.abs().max()) == pytest.approx(0.01, rel=1e-3)
    assert any(not torch.equal(others[name], first) for name, first in still.items())


def test_the_rate_of_the_head_is_refused_without_a_head_and_on_resume(bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, training={"epochs": 1, "head_learning_rate": 0.02})
    with pytest.raises(
        RecipeError, match=r"recipe.yaml:1: training.head_learning_rate: is 0.02, but sft trains no head"
    ):
        validate(str(recipe), ["objective=sft"])
    run = train(recipe, "training.save_steps=3")
    whole = tensors_of(run)
    lose_the_end(run)
    with pytest.raises(RunFolderError, match=r"training\.head_learning_rate"):
        train(recipe, "training.save_steps=3", "training.head_learning_rate=0.01", resume=True)
    assert tensors_of(train(recipe, "training.save_steps=3", resume=True)) == whole


def test_the_batch_size_is_a_memory_knob(base: Path, tmp_path: Path) -> None:
    one = train(write_recipe(tmp_path / "one", base, training={"learning_rate": 2e-3}))
    changed = {"learning_rate": 2e-3, "micro_batch_size": 2, "gradient_accumulation_steps": 3}
    other = train(write_recipe(tmp_path / "other", base, training=changed))
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)


@pytest.mark.drawn
def test_a_decoder_streamed_is_the_resident_run_and_packed_nearly(llama: Path, tmp_path: Path) -> None:
    plain = train(write_recipe(tmp_path / "plain", llama))
    streamed = train(write_recipe(tmp_path / "streamed", llama, memory={"streaming": "disk"}))
    assert tensors_of(streamed) == tensors_of(plain)
    plan, _ = make_plan(load_recipe(write_recipe(tmp_path / "packed", llama, data={"packing": True})), device=CPU)
    assert not plan.refusals
    packed = train(write_recipe(tmp_path / "packed", llama, data={"packing": True}))
    assert losses(packed)[-1] < losses(packed)[0]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("quantization", ["nf4", "int8_weight_only"])
def test_a_quantized_base_keeps_its_head_whole(base: Path, tmp_path: Path, quantization: str) -> None:
    run = train(write_recipe(tmp_path, base, model={"quantization": quantization}, training={"epochs": 8}))
    assert losses(run)[-1] < 0.5 * losses(run)[0]


def test_a_cut_text_keeps_the_token_that_ends_it(t5: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        t5,
        data={"max_length": 8, "excess_length": "truncate"},
        evaluation={"metrics": ["exact_match"]},
        training={"epochs": 1},
    )
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    assert plan.peak_bytes.activations > 0, "what the head reads is simulated"
    rows, tokenizer = prepared.rows.train, AutoTokenizer.from_pretrained(t5)
    for index, (text, _) in enumerate(texts(42)):
        expected = tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert rows[index].parts["ids"].tolist() == expected
    filled = prepared.rows.objective.rows.fill(iter([rows[0]]), 30, 0)[0].parts["ids"]
    assert (filled == 2).tolist() == [False] * 29 + [True]
    loaded = load_target(find_target(str(train(recipe)), None, []), CPU)
    kind = loaded.objective.rows.with_options(EncodeOptions(max_length=8, excess_length="truncate"))
    assert kind.question("good so so so") == kind.question("good so") == tokenizer("good so")["input_ids"]


def test_texts_to_answer_are_cut_as_rows_are_or_refused(bert: Path, tmp_path: Path) -> None:
    cut = {"max_length": 64, "excess_length": "truncate"}
    recipe = write_recipe(tmp_path, bert, data=cut, evaluation={"metrics": ["exact_match"]}, training={"epochs": 1})
    with (tmp_path / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "so " * 300, "label": "yes"}) + "\n")
    loaded = load_target(find_target(str(train(recipe)), None, []), CPU)
    assert answer(loaded, ["so " * 300]) == answer(loaded, [("so " * 300)[:64]])
    loaded = load_target(find_target(str(write_recipe(tmp_path, bert)), None, []), CPU)
    with pytest.raises(DataError, match="prompt 1 has 900 tokens, too many for the model's 512 positions"):
        answer(loaded, ["so " * 300])


def test_labels_of_a_stream_are_listed_and_others_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.data.encoding.sample.SAMPLE_ROWS", 10)
    streamed: dict[str, Any] = {"data": {"train": [{"path": "train.jsonl", "streaming": True}]}}
    steps = {"training": {"max_steps": 1, "epochs": None}}
    with pytest.raises(RecipeError, match=r"objective\.labels"):
        make_plan(load_recipe(write_recipe(tmp_path, llama, **streamed, **steps)), device=CPU)
    listed = {"objective": {"method": "classify", "labels": ["yes", "no", "perhaps"]}}
    recipe = write_recipe(tmp_path, llama, **streamed, **steps, **listed)
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "late", "label": "never"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl.*43.*the label 'never' is not among the labels"):
        train(recipe)


@pytest.mark.drawn
def test_virtual_tokens_before_padded_rows_of_a_decoder(llama: Path, tmp_path: Path) -> None:
    def run(name: str, rows: int, steps: int) -> list[float]:
        sizes = {"learning_rate": 2e-3, "epochs": 1, "micro_batch_size": rows, "gradient_accumulation_steps": steps}
        recipe = write_recipe(tmp_path / name, llama, training=sizes)
        values = json.loads(recipe.read_text("utf-8")) | {"adapter": {"method": "prompt", "num_virtual_tokens": 3}}
        recipe.write_text(json.dumps(values), encoding="utf-8")
        return losses(train(recipe))

    assert run("padded", 6, 1) == pytest.approx(run("alone", 1, 6), rel=1e-5)


def test_metrics_are_scikit_learns() -> None:
    counts = [[5.0, 7.0, 6.0], [3.0, 4.0, 5.0], [0.0, 0.0, 0.0]]  # right, predicted, there
    assert accuracy.from_sums({"labelled": [8.0, 11.0]}) == pytest.approx(8 / 11)
    first, second = 2 * 5 / (6 + 7), 2 * 3 / (5 + 4)
    assert macro_f1.from_sums({"label_counts": counts}) == pytest.approx((first + second) / 2)
    assert micro_f1.from_sums({"label_counts": counts}) == pytest.approx(8 / 11), "of one label a row, the accuracy"
    assert macro_f1.from_sums({"label_counts": [[0.0, 0.0, 0.0]]}) == 0.0
    with pytest.raises(ValueError, match="no labelled rows"):
        accuracy.from_sums({"labelled": [0.0, 0.0]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"method": "classify", "labels": ["yes", "no"]}}, "the label 'perhaps' is not among the labels"),
        ({"data": {"excess_length": "split"}}, "data.excess_length: a text is not split, because its label"),
        ({"adapter": {"method": "bitfit", "r": None}}, "bitfit"),
        ({"evaluation": {"metrics": ["token_f1"]}}, None),
        (
            {"objective": "sft", "evaluation": {"metrics": ["macro_f1"]}},
            "objective sft has no metric macro_f1; its metrics are ",
        ),
        ({"data": {"train": [{"path": "train.jsonl", "format": "chat"}]}}, "does not learn from the format 'chat'"),
    ],
)
def test_what_cannot_be_is_said(llama: Path, tmp_path: Path, changes: dict[str, Any], said: str | None) -> None:
    if changes.get("adapter"):
        changes = {**changes, "adapter": {"method": "bitfit"}}
    recipe = write_recipe(tmp_path, llama, **changes)
    if "adapter" in changes:
        values = json.loads(recipe.read_text("utf-8"))
        values["adapter"] = changes["adapter"]
        recipe.write_text(json.dumps(values), encoding="utf-8")
    if said is None:
        load_recipe(recipe)
        return
    with pytest.raises(TunekitError, match=said.replace(".", r"\.").replace("[", r"\[")):
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])


def classifier(folder: Path, bert: Path, *names: str) -> Path:
    """A base with a trained head of three rows."""
    config = BertConfig.from_pretrained(bert, num_labels=3)
    if names:
        config.id2label, config.label2id = dict(enumerate(names)), {name: row for row, name in enumerate(names)}
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "listed", "order", "kept"),
    [
        (("yes", "no", "perhaps"), (), ("yes", "no", "perhaps"), True),
        (("yes", "no", "maybe"), (), ("no", "perhaps", "yes"), False),
        ((), ("perhaps", "yes", "no"), ("perhaps", "yes", "no"), True),
        ((), (), ("no", "perhaps", "yes"), False),
    ],
)
def test_a_trained_head_keeps_its_labels_or_is_replaced(
    bert: Path, tmp_path: Path, names: tuple[str, ...], listed: tuple[str, ...], order: tuple[str, ...], kept: bool
) -> None:
    base = classifier(tmp_path / "base", bert, *names)
    recipe = write_recipe(tmp_path, base, objective={"method": "classify", "labels": listed})
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    assert prepared.rows.objective.facts["labels"] == list(order)
    head = load_model(prepared.model, device=CPU).net.get_submodule("classifier").weight
    stored = BertForSequenceClassification.from_pretrained(base).classifier.weight
    assert torch.equal(head, stored) == kept
    assert any("the base's head" in note for note in plan.notes) != kept


def test_a_recipe_cannot_reorder_the_rows_of_a_trained_head(bert: Path, tmp_path: Path) -> None:
    base = classifier(tmp_path / "base", bert, "yes", "no", "perhaps")
    recipe = write_recipe(tmp_path, base, objective={"method": "classify", "labels": ["no", "yes", "perhaps"]})
    with pytest.raises(TunekitError, match=r"objective\.labels: the base's head has the labels yes, no, perhaps"):
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])


def test_labels_go_with_the_adapter(bert: Path, tmp_path: Path) -> None:
    labels = ["perhaps", "yes", "no"]
    listed = {"method": "classify", "labels": labels}
    once = {"epochs": None, "max_steps": 1}
    folder = train(write_recipe(tmp_path, bert, objective=listed, training=once)) / "adapter"
    # Continued: the folder's order, or none.
    start = {"init_from": str(folder)}
    _, prepared = make_plan(load_recipe(write_recipe(tmp_path / "same", bert, adapter=start)), device=CPU)
    assert prepared.rows.objective.facts["labels"] == labels
    other = {"method": "classify", "labels": sorted(labels)}
    recipe = write_recipe(tmp_path / "other", bert, adapter=start, objective=other)
    with pytest.raises(TunekitError, match=r"objective\.labels: .* has the labels perhaps, yes, no, in this order"):
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])
    recipe = write_recipe(tmp_path / "more", bert, adapter=start)
    with (tmp_path / "more" / "train.jsonl").open("a") as file:
        file.write('{"text": "new", "label": "new"}\n')
    with pytest.raises(TunekitError, match="the label 'new' is not among the labels"):
        raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0])
    # Combined and converted.
    again, changed = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("again", "changed"))
    facts = json.loads((changed / "tunekit.json").read_text("utf-8"))
    facts["objective"]["labels"] = sorted(labels)
    (changed / "tunekit.json").write_text(json.dumps(facts), encoding="utf-8")
    combine_verb([str(folder), str(again)], None, "linear", None, None, None, None, None, str(tmp_path / "combined"))
    convert_verb(str(folder), 2, None, None, str(tmp_path / "converted"))
    for name in ("combined", "converted"):
        assert read_adapter_config(tmp_path / name).objective == {"method": "classify", "labels": labels}
    with pytest.raises(TunekitError, match="combine only adapters with the same labels"):
        combine_verb([str(folder), str(changed)], None, "linear", None, None, None, None, None, str(tmp_path / "no"))
    # Without our file: the base's names for as many rows.
    (folder / "tunekit.json").unlink()
    base = classifier(tmp_path / "base", bert, "a", "c", "b")
    assert head_facts(read_adapter_config(folder), ModelSection(name_or_path=str(base)))["labels"] == ("a", "c", "b")


def rows_of(*labels: str, file: str = "file") -> Any:
    parts = [{"ids": np.array([1]), "label": np.frombuffer(label.encode(), np.uint8)} for label in labels]
    return [Row(part, (1,), 1, f"{file}:1") for part in parts]


def test_labels_have_one_order_and_those_never_taught_are_told(tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    bare = make_objective(ClassifySettings(), tokenizer)
    order = ["-2", "01", "2", "10", "--5", "b", "\u00b2"]
    for labels in (order, order[::-1]):
        assert bare.learn([rows_of(*labels)]).facts["labels"] == order
    few, held = rows_of("a", "b", "b"), rows_of("a", "c", file="test")
    assert bare.learn([few, held[:1]]).notes == (
        "always answering 'b', the most frequent label, has an eval.accuracy of 0",
        "the label 'a' has only one training row",
    )
    with pytest.raises(
        TunekitError, match=r"test:1: the label 'c' is in no row of data\.train; add rows with this"
    ) as caught:
        bare.learn([few, held])
    assert caught.value.exit_code == 2
    for known in (
        make_objective(ClassifySettings(), tokenizer, {"labels": ["a", "b", "c"]}),
        make_objective(ClassifySettings(), tokenizer, {"head": "abc"}),
    ):
        assert known.learn([few, held]).notes[1] == "the label 'c' occurs only in the evaluation rows"
    answering: Any = bare.learn([rows_of("a", "b")]).answering
    with pytest.raises(InputError, match="a text is empty"):
        answering.write(None, [[5], []], AnswerLimits(max_new_tokens=1, batch_size=1))


def test_listed_labels_are_read_as_those_of_the_rows(bert: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, bert, objective={"method": "classify", "labels": [10, " 2 "]})
    settings = load_recipe(recipe).recipe.objective
    assert isinstance(settings, ClassifySettings)
    assert settings.labels == ("10", "2")
    recipe = write_recipe(tmp_path, bert, objective={"method": "classify", "labels": ["mid", "zeta", "mid"]})
    with pytest.raises(TunekitError, match=r"recipe\.yaml:1.*objective\.labels.*'mid' twice"):
        load_recipe(recipe)


@pytest.mark.parametrize("stored", [("a", "b"), ("a", "b", "c", "d")])
def test_a_kept_head_of_another_width_names_the_tensor_and_the_file(
    bert: Path, tmp_path: Path, stored: tuple[str, ...]
) -> None:
    """Else the head would be drawn at random, although the recipe keeps it."""
    base, names = classifier(tmp_path / "base", bert, *stored), ("yes", "no", "perhaps")
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: row for row, name in enumerate(names)}}
    (base / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path, base)
    wrong = (
        rf"base/model\.safetensors: model\.name_or_path: the tensor classifier\.(weight|bias) has the shape "
        rf"\[{len(stored)}.*\], but config\.json declares \[3.*; use the config\.json that belongs to these weights"
    )
    with pytest.raises(TunekitError, match=wrong):
        make_plan(load_recipe(recipe), device=CPU)
    with pytest.raises(TunekitError, match=wrong):
        evaluate_verb(str(base), None, str(tmp_path / "train.jsonl"), None, [], None, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deberta_computes_in_float32_only(
    bert: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers made some of its biases in float32 until 5.25, and multiplied them with 16-bit numbers."""
    make = DisentangledSelfAttention.__init__

    def make_older(module: nn.Module, config: DebertaConfig) -> None:
        make(module, config)
        for name in ("q_bias", "v_bias"):
            setattr(module, name, nn.Parameter(getattr(module, name).float()))

    monkeypatch.setattr(DisentangledSelfAttention, "__init__", make_older)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = DebertaConfig(vocab_size=len(tokenizer), relative_attention=True, pos_att_type=["c2p", "p2c"], **sizes)
    DebertaModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    training = {"max_steps": 1, "epochs": None, "warmup_steps": 0}
    recipe = write_recipe(tmp_path, tmp_path / "base", model={"dtype": dtype}, training=training)
    if dtype == "float32":
        train(recipe)
        return
    with pytest.raises(
        TunekitError, match=r"model\.dtype: the code of Deberta\S+ mixes float32 .*; write model\.dtype: float32"
    ):
        train(recipe)
