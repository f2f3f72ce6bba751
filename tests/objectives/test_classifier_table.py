"""Classifiers by architecture and problem type: published encoders made tiny, as they are saved for other tasks.

Each cell trains 10 steps as transformers and peft do, and its result is read by the other side.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import write_tiny_llama
from tests.objectives.test_classify import losses_of, start_as_ours, texts, write_recipe
from tests.objectives.test_problem_types import KINDS, rows_of, target_of
from tests.objectives.test_problem_types import write_recipe as write_typed
from tests.support.classifier_case import check_each_reads_the_other, close
from tests.support.plans import make_plan
from tests.support.train_case import losses, train
from tunekit.adapters.folder.config import read_adapter_config
from tunekit.errors import ModelError
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.targets.labels import head_facts
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")
STEPS, ROWS, LABELS = 10, 6, ["no", "perhaps", "yes"]
SINGLE = "single"  # one label a row; the other kinds are those of test_problem_types
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALBERT = {"embedding_size": 16, "classifier_dropout_prob": 0.0}
ROBERTA = {
    "type_vocab_size": 1,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DEBERTA = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pos_att_type": "p2c|c2p",
    "pooler_dropout": 0,
    "pooler_hidden_size": 32,
}
DEBERTA_2 = DEBERTA | {"position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}


@dataclass(frozen=True)
class Encoder:
    """A configuration, the model class that its checkpoint was saved from, and what a classifier adds to it.

    `new`: modules that the checkpoint lacks, besides the head that peft trains without being told.
    """

    model_type: str
    saved_as: str
    values: dict[str, Any]
    new: tuple[str, ...] = ()


ENCODERS = {
    "distilbert": Encoder(
        "distilbert",
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    ),
    "deberta": Encoder("deberta", "DebertaForMaskedLM", SIZES | DROPOUT | DEBERTA, ("pooler",)),
    "deberta_v2": Encoder(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        SIZES | DROPOUT | DEBERTA_2 | {"conv_kernel_size": 3, "conv_act": "gelu"},
        ("pooler",),
    ),
    "deberta_v3": Encoder("deberta-v2", "DebertaV2ForMaskedLM", SIZES | DROPOUT | DEBERTA_2, ("pooler",)),
    "bert": Encoder("bert", "BertForPreTraining", SIZES | DROPOUT),
    "bert_without_pooler": Encoder("bert", "BertForMaskedLM", SIZES | DROPOUT, ("pooler",)),
    "electra": Encoder("electra", "ElectraForPreTraining", SIZES | DROPOUT | {"embedding_size": 16}),
    "electra_generator": Encoder("electra", "ElectraForMaskedLM", SIZES | DROPOUT | {"embedding_size": 16}),
    "roberta": Encoder("roberta", "RobertaForMaskedLM", SIZES | DROPOUT | ROBERTA),
    "xlm_roberta": Encoder("xlm-roberta", "XLMRobertaForMaskedLM", SIZES | DROPOUT | ROBERTA),
    "albert": Encoder("albert", "AlbertForPreTraining", SIZES | DROPOUT | ALBERT),
    "albert_without_pooler": Encoder(
        "albert",
        "AlbertForMaskedLM",
        SIZES | DROPOUT | ALBERT,
        ("pooler",),
    ),
    "mpnet": Encoder("mpnet", "MPNetForMaskedLM", SIZES | DROPOUT),
    "modernbert": Encoder(
        "modernbert",
        "ModernBertForMaskedLM",
        SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 16},
    ),
    "modernbert_without_head": Encoder(
        "modernbert",
        "ModernBertModel",
        SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 16},
        ("head",),
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_llama(folder / "llama"))
    for name, encoder in ENCODERS.items():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[encoder.model_type](vocab_size=len(tokenizer) + 5, **encoder.values)
        getattr(transformers, encoder.saved_as)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ENCODERS}


def recipe_of(folder: Path, base: Path, method: str, kind: str = SINGLE, **adapter: Any) -> Path:
    settings = {"method": method} if method == "full" else {"method": method, **adapter}
    training = {"learning_rate": 2e-3, "epochs": None, "max_steps": STEPS, "eval_steps": 100}
    write = write_recipe if kind == SINGLE else partial(write_typed, kind=kind)
    path = write(folder, base, data={"shuffle": False}, training=training)
    values = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(values | {"adapter": settings}), encoding="utf-8")
    return path


def classifier(folder: Path, kind: str = SINGLE) -> nn.Module:
    head = {"num_labels": 1 if kind == "one" else 3, "problem_type": KINDS.get(kind, "single_label_classification")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **head)
    return net.eval()


def rows_with_targets(base: Path, kind: str) -> list[tuple[Tensor, Tensor]]:
    """(1, T) ids and the target of each row, as a user of transformers has them."""
    tokenizer, single = AutoTokenizer.from_pretrained(base), kind == SINGLE
    rows = [(text, LABELS.index(label) if single else target_of(kind, label)) for text, label in typed(kind)]
    return [(torch.tensor([tokenizer(text)["input_ids"]]), torch.tensor([target])) for text, target in rows]


def typed(kind: str) -> list[tuple[str, Any]]:
    return texts(42) if kind == SINGLE else rows_of(kind, 42)


@torch.no_grad()
def logits_of(net: nn.Module, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids, _ in rows[:ROWS]])


def logits_of_target(folder: Path, base: Path | None, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    loaded = load_target(find_target(str(folder), None if base is None else str(base), ["model.dtype=float32"]), CPU)
    return logits_of(loaded.model.base.net, rows)


def theirs_of(net: nn.Module, recipe: Path, rows: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Losses of a plain loop over the same rows, as the recipe says; transformers computes each row's."""

    def loss_of(step: int) -> Tensor:
        some = rows[step % 7 * 6 : step % 7 * 6 + 6]
        found = [net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=target).loss for ids, target in some]
        return torch.stack(found).mean()

    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    return losses_of(net, recipe, plan.warmup_steps, STEPS, loss_of)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [SINGLE, "multi", "one"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_trains_as_transformers_and_peft_do_and_each_reads_the_other(
    name: str, method: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, encoder, rows = bases[name], ENCODERS[name], rows_with_targets(bases[name], kind)
    recipe = recipe_of(tmp_path, base, method, kind, r=4)
    plan, _ = make_plan(load_recipe(recipe), device=CPU)
    (note,) = [note for note in plan.notes if "initialised at random" in note]
    assert all(new in note for new in (*encoder.new, "classifier"))
    run = train(recipe)
    if method == "full":
        start = train(recipe_of(tmp_path / "start", base, method, kind), "training.max_steps=1")  # its rate is 0
        assert losses(run) == pytest.approx(theirs_of(classifier(start / "model", kind), recipe, rows), abs=1e-5)
        close(logits_of(classifier(run / "model", kind), rows), logits_of_target(run, None, rows))
        return
    theirs = peft.get_peft_model(
        classifier(base, kind),
        peft.LoraConfig(
            r=4,
            lora_alpha=32,
            target_modules=[target.name for target in plan.targets],
            task_type="SEQ_CLS",
            modules_to_save=list(encoder.new) or None,
        ),
    )
    start_as_ours(theirs, recipe, tmp_path)
    assert losses(run) == pytest.approx(theirs_of(theirs, recipe, rows), abs=1e-5)
    check_each_reads_the_other(
        theirs,
        run,
        base,
        tmp_path,
        partial(classifier, kind=kind),
        ours=lambda adapter: logits_of_target(adapter, base, rows),
        logits=lambda net: logits_of(net, rows),
    )


@pytest.mark.parametrize("name", [name for name, encoder in ENCODERS.items() if encoder.new])
def test_a_peft_adapter_without_a_module_that_its_base_lacks_is_refused_by_name(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    (new,) = ENCODERS[name].new
    config = peft.LoraConfig(
        r=2, target_modules=".*layers?.*(query|key|value|query_proj|in_proj|Wqkv)", task_type="SEQ_CLS"
    )
    peft.get_peft_model(classifier(bases[name]), config).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ModelError, match=rf"neither .*theirs nor its base .* contains (\w+\.)?{new}; they would be"):
        load_target(find_target(str(tmp_path / "theirs"), str(bases[name]), []), CPU)


def test_a_projection_as_wide_as_the_labels_is_not_taken_for_the_head(bases: dict[str, Path], tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(32)]  # as DistilBERT's pre_classifier has outputs
    recipe = recipe_of(tmp_path, bases["distilbert"], "lora", r=4)
    lines = [json.dumps({"text": name, "label": name}) + "\n" for name in names]
    for file in ("train.jsonl", "test.jsonl"):
        (tmp_path / file).write_text("".join(lines), encoding="utf-8")
    plan, prepared = make_plan(load_recipe(recipe), device=CPU)
    assert not plan.refusals
    assert set(prepared.adapter.modules_to_save) == {"pre_classifier", "classifier"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "saved"),
    [("roberta", []), ("distilbert", ["pre_classifier", "classifier"]), ("deberta_v3", ["pooler", "classifier"])],
)
@pytest.mark.parametrize("count", [3, SIZES["hidden_size"], 40])
def test_a_foreign_head_has_as_many_labels_as_its_last_matrix_has_rows(
    name: str, saved: list[str], count: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    net = AutoModelForSequenceClassification.from_pretrained(bases[name], num_labels=count, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, target_modules=".*(query|q_lin|query_proj)", task_type="SEQ_CLS", modules_to_save=saved or None
    )
    peft.get_peft_model(net, config).save_pretrained(str(tmp_path))
    facts = head_facts(read_adapter_config(tmp_path), ModelSection(name_or_path=str(bases[name])))
    assert len(facts["labels"]) == count
