"""Pairs of texts with a label: encoded, trained, merged and answered as transformers and peft do it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AlbertTokenizer,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    DistilBertTokenizer,
    MPNetTokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

from tests.conftest import write_tiny_llama
from tests.objectives.test_classifier_table import DEBERTA_2, DROPOUT, ROBERTA, SIZES
from tests.objectives.test_classify import losses_of, start_as_ours, write_recipe
from tests.support.classifier_case import check_each_reads_the_other
from tests.support.data_case import tokenizer_of
from tests.support.plans import make_plan
from tests.support.train_case import check_a_resume, losses, train
from tests.test_data_check import check
from tunekit.contracts import EncodeOptions, Row
from tunekit.data.reading.first import choose_format
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.formats.label_pairs import NAMES, make_example
from tunekit.formats.labels import LabelExample
from tunekit.generate import answer, generate_verb, read_prompts
from tunekit.init import init_verb
from tunekit.merge import merge_verb
from tunekit.objectives.base import make_objective
from tunekit.objectives.rows.pairs import join_texts, sized_pair, types_of
from tunekit.preview import preview_verb
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.classify import ClassifySettings
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb

CPU = torch.device("cpu")
STEPS, ROWS, LABELS = 10, 6, ["no", "yes"]
WORDS = ("good", "bad", "odd", "so", "very", "Ünï", "x,y")
ONE_STEP = {"epochs": None, "max_steps": 1}
LETTERS = "abcdefghijklmnopqrstuvwxyzü"


@dataclass(frozen=True)
class Base:
    """A configuration with the tokenizer that its published models have; `new`: modules of its head that peft does not
    train without being told."""

    model_type: str
    tokenizer: str
    values: dict[str, Any]
    new: tuple[str, ...] = ()


BASES = {
    "bert": Base("bert", "bert", SIZES | DROPOUT),
    "electra": Base("electra", "bert", SIZES | DROPOUT | {"embedding_size": 16}),
    "distilbert": Base(
        "distilbert",
        "distilbert",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    ),
    "roberta": Base("roberta", "roberta", SIZES | DROPOUT | ROBERTA),
    "mpnet": Base("mpnet", "mpnet", SIZES | DROPOUT),
    "deberta": Base("deberta-v2", "deberta-v2", SIZES | DROPOUT | DEBERTA_2 | {"type_vocab_size": 2}, ("pooler",)),
    "albert": Base("albert", "albert", SIZES | DROPOUT | {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "t5": Base(
        "t5",
        "t5",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "classifier_dropout": 0.0},
        ("classification_head",),
    ),
    "llama": Base("llama", "llama", SIZES | {"num_key_value_heads": 2}),
}


def pieces(*special: str) -> list[str]:
    """A vocabulary of WordPiece."""
    return [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), ",", *WORDS[:5]]


def scored(*special: str) -> list[tuple[str, float]]:
    """A vocabulary of Unigram."""
    return [(piece, 0.0) for piece in special] + [(piece, -2.0) for piece in ("▁", *LETTERS, "Ü", ",")]


def make_tokenizers(folder: Path) -> dict[str, Path]:
    """Tiny tokenizers of the classes that published models have, each saved in a folder."""
    bert = {word: number for number, word in enumerate(pieces("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    mpnet = {word: number for number, word in enumerate(pieces("<s>", "<pad>", "</s>", "[UNK]", "<mask>"))}
    letters = {
        word: number for number, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *LETTERS, "Ġ", ",", "Ã", "<mask>"))
    }
    made = {
        "bert": BertTokenizer(vocab=bert),
        "distilbert": DistilBertTokenizer(vocab=bert),
        "roberta": RobertaTokenizer(vocab=letters, merges=[]),
        "mpnet": MPNetTokenizer(vocab=mpnet),
        "deberta-v2": DebertaV2Tokenizer(vocab=scored("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")),
        "albert": AlbertTokenizer(vocab=scored("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
        "t5": T5Tokenizer(vocab=scored("<pad>", "</s>", "<unk>"), extra_ids=0),
    }
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(folder / name)
    write_tiny_llama(folder / "llama")
    return {name: folder / name for name in (*made, "llama")}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def bases(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for name, base in BASES.items():
        tokenizer = AutoTokenizer.from_pretrained(tokenizers[base.tokenizer])
        torch.manual_seed(0)
        config = CONFIG_MAPPING[base.model_type](vocab_size=len(tokenizer) + 5, **base.values)
        kind = "T5ForConditionalGeneration" if name == "t5" else f"{type(config).__name__.removesuffix('Config')}Model"
        getattr(transformers, kind)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in BASES}


def pairs(count: int) -> list[tuple[str, str, str]]:
    """Pairs of different lengths; the first word of the second text decides the label."""
    draw, found = random.Random(0), []
    for number in range(count):
        first, second = draw.choice(WORDS[:3]), WORDS[number % 2]
        sides = [f"{word}{' so' * draw.randrange(6)}" for word in (first, second)]
        found.append((sides[0], sides[1], LABELS[number % 2]))
    return found


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_pairs(folder: Path, base: Path, names: tuple[str, str] = ("sentence1", "sentence2"), **sections: Any) -> Path:
    recipe = write_recipe(folder, base, **sections)
    for name, count in (("train", 42), ("test", 12)):
        rows = ({names[0]: first, names[1]: second, "label": label} for first, second, label in pairs(count))
        write_rows(folder / f"{name}.jsonl", rows)
    return recipe


def recipe_of(folder: Path, base: Path, method: str) -> Path:
    training = {"learning_rate": 2e-3, "epochs": None, "max_steps": STEPS, "eval_steps": 100}
    path = write_pairs(folder, base, data={"shuffle": False}, training=training)
    adapter = {"method": method} | ({} if method == "full" else {"r": 4})
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"adapter": adapter}), encoding="utf-8")
    return path


def inputs_of(tokenizer: Any, first: str, second: str) -> dict[str, Tensor]:
    """What a user of transformers calls a classifier with."""
    return dict(tokenizer(first, second, return_tensors="pt"))


@torch.no_grad()
def logits_of(net: Any, tokenizer: Any) -> Tensor:
    return torch.cat([net(**inputs_of(tokenizer, *pair)).logits for *pair, _ in pairs(ROWS)])


@torch.no_grad()
def our_logits(target: Path, base: Path | None) -> Tensor:
    """Of rows as we encode and collate them, one by one and padded in one batch."""
    loaded = load_target(find_target(str(target), None if base is None else str(base), ["model.dtype=float32"]), CPU)
    rows = loaded.objective.with_options(EncodeOptions(max_length=64)).rows
    encoded = [rows.unlabelled(loaded.model, [rows.question_of_pair(*pair)])[0] for *pair, _ in pairs(ROWS)]
    family, net = loaded.model.base.family, loaded.model.base.net
    alone = torch.cat([family.logits(net, rows.collate([[row]]).inputs) for row in encoded])
    padded = family.logits(net, rows.collate([[row] for row in encoded]).inputs)
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)
    return alone


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "mpnet", "deberta-v2", "albert", "t5", "llama"])
def test_ids_and_types_of_every_length_are_those_of_transformers(name: str, tokenizers: dict[str, Path]) -> None:
    theirs, ours, draw = (
        AutoTokenizer.from_pretrained(tokenizers[name]),
        tokenizer_of(tokenizers[name]),
        random.Random(0),
    )
    for _ in range(12):
        first, second = (" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in range(2))
        pair = join_texts(ours, first, second)
        for size in range(theirs.num_special_tokens_to_add(pair=True), len(pair) + 1):
            cut = sized_pair(ours.pairing, pair, size)
            expected = theirs(first, second, truncation="longest_first", max_length=size)
            assert list(cut) == expected["input_ids"]
            assert types_of(ours.pairing, cut).tolist() == expected.get("token_type_ids", [0] * size)
            assert ("token_type_ids" in expected) == bool(ours.pairing.types)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ten_steps_and_the_result_are_those_of_transformers_and_peft(
    method: str, name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, tokenizer = bases[name], AutoTokenizer.from_pretrained(bases[name])
    recipe = recipe_of(tmp_path, base, method)
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    run = train(recipe)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, dtype=torch.float32, pad_token_id=prepared.processor.tokenizer.pad_id
    )
    if method == "lora":
        theirs = peft.get_peft_model(
            theirs,
            peft.LoraConfig(
                r=4,
                lora_alpha=32,
                target_modules=[target.name for target in plan.targets],
                task_type="SEQ_CLS",
                modules_to_save=list(BASES[name].new) or None,
            ),
        )
        start_as_ours(theirs, recipe, tmp_path)
    else:
        start = load_recipe(recipe, [f"output.dir={tmp_path / 'start'}", "training.max_steps=1"])
        train_verb(start, False, False)
        theirs = classifier_of(tmp_path / "start" / "model")
    rows = pairs(42)

    def loss_of(step: int) -> Tensor:
        batch = rows[step % 7 * ROWS : step % 7 * ROWS + ROWS]
        found = [theirs(**inputs_of(tokenizer, first, second)).logits for first, second, _ in batch]
        labels = torch.tensor([LABELS.index(label) for *_, label in batch])
        return torch.nn.functional.cross_entropy(torch.cat(found), labels)

    expected_losses, first = losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), STEPS // 2
    assert losses(run)[:first] == pytest.approx(expected_losses[:first], abs=2e-5)
    # Adam moves a weight whose gradient is almost 0 by the whole rate, in a direction that rounding can decide
    assert losses(run) == pytest.approx(expected_losses, abs=1e-4)
    if method == "full":
        written = run / "model"
        expected = logits_of(classifier_of(written), tokenizer)
        torch.testing.assert_close(our_logits(written, None), expected, atol=1e-5, rtol=1e-5)
        return
    merged = check_each_reads_the_other(
        theirs,
        run,
        base,
        tmp_path,
        partial(classifier_of, num_labels=2),
        ours=lambda adapter: our_logits(adapter, base),
        logits=lambda net: logits_of(net, tokenizer),
    )
    assert AutoTokenizer.from_pretrained(merged)("good", "bad") == tokenizer("good", "bad")


def classifier_of(folder: Path, **head: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **head).eval()


def encoded(tokenizer: Path, *rows: dict[str, Any], **options: Any) -> list[Row]:
    """Rows of one file, as a run encodes them."""
    objective = make_objective(ClassifySettings(), tokenizer_of(tokenizer))
    kind = objective.with_options(EncodeOptions(**{"max_length": 64, "excess_length": "truncate"} | options)).rows
    return [kind.encode(make_example(row), "train.jsonl:1") for row in rows]


@pytest.mark.parametrize("names", [*NAMES, ("sentence1", "sentence2")])
def test_columns_have_the_usual_names(names: tuple[str, str], tokenizers: dict[str, Path]) -> None:
    row = {names[1]: "bad", names[0]: "good so", "label": 1, "idx": 7}
    assert choose_format("auto", row, "label") == (
        "label_pairs",
        f"the first row has '{names[0]}' and '{names[1]}' and 'label'",
    )
    assert make_example(row) == LabelExample("good so", "1", "bad")
    (ours,) = encoded(tokenizers["bert"], row)
    theirs = AutoTokenizer.from_pretrained(tokenizers["bert"])("good so", "bad")
    assert ours.parts["ids"].tolist() == theirs["input_ids"]


@pytest.mark.parametrize("others", [{"title": "bad"}, {"sentence": "bad"}, {"question": "a", "sentence": "bad"}])
def test_a_text_alone_is_no_pair(others: dict[str, str]) -> None:
    assert choose_format("auto", {"text": "good", "label": "yes", **others}, "label")[0] == "labels"


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"question": "good so", "sentence": "bad", "label": "entailment"}, "entailment"),  # QNLI
        ({"sentence1": "good so", "sentence2": "bad", "gold_label": "neutral", "label1": "x"}, "neutral"),  # SNLI
        ({"question1": "good so", "question2": "bad", "is_duplicate": 1}, "1"),  # QQP
        ({"sentence1": "good so", "sentence2": "bad", "score": 3.8}, 3.8),  # STS-B
        ({"score": 0.9, "premise": "good so", "hypothesis": "bad", "category": "yes", "question": "which?"}, "yes"),
    ],
)
def test_columns_of_published_sets_have_their_names(row: dict[str, Any], label: str | float) -> None:
    assert make_example(row) == LabelExample("good so", label, "bad")
    name, reason = choose_format("auto", row, "label")
    read = next(key for key in row if row[key] == label or str(row[key]) == label)
    assert (name, f"'{read}'" in reason) == ("label_pairs", True)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
@pytest.mark.parametrize("first", ["text", "pair"])
def test_single_texts_and_pairs_in_one_run_are_refused(
    first: str, problem_type: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    sources = [{"path": "train.jsonl"}, {"path": "texts.jsonl"}]
    data = {"train": sources if first == "pair" else sources[::-1], "eval": None}
    recipe = write_pairs(
        tmp_path, bases["t5"], data=data, objective={"method": "classify", "problem_type": problem_type}
    )
    write_rows(tmp_path / "texts.jsonl", [{"text": "good", "label": 1}, {"text": "bad", "label": 2}])
    write_rows(tmp_path / "train.jsonl", [{"sentence1": "so", "sentence2": "bad", "label": 2}])
    with pytest.raises(TunekitError) as refused:
        make_plan(load_recipe(recipe), device=CPU)
    (problem,) = refused.value.problems
    names = ("train.jsonl", "texts.jsonl") if first == "pair" else ("texts.jsonl", "train.jsonl")
    assert (problem.file, problem.line) == (names[1], 1)
    wrong, others = ("one text", "a pair of texts") if first == "pair" else ("a pair of texts", "one text")
    assert problem.what == f"the row is {wrong}, but the first row ({names[0]}:1) is {others}"


def test_a_text_in_a_stream_of_pairs_is_refused(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.data.encoding.sample.SAMPLE_ROWS", 10)
    streamed = {"train": [{"path": "train.jsonl", "format": "label_pairs", "streaming": True}], "eval": "texts.jsonl"}
    objective = {"method": "classify", "labels": LABELS}
    recipe = write_pairs(tmp_path, bases["bert"], data=streamed, objective=objective, training=ONE_STEP)
    write_rows(tmp_path / "texts.jsonl", [{"text": "good", "label": "yes"}])
    with pytest.raises(TunekitError, match=r"texts\.jsonl:1: the row is one text, but each row that the model learns"):
        make_plan(load_recipe(recipe), device=CPU)


@pytest.mark.drawn
def test_report_and_merged_folder_show_that_rows_are_pairs(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(write_pairs(tmp_path, bases["bert"], training=ONE_STEP))
    worst = json.loads((run / "evaluation_rows.json").read_text("utf-8"))["worst"][0]["text"]
    titles = [text for text, _ in worst[::2]]
    assert titles[0].endswith("; first text, token type 0\n")
    assert titles[1] == "\nsecond text, token type 1\n"
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), None, None, [])
    note = json.loads((tmp_path / "merged" / "merge_report.json").read_text("utf-8"))["note"]
    assert note.startswith("this model reads pairs of texts: pass both to the tokenizer")
    assert note in " ".join(capsys.readouterr().err.split())


def test_a_single_prompt_to_a_model_of_pairs_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    run = train(write_pairs(tmp_path, bases["bert"], training=ONE_STEP))
    for target, base in ((run, None), (run / "adapter", str(bases["bert"]))):
        with pytest.raises(TunekitError, match=r"trained on pairs of texts.*--prompts FILE\.jsonl"):
            generate_verb(str(target), base, ["good"], None, [])
    write_rows(tmp_path / "texts.jsonl", [{"text": "good", "label": "yes"}])
    with pytest.raises(TunekitError, match=r"texts\.jsonl:1: the row is one text, but each row that the model learns"):
        evaluate_verb(str(run), None, str(tmp_path / "texts.jsonl"), None, [], None, [])


@pytest.mark.drawn
def test_init_writes_a_length_for_which_the_model_has_positions(bases: dict[str, Path], tmp_path: Path) -> None:
    words = [*range(2, 20), 80, 81]  # the last rows have more than 512 tokens
    rows = [{"sentence1": "good so " * many, "sentence2": "bad", "label": many % 2} for many in words]
    write_rows(tmp_path / "train.jsonl", rows)
    init_verb(str(tmp_path / "train.jsonl"), str(tmp_path / "new.yaml"), str(bases["roberta"]), None, "none", None)
    assert "max_length: 512 " in (tmp_path / "new.yaml").read_text("utf-8")
    assert not make_plan(load_recipe(tmp_path / "new.yaml"), device=CPU)[0].refusals


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"sentence1": "good", "sentence2": " ", "label": "yes"}, "'sentence2' is empty, and a pair needs two texts"),
        ({"premise": "", "hypothesis": "bad", "label": "yes"}, "'premise' is empty, and a pair needs two texts"),
        ({"sentence1": "good", "sentence2": None, "label": "yes"}, "'sentence2' must be text, not null"),
        ({"sentence1": "good", "label": "yes"}, "no field 'sentence2'; this row has 'sentence1', 'label'"),
        ({"text": "a", "premise": "b", "sentence2": "c", "label": "x"}, "'text' and 'premise' could both be sentence1"),
        ({"sentence1": "good", "sentence2": "bad", "label": -1}, "the label is -1; in files of GLUE, this means"),
        ({"sentence1": "good", "sentence2": "bad", "gold_label": "-"}, "the label is -; in files of SNLI, this means"),
    ],
)
def test_a_pair_that_is_none_is_refused_with_its_line(
    row: dict[str, Any], what: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_pairs(tmp_path, bases["bert"])
    lines = (tmp_path / "train.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:3], json.dumps(row), *lines[3:]]), encoding="utf-8")
    with pytest.raises(TunekitError) as refused:
        make_plan(load_recipe(recipe), device=CPU)
    (problem,) = refused.value.problems
    assert what in problem.what
    assert (problem.file, problem.line) == (str(tmp_path / "train.jsonl"), 4)
    assert problem.how


def test_minus_one_may_be_listed_as_a_class(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_pairs(tmp_path, bases["bert"], objective={"method": "classify", "labels": ["-1", "1"]})
    for name in ("train", "test"):
        rows = [
            {"sentence1": "good", "sentence2": f"bad{' so' * number}", "label": number % 2 * 2 - 1}
            for number in range(6)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    assert not make_plan(load_recipe(recipe), device=CPU)[0].refusals


def test_long_pairs_are_cut_dropped_or_errors(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_pairs(tmp_path, bases["bert"])
    lengths = [len(AutoTokenizer.from_pretrained(bases["bert"])(*pair)["input_ids"]) for *pair, _ in pairs(42)]
    longer = sum(length > 9 for length in lengths)
    assert 0 < longer < 42
    short = ["data.max_length=9"]
    rows = make_plan(load_recipe(recipe, [*short, "data.excess_length=truncate"]), device=CPU)[1].rows
    assert (rows.counts.truncated, rows.counts.dropped) == (longer, 0)
    theirs = AutoTokenizer.from_pretrained(bases["bert"])
    for index, (first, second, _) in enumerate(pairs(42)):
        expected = theirs(first, second, truncation="longest_first", max_length=9)
        batch = rows.objective.rows.collate([[rows.train[index]]])
        assert batch.inputs["input_ids"].tolist() == [expected["input_ids"]]
        assert batch.inputs["token_type_ids"].tolist() == [expected["token_type_ids"]]
    assert make_plan(load_recipe(recipe, short), device=CPU)[1].rows.counts.dropped == longer
    with pytest.raises(TunekitError, match=r"tokens, but data\.max_length is 9"):
        make_plan(load_recipe(recipe, [*short, "data.excess_length=error"]), device=CPU)
    with pytest.raises(TunekitError, match="its label may be wrong for a piece of the text"):
        make_plan(load_recipe(recipe, [*short, "data.excess_length=split"]), device=CPU)


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("names", "columns"), [(("sentence1", "sentence2"), {}), (("a", "b"), {"a": "sentence1", "b": "sentence2"})]
)
def test_every_verb_takes_pairs(
    names: tuple[str, str],
    columns: dict[str, str],
    bases: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def source(name: str) -> dict[str, Any]:
        return {"path": f"{name}.jsonl", "columns": columns}

    data = {"train": [source("train")], "eval": [source("test")]}
    training = {"epochs": 15, "learning_rate": 2e-3}
    recipe = write_pairs(tmp_path, bases["bert"], names, data=data, training=training)
    preview_verb(load_recipe(recipe), 1, str(tmp_path / "preview.html"))
    shown = capfd.readouterr().out + (tmp_path / "preview.html").read_text("utf-8")
    for text in ("; first text, token type 0", "second text, token type 1"):
        assert shown.count(text) == 2
    run = train(recipe)
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "after.json"), [])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert (after["rows"], after["accuracy"]) == (12, 1.0)
    asked = [{"premise": first, "hypothesis": second} for first, second, _ in pairs(4)]
    write_rows(tmp_path / "asked.jsonl", asked)
    capfd.readouterr()
    generate_verb(str(run), None, None, str(tmp_path / "asked.jsonl"), [])
    replies = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert replies == [{"prompt": [first, second], "answer": label} for first, second, label in pairs(4)]
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    loaded = load_target(find_target(str(tmp_path / "merged"), None, []), CPU)
    assert answer(loaded, [(first, second) for first, second, _ in pairs(4)]) == [label for *_, label in pairs(4)]


def test_a_file_of_prompts_with_half_a_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"sentence1": "good", "sentence2": ""}\n', encoding="utf-8")
    with pytest.raises(TunekitError, match=r"asked\.jsonl:1: 'sentence2' is empty"):
        read_prompts(tmp_path / "asked.jsonl")
    (tmp_path / "asked.jsonl").write_text('{"sentence1": "good"}\n', encoding="utf-8")
    with pytest.raises(TunekitError, match=r"has no text under .prompt.*or for a pair"):
        read_prompts(tmp_path / "asked.jsonl")


def test_other_objectives_take_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"sentence1": "good", "sentence2": "bad"}\n', encoding="utf-8")
    with pytest.raises(TunekitError, match="some prompts are pairs of texts, but the target was trained with sft"):
        generate_verb(str(write_tiny_llama(tmp_path / "llama")), None, None, str(tmp_path / "asked.jsonl"), [])


@pytest.mark.drawn
def test_a_resumed_run_is_the_uninterrupted_one(bases: dict[str, Path], tmp_path: Path) -> None:
    check_a_resume(write_pairs(tmp_path, bases["bert"], training={"save_steps": 5}))


@pytest.mark.drawn
@pytest.mark.parametrize("packing", [False, True])
def test_rows_end_to_end_have_the_losses_of_rows_alone(packing: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    """A decoder reads the pairs of a micro-batch end to end, also streamed from the host."""
    training = {"epochs": None, "max_steps": 4, "learning_rate": 2e-3}
    recipe = write_pairs(tmp_path, bases["llama"], data={"packing": packing}, training=training)
    expected = losses(train(recipe))
    train(recipe, "memory.streaming=host", f"output.dir={tmp_path / 'streamed'}")
    assert losses(tmp_path / "streamed") == pytest.approx(expected, rel=1e-5)
    if not packing:
        alone = ["training.micro_batch_size=1", "training.gradient_accumulation_steps=6"]
        train(recipe, *alone, f"output.dir={tmp_path / 'alone'}")
        assert losses(tmp_path / "alone") == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_that_separates_nothing_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    plan, prepared = make_plan(load_recipe(write_pairs(tmp_path, bases["llama"])), device=CPU)
    notes = [note for note in plan.notes if "joined without a separator" in note]
    assert [note.partition(" of texts")[0] for note in notes] == [
        "warning: train.jsonl: 42 pairs",
        "warning: test.jsonl: 12 pairs",
    ]
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    first, second, _ = pairs(1)[0]
    assert prepared.rows.train[0].parts["ids"].tolist() == tokenizer(first, second)["input_ids"]


def test_a_decoder_s_template_for_pairs_is_followed(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["llama"])
    bos = tokenizer.bos_token
    special = [(bos, tokenizer.bos_token_id)]
    template = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), tokenizer_of(tmp_path)
    assert list(join_texts(ours, "good", "bad so")) == theirs("good", "bad so")["input_ids"]
    assert ours.pairing.between == (tokenizer.bos_token_id,)


def test_a_net_without_a_second_type_is_refused(
    tokenizers: dict[str, Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["roberta"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizers["bert"] / name, tmp_path / "base" / name)
    torch.manual_seed(0)
    made = CONFIG_MAPPING["roberta"](**{**config, "vocab_size": 80})
    transformers.RobertaModel(made).save_pretrained(tmp_path / "base")
    with pytest.raises(
        TunekitError, match="marks the second text of a pair by token type 1, but roberta has only token type 0"
    ):
        make_plan(load_recipe(write_pairs(tmp_path, tmp_path / "base")), device=CPU)


def test_init_writes_a_recipe_for_pairs(bases: dict[str, Path], tmp_path: Path) -> None:
    write_pairs(tmp_path, bases["bert"], ("premise", "hypothesis"))
    init_verb(str(tmp_path / "train.jsonl"), str(tmp_path / "new.yaml"), str(bases["bert"]), None, "none", None)
    text = (tmp_path / "new.yaml").read_text("utf-8")
    assert "objective: classify" in text
    assert "42 rows of format label_pairs (premise, hypothesis, label)" in text
    assert not make_plan(load_recipe(tmp_path / "new.yaml"), device=CPU)[0].refusals


def test_data_check_compares_both_texts(bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_pairs(tmp_path, bases["bert"], data={"max_length": 1024})
    premise = "the quick brown fox jumps over the lazy dog by the river " * 4
    first = "a fox that is both quick and brown jumps over some lazy dog near the old river bank in summer"
    rows = [
        {"sentence1": premise, "sentence2": "good", "label": "yes"},
        {
            "sentence1": premise,
            "sentence2": "the river is far away and no dog is there to be jumped over",
            "label": "no",
        },
        {"sentence1": premise, "sentence2": "good", "label": "no"},
        {"sentence1": "odd", "sentence2": "bad", "label": "yes"},
        {"sentence1": premise, "sentence2": first, "label": "yes"},
        {"sentence1": premise, "sentence2": f"{first} today", "label": "yes"},
        {"sentence1": first, "sentence2": premise, "label": "no"},
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", rows[3:4])
    findings = check(recipe)[1]["findings"]
    assert findings == {"contrary": [3], "leak": [4], "near": [6, 7]}, "a shared premise alone is no finding"


@pytest.mark.drawn
def test_pairs_may_have_a_number(bases: dict[str, Path], tmp_path: Path) -> None:
    """Semantic similarity (STS): ten steps of MSE as transformers computes it; -1 is a number like any other."""
    base, tokenizer = bases["bert"], AutoTokenizer.from_pretrained(bases["bert"])
    recipe = recipe_of(tmp_path, base, "lora")
    values = json.loads(recipe.read_text("utf-8")) | {"objective": {"method": "classify", "problem_type": "regression"}}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    numbers = [-1 if at == 0 else at % 11 / 2 for at in range(42)]
    for name, count in (("train", 42), ("test", 12)):
        rows = (
            {"sentence1": first, "sentence2": second, "label": number}
            for (first, second, _), number in zip(pairs(count), numbers[:count], strict=True)
        )
        write_rows(tmp_path / f"{name}.jsonl", rows)
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    run = train(recipe)
    net = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, problem_type="regression", dtype=torch.float32
    )
    targets = [target.name for target in plan.targets]
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(net, config)
    start_as_ours(theirs, recipe, tmp_path)

    def loss_of(step: int) -> Tensor:
        places = [step % 7 * ROWS + at for at in range(ROWS)]
        found = [
            theirs(**inputs_of(tokenizer, *pairs(42)[at][:2]), labels=torch.tensor([numbers[at]])).loss for at in places
        ]
        return torch.stack(found).mean()

    assert losses(run) == pytest.approx(losses_of(theirs, recipe, plan.warmup_steps, STEPS, loss_of), rel=1e-5)
    merge_verb(str(run), str(tmp_path / "merged"), None, None, [])
    merged = logits_of(classifier_of(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, our_logits(run, None), atol=1e-5, rtol=1e-5)
