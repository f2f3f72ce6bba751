"""Encoder-decoders and classifiers: load, attach every method, call, generate; plan refuses to train them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.conftest import write_tiny_llama
from tests.model.test_decoder import run
from tests.support.peft_case import BASES, HEADS, LAYERS, SIZES, VOCABULARY, move_from_start
from tests.support.plans import make_plan
from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import attach_adapter_folder, save_adapter_folder
from tunekit.adapters.targets import find_targets
from tunekit.arithmetic.merge import merge
from tunekit.errors import ModelError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import answer
from tunekit.model.families import make_family
from tunekit.model.load import LoadedModel, load_model, make_meta_model
from tunekit.model.text.continuation import Continuation
from tunekit.model.text.generation import generate_texts
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import settings_class
from tunekit.targets.target import find_target, load_target

CPU = torch.device("cpu")


def make_bart_classifier() -> nn.Module:
    """Its head is a network of two layers."""
    config: Any = BASES["bart"].make().config
    config.num_labels = LABELS
    torch.manual_seed(0)
    return BartForSequenceClassification(config).eval()


def make_llama_classifier() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=HEADS, num_labels=LABELS, pad_token_id=0)
    return LlamaForSequenceClassification(config).eval()


LABELS, WIDTH = 3, 12
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "t5": BASES["t5"].make,
    "bart": BASES["bart"].make,
    "bert": BASES["bert"].make,
    "llama-classifier": make_llama_classifier,
    "bart-classifier": make_bart_classifier,
}
FACTS = {  # family, head, layers
    "t5": ("seq2seq", "lm_head", 2 * LAYERS),
    "bart": ("seq2seq", "lm_head", 2 * LAYERS),
    "bert": ("classifier", "classifier", LAYERS),
    "llama-classifier": ("classifier", "score", LAYERS),
    "bart-classifier": ("classifier", "classification_head", 2 * LAYERS),
}


@pytest.fixture(scope="module", params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for each maker."""
    root = tmp_path_factory.mktemp("families")
    for name, make in MAKERS.items():
        make().save_pretrained(root / name)
    return root


def load(folder: Path, **values: Any) -> LoadedModel:
    return load_model(ModelSection(name_or_path=str(folder), dtype="float32", **values), device=CPU)


def inputs_of(name: str) -> dict[str, Tensor]:
    """Two rows, the second one padded at its end; each has the token at whose place BART's classifier reads."""
    ids = torch.arange(3, 3 + 2 * WIDTH).reshape(2, WIDTH)
    ids[:, 8] = 2
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    answer = {"decoder_input_ids": ids[:, :7] + 40} if FACTS[name][0] == "seq2seq" else {}
    return {"input_ids": ids, "attention_mask": mask, **answer}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_loads_and_computes_as_transformers_does(name: str, folders: Path, quantization: str) -> None:
    model, inputs = load(folders / name, quantization=quantization), inputs_of(name)
    family, head, layers = FACTS[name]
    assert (model.facts.family, model.family.head_name(model.net), model.facts.layers) == (family, head, layers)
    assert model.text.vocabulary_size == VOCABULARY
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    logits = model.family.logits(model.net, inputs)
    assert logits.shape == ((2, 7, VOCABULARY) if family == "seq2seq" else (2, LABELS))
    hidden = model.family.hidden(model.net, inputs)
    if family == "seq2seq":
        again = model.family.head(model.net).logits(hidden.flatten(0, 1)).reshape(logits.shape)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)
    plain = MAKERS[name]()(**inputs).logits
    if quantization == "none":
        torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
    else:
        assert 0 < (logits - plain).abs().mean() < 0.3 * plain.std()
    meta = make_meta_model(ModelSection(name_or_path=str(folders / name), quantization=quantization), device=CPU)
    assert meta.facts.total_parameters == model.facts.total_parameters
    assert meta.family == model.family


@pytest.mark.parametrize("model_type", ["longt5", "mt5", "switch_transformers", "t5", "umt5"])
def test_logits_of_t5_and_its_relatives_have_the_net_s_scale(model_type: str) -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, num_experts=2, decoder_start_token_id=0, pad_token_id=0)
    net, inputs, family = AutoModelForSeq2SeqLM.from_config(config).eval(), inputs_of("t5"), make_family("seq2seq")
    with torch.no_grad():
        again = family.head(net).logits(family.hidden(net, inputs).flatten(0, 1))
        torch.testing.assert_close(again, net(**inputs).logits.flatten(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("said", ["causal", "seq2seq", "classifier", "speech"])
def test_a_family_that_is_not_the_base_s_is_refused(name: str, folders: Path, said: str) -> None:
    if said == FACTS[name][0]:
        assert load(folders / name, family=said).facts.family == said
        return
    with pytest.raises(ModelError, match=said) as caught:
        load(folders / name, family=said)
    assert caught.value.problems[0].key == "model.family"


def test_all_linear_is_every_linear_layer_but_the_head(name: str) -> None:
    """As peft finds them, which passes over a head of one layer only."""
    net, head = MAKERS[name](), FACTS[name][1]
    settings = settings_class("adapters", "lora")(r=2)
    ours = {target.name for target in find_targets(net, settings, head_name=head)}
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type=peft.TaskType.SEQ_CLS if "c" in head else None)
    theirs = peft.get_peft_model(net, config).targeted_module_names
    inside = {other for other in theirs if f".{other}.".startswith(f".{head}.")}
    assert ours == set(theirs) - inside
    assert not any(f"{other}.".startswith(f"{head}.") for other in ours)


METHODS = {"lora": {"r": 4}, "ia3": {}, "ln_tuning": {}}  # a product, a scale, copies; parity/ has all of them


@pytest.mark.sampled(6)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_attach_compute_and_come_back_from_their_folders(
    name: str, folders: Path, method: str, tmp_path: Path
) -> None:
    settings = settings_class("adapters", method)(**METHODS[method])
    model, inputs = load(folders / name), inputs_of(name)
    head = model.family.head_name(model.net)
    attached = attach_adapter(model.net, settings, seed=1, head_name=head)
    trained = attached.trained()
    move_from_start(trained.values(), 0.2)
    logits = model.family.logits(model.net, inputs)
    gradients = torch.autograd.grad(logits.square().sum(), list(trained.values()), allow_unused=True)
    without = [n for n, g in zip(trained, gradients, strict=True) if g is None or not bool(g.abs().max() > 0)]
    assert not without
    facts = {"base_name": "org/base", "base_fingerprint": "f", "revision": None}
    save_adapter_folder(attached, tmp_path / "a", **facts, task_type=model.family.task_type)
    again = load(folders / name)
    attach_adapter_folder(again.net, tmp_path / "a", head_name=head)
    assert torch.equal(again.family.logits(again.net, inputs), logits)


PROMPTS = [[3, 4, 5], list(range(6, 30)), [40, 41], [50] * 9]
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "forced_eos_token_id": None}  # a cut answer has no end


def write_encoder_decoder(folder: Path, name: str) -> Path:
    """A T5 or BART of 267 tokens with the byte-level tokenizer of the tiny llama."""
    write_tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    net: Any = MAKERS[name]()
    net.config.vocab_size = 267
    torch.manual_seed(0)
    net = type(net)(net.config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    net.config.eos_token_id = net.generation_config.eos_token_id = 2
    net.save_pretrained(folder)
    if name == "t5":  # like T5's own files, which state neither
        config = json.loads((folder / "config.json").read_text())
        del config["scale_decoder_outputs"], config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["t5", "bart"])
def encoder_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder_decoder(tmp_path_factory.mktemp(request.param), request.param)


def test_greedy_answers_equal_those_of_transformers(encoder_decoder: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(encoder_decoder)))
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(encoder_decoder, dtype=torch.float32).eval()
    expected = [
        plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=11, **GREEDY)[0, 1:].tolist() for ids in PROMPTS
    ]
    assert len({tuple(ids) for ids in expected}) > 1
    for batch_size in (1, 4):
        model = load(encoder_decoder)
        own = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=11, batch_size=batch_size)
        for ours, theirs in zip(own, expected, strict=True):
            ended = theirs.index(2) if 2 in theirs else len(theirs)
            assert ours == theirs[:ended]


def test_forced_tokens_change_no_other_answer_and_no_score(encoder_decoder: Path) -> None:
    model = load(encoder_decoder)
    assert model.generation_config is not None
    model.generation_config.forced_bos_token_id, model.generation_config.forced_eos_token_id = 7, 2
    wanted = [
        Continuation(prompt, count, stop_ids={2}, top=2) for prompt, count in zip(PROMPTS, (5, 12, 3, 8), strict=True)
    ]
    together, alone = run(model, wanted, slots=4), [run(model, [each])[0] for each in wanted]
    assert [[(token.id, token.reason) for token in row] for row in together] == [
        [(token.id, token.reason) for token in row] for row in alone
    ]
    assert {row[0].id for row in together} == {7}
    assert all(token.score is not None and math.isfinite(token.score.logprob) for row in together for token in row)
    assert all(math.isfinite(logprob) for row in together for token in row for _, logprob in token.score.top)


def test_the_answer_of_an_adapter_s_folder_equals_peft_s(encoder_decoder: Path, tmp_path: Path) -> None:
    """`tunekit generate ADAPTER --prompt TEXT`, whose source gets the special tokens of the tokenizer."""
    model = load(encoder_decoder)
    settings = settings_class("adapters", "lora")(r=4, target_modules="all-linear")
    attached = attach_adapter(model.net, settings, seed=1, head_name=model.family.head_name(model.net))
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    save_adapter_folder(
        attached,
        tmp_path / "adapter",
        base_name=str(encoder_decoder),
        base_fingerprint=model.fingerprint,
        revision=None,
        task_type=model.family.task_type,
    )
    loaded = load_target(
        find_target(str(tmp_path / "adapter"), None, ["model.dtype=float32", "evaluation.max_new_tokens=9"]), CPU
    )
    loaded.tokenizer.chat_template = None  # no encoder-decoder's has one
    (text,) = answer(loaded, ["a few words"])
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(encoder_decoder, dtype=torch.float32)
    theirs: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    native = loaded.tokenizer.native
    ids = native("a few words", return_tensors="pt")["input_ids"]
    output = theirs.generate(input_ids=ids, max_new_tokens=9, **GREEDY)
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    assert text == native.decode(output[0, 1:], skip_special_tokens=True)


def test_a_classifier_gives_no_text_and_pads_only_with_a_padding_token(folders: Path) -> None:
    model, inputs = load(folders / "llama-classifier"), inputs_of("llama-classifier")
    tokenizer: Any = None
    with pytest.raises(ModelError, match="does not generate text"):
        generate_texts(model, tokenizer, [[3]], max_new_tokens=1, batch_size=1)
    assert model.family.head(model.net).name == "score", "of a decoder; it is called on the last token of a row"
    model.net.config.pad_token_id = None  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="names no padding token"):
        model.family.logits(model.net, inputs)


def write_recipe(folder: Path, model: Path, objective: str) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndata: {{train: {rows}}}\nobjective: {objective}\noutput: {{dir: {folder / 'run'}}}\n"
    )
    return recipe


def test_an_objective_of_another_family_is_refused_with_the_right_one(encoder_decoder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, encoder_decoder, "sft")
    with pytest.raises(TunekitError, match=r"is an encoder-decoder.*write objective: seq2seq") as caught:
        make_plan(load_recipe(recipe), device=CPU)
    assert [(problem.key, problem.line) for problem in caught.value.problems] == [("objective", 3)]


def test_a_classifier_is_no_base_of_text_objectives(folders: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier"
    write_tiny_llama(classifier)  # for its tokenizer
    (classifier / "model.safetensors").unlink()
    shutil.copytree(folders / "bart-classifier", classifier, dirs_exist_ok=True)
    recipe = write_recipe(tmp_path, classifier, "sft")
    with pytest.raises(TunekitError, match=r"is a sequence classifier.*write objective: classify") as caught:
        make_plan(load_recipe(recipe), device=CPU)
    assert [problem.key for problem in caught.value.problems] == ["objective"]
    with pytest.raises(TunekitError, match="labels"):
        evaluate_verb(str(classifier), None, str(tmp_path / "rows.jsonl"), "prompt_completion", [], None, [])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": r".*\.(q|q_proj)", "modules_to_save": ["lm_head"]},
        {"target_modules": r".*\.(q|q_proj)", "trainable_token_indices": [3, 4, 5]},
    ],
    ids=["head", "embeddings", "copied head", "tokens"],
)
def test_what_shares_the_embedding_s_matrix_is_merged(
    encoder_decoder: Path, fields: dict[str, Any], tmp_path: Path
) -> None:
    """The files hold the matrix once; in the merged model each module that was changed has its own."""
    model, inputs = load(encoder_decoder), inputs_of("t5")
    plain = model.family.logits(model.net, inputs)
    settings = settings_class("adapters", "lora")(r=4, **fields)
    attached = attach_adapter(model.net, settings, seed=1, head_name=model.family.head_name(model.net))
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        running = model.family.logits(model.net, inputs)
    assert (running - plain).abs().max() > 0.1
    facts = {"base_name": str(encoder_decoder), "base_fingerprint": model.fingerprint, "revision": None}
    save_adapter_folder(attached, tmp_path / "adapter", **facts, task_type=model.family.task_type)
    target = find_target(str(tmp_path / "adapter"), None, ["model.dtype=float32"])
    exact = merge(target, tmp_path / "merged").difference
    rounded = merge(target, tmp_path / "rounded", dtype=torch.bfloat16).difference
    assert rounded.unrounded == pytest.approx(exact.largest, abs=1e-3 * float(running.std()))
    net: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(**inputs).logits, running, rtol=0, atol=1e-3 * float(running.std()))
