"""Encoder-decoders from recipe to merged model, on a real one that spells words as sounds (real pairs, 800 and 200)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runs.test_every_method_trains import SETTINGS
from tests.support.data_case import chat, encoder_of, objective_of, settings, source_row, tokenizer_of
from tests.support.loop_case import CPU, ListedRows, make_case
from tests.support.plans import make_plan
from tunekit.contracts import IGNORED, Row, RowKind
from tunekit.data.batching.steps import StoredSteps, filled_batch
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.rendering.render import EMPTY_ANSWER
from tunekit.errors import DataError, ModelError, TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.formats.example import CompletionExample, TextExample
from tunekit.generate import generate_verb
from tunekit.merge import merge_verb
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.rows.sources import EMPTY_SOURCE, ONLY_LAST_ANSWER
from tunekit.planning.forecast import largest_batch
from tunekit.recipe.load import load_recipe
from tunekit.recipe.objectives.seq2seq import Seq2seqSettings
from tunekit.recipe.reading.names import known_names
from tunekit.recipe.training import TrainingSection
from tunekit.train import train_verb

START = 1  # the real model's answers begin with <s>
PAIRS = {"format": "prompt_completion", "columns": {"input": "prompt", "target": "completion"}}


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    """bart-g2p: a real BART of 750,000 parameters."""
    return shared / "models" / "bart-g2p"


@pytest.fixture(scope="module")
def words(shared: Path) -> Path:
    return shared / "data" / "seq2seq_g2p"


def write_recipe(folder: Path, model: Path, words: Path, **training: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {name: [{"path": str(words / f"{file}.jsonl"), **PAIRS}] for name, file in
                 (("train", "train"), ("eval", "test"))},
        "objective": "seq2seq",
        "adapter": {"r": 8, "alpha": 16.0},
        "training": {"learning_rate": 2e-3, "micro_batch_size": 8, "gradient_accumulation_steps": 2, **training},
        "output": {"dir": "run"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] if "loss" in line else line["eval"]["loss"] for line in lines]


def measured(target: Path, output: Path, *overrides: str, **given: Any) -> dict[str, float]:
    arguments = {"data": None, "data_format": None, "metrics": []} | given
    evaluate_verb(
        str(target), None, arguments["data"], arguments["data_format"], arguments["metrics"], str(output), overrides
    )
    return json.loads(output.read_text("utf-8"))  # type: ignore[no-any-return]


# Rows.


def row(source: int, answer: int, first: int = 10) -> Row:
    """Ids that count up, with the start of the answer between them."""
    ids = np.arange(first, first + source + answer)
    return source_row(ids[:source], np.array([START, *ids[source:]]), "rows:1")


def seq2seq_encoder(tokenizer: LoadedTokenizer, template: str | None = None) -> RowKind:
    return encoder_of(tokenizer, template=template, settings=Seq2seqSettings())


def test_a_row_is_source_start_and_answer(model: Path) -> None:
    tokenizer = tokenizer_of(model)
    found = seq2seq_encoder(tokenizer).encode(CompletionExample("king", "kˈɪŋ"), "rows:1")
    source, answer = tokenizer.native("king")["input_ids"], tokenizer.native(text_target="kˈɪŋ")["input_ids"]
    parts = {"source": source, "answer": [START, *answer], "weight": [1.0]}
    assert {name: ids.tolist() for name, ids in found.parts.items()} == parts
    assert source[-1] == answer[-1] == tokenizer.eos_id
    assert found.sizes == (len(source), len(answer))
    assert found.supervised == len(answer)  # the first one counts, unlike a causal row's
    shown = objective_of(Seq2seqSettings()).rows.spans(found)
    assert [span.ids.tolist() for span in shown] == [source, [START, *answer]]
    assert [span.trained.tolist() for span in shown] == [[False] * len(source), [False] + [True] * len(answer)]


def test_an_answer_without_an_end_is_given_one(model: Path) -> None:
    tokenizer = tokenizer_of(model)
    tokenizer.native.backend_tokenizer.post_processor = None
    found = seq2seq_encoder(tokenizer).encode(CompletionExample("ab", "c"), "rows:1")
    assert found.parts["answer"][-1] == tokenizer.eos_id
    assert [*found.parts["source"], *found.parts["answer"]].count(tokenizer.eos_id) == 1


def test_rows_that_leave_a_part_empty_are_dropped_and_running_text_is_refused(model: Path) -> None:
    tokenizer = tokenizer_of(model)
    with pytest.raises(Dropped, match=EMPTY_ANSWER):
        seq2seq_encoder(tokenizer).encode(CompletionExample("king", ""), "rows:1")
    with pytest.raises(DataError, match="running text has no prompt for the encoder to read"):
        seq2seq_encoder(tokenizer).encode(TextExample("king"), "rows:1")
    with pytest.raises(DataError, match="a conversation needs a chat template"):
        seq2seq_encoder(tokenizer).encode(chat(("user", "king"), ("assistant", "kˈɪŋ")), "rows:1")
    tokenizer.native.backend_tokenizer.post_processor = None
    with pytest.raises(Dropped, match=EMPTY_SOURCE):
        seq2seq_encoder(tokenizer).encode(CompletionExample("", "king"), "rows:1")


def test_of_a_conversation_the_last_answer_is_trained_on(model: Path) -> None:
    tokenizer = tokenizer_of(model)
    encoder = seq2seq_encoder(tokenizer, "{% for m in messages %}{{ m['content'] }} {% endfor %}")
    found = encoder.encode(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "rows:1")
    assert encoder.notices == {ONLY_LAST_ANSWER: 1}
    source, answer = (found.parts[name].tolist() for name in ("source", "answer"))
    assert tokenizer.decode(source, skip_special_tokens=True).split() == ["abc"]
    assert tokenizer.decode(answer[1:], skip_special_tokens=True) == "d"
    plain = tokenizer.encode_source("a")
    assert (source[0], source[-1]) == (plain[0], plain[-1])  # around the text, as around any


def test_a_template_may_write_the_special_tokens_itself(model: Path) -> None:
    tokenizer = tokenizer_of(model)
    exchange = chat(("user", "king"), ("assistant", "k"))
    bare, own = (
        seq2seq_encoder(tokenizer, template).encode(exchange, "rows:1")
        for template in ("{{ messages[0]['content'] }}", "<s>{{ messages[0]['content'] }}</s>")
    )
    assert all(bare.parts[name].tolist() == own.parts[name].tolist() for name in ("source", "answer"))


@pytest.mark.parametrize(
    ("override", "key"), [("data.train_on=all", "data.train_on"), ("data.excess_length=split", "data.excess_length")]
)
def test_options_without_a_meaning_are_refused(
    model: Path, words: Path, tmp_path: Path, override: str, key: str
) -> None:
    with pytest.raises(TunekitError) as caught:
        make_plan(load_recipe(write_recipe(tmp_path, model, words), [override]), device=CPU)
    assert [problem.key for problem in caught.value.problems] == [key]


# Batches.


def test_source_and_answer_are_padded_by_themselves() -> None:
    objective = objective_of(Seq2seqSettings())
    batch = objective.rows.collate([[row(4, 2)], [row(2, 3, first=30)]])
    mask = batch.inputs["attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [ids[real.bool()].tolist() for ids, real in zip(batch.inputs["input_ids"], mask, strict=True)] == [
        [10, 11, 12, 13],
        [30, 31],
    ]
    assert batch.targets["labels"].tolist() == [[14, 15, IGNORED], [32, 33, 34]]
    assert batch.inputs["decoder_input_ids"][0, :2].tolist() == [START, 14]
    assert batch.inputs["decoder_input_ids"][1].tolist() == [START, 32, 33]
    assert (batch.lengths, batch.width, batch.padded) == ([6, 5], 4 + 3, 2 * (4 + 3))
    assert objective.loss.units(batch).tolist() == [5.0]


def test_no_micro_batch_by_tokens_is_larger_with_its_padding() -> None:
    """A long source beside a long answer: either part is padded to the longest."""
    rows = ListedRows([row(9, 1), row(1, 9), row(5, 5), row(8, 2), row(2, 8), row(4, 4)])
    chosen = settings(micro_batch_size=None, micro_batch_tokens=24, packing=False, shuffle=False, epochs=1.0)
    objective = objective_of(Seq2seqSettings())
    found = StoredSteps(rows, objective.rows, chosen)
    widths = [tuple(sizes) for sizes in rows.sizes.tolist()]
    assert widths[:2] == [(9, 1), (1, 9)]
    batches = [[widths[index] for (index,) in batch] for batch in found.micro_batches(0)]
    sizes = [len(batch) * sum(max(part) for part in zip(*batch, strict=True)) for batch in batches]
    assert max(sizes) <= 24
    assert [len(batch) for batch in found.micro_batches(0)] == [1, 1, 1, 1, 2]
    largest = largest_batch(found, rows, objective.rows, chosen)
    made = largest.inputs["input_ids"].numel() + largest.inputs["decoder_input_ids"].numel()
    assert made == largest.padded == max(sizes)


def test_of_a_stream_no_batch_is_larger_than_the_filled_one() -> None:
    """As long a source in one row as an answer in every other, and as many predicted tokens as that allows."""
    rows = ListedRows([row(9, 1), row(1, 9), row(5, 5)])
    batch = filled_batch(rows, objective_of(Seq2seqSettings()).rows, settings(micro_batch_size=3, max_length=16))
    assert [one.sizes for one in batch.rows] == [(15, 1), (1, 15), (1, 15)]
    assert (batch.padded, batch.supervised) == (3 * 30, 31)


# Training.


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_twenty_steps_equal_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    """Each row by itself through their own loss of `labels`, which knows where an answer begins; no dropout."""
    import peft
    from transformers import AutoModelForSeq2SeqLM

    from tests.memory.test_streaming_seq2seq import VOCABULARY, make_net

    quiet = {"dropout_rate": 0.0} if kind == "t5" else {"dropout": 0.0}
    make_net(kind, decoder_start_token_id=0, **quiet).save_pretrained(tmp_path)  # type: ignore[operator]
    generator = np.random.default_rng(0)
    rows = ListedRows([_random_row(generator, VOCABULARY) for _ in range(37)])
    training = TrainingSection(
        learning_rate=5e-3, micro_batch_size=3, gradient_accumulation_steps=2, epochs=None, max_steps=20
    )
    case = make_case(tmp_path, rows, training=training, objective=Seq2seqSettings())
    theirs: Any = peft.get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"),
    )
    own = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    places = {
        name: f"base_model.model.{name.removesuffix('.weight')}.default.weight" for name in case.adapter.trained()
    }
    assert set(places.values()) == set(own)
    with torch.no_grad():
        for name, value in case.adapter.trained().items():
            own[places[name]].copy_(value)
    optimizer = torch.optim.AdamW(list(own.values()), lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(case.parts.plan.warmup_steps, 20))
    expected = []
    for step in case.steps.after(0):
        total, units = torch.zeros(()), 0
        for source, answer in (_parted(one) for batch in step.batches for one in batch.rows):
            total = total + theirs(input_ids=source, labels=answer).loss * answer.numel()
            units += answer.numel()
        (total / units).backward()
        torch.nn.utils.clip_grad_norm_(list(own.values()), training.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(float(total.detach()) / units)
    case.run()
    assert case.losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    for name, value in case.adapter.trained().items():
        torch.testing.assert_close(value.detach(), own[places[name]].detach(), rtol=1e-4, atol=1e-5)


def _random_row(generator: np.random.Generator, vocabulary: int) -> Row:
    source, answer = int(generator.integers(2, 12)), int(generator.integers(1, 9))
    ids = generator.integers(3, vocabulary, source + 1 + answer)
    ids[source] = 0
    return source_row(ids[:source], ids[source:], "rows:1")


def _parted(one: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and answer, as one batch of one row each."""
    source, answer = (torch.from_numpy(one.parts[name]).long()[None] for name in ("source", "answer"))
    return source, answer[:, 1:]


def _cosine(warmup: int, steps: int) -> Any:
    from transformers.optimization import _get_cosine_schedule_with_warmup_lr_lambda as rate

    return lambda step: rate(step, num_warmup_steps=warmup, num_training_steps=steps, num_cycles=0.5)


@pytest.mark.drawn
def test_a_real_model_is_tuned_measured_asked_and_merged(
    model: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, model, words, epochs=1, eval_steps=25)
    before = measured(recipe, tmp_path / "before.json")
    train_verb(load_recipe(recipe), False, False)
    run = tmp_path / "run"
    after = measured(run, tmp_path / "after.json", metrics=["loss", "exact_match"])
    assert (before["rows"], before["supervised_tokens"]) == (200, after["supervised_tokens"])
    assert after["loss"] < 0.7 * before["loss"]
    assert after["loss"] == pytest.approx(losses(run)[-1], rel=1e-6)
    assert after["exact_match"] > 0.4
    config = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    folder = tmp_path / "elsewhere"  # an adapter with no recipe beside it
    shutil.copytree(run / "adapter", folder)
    rows = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in (words / "test.jsonl").read_text("utf-8").splitlines()]
    rows.write_text("".join(json.dumps({"prompt": x["input"], "completion": x["target"]}) + "\n" for x in lines))
    alone = measured(folder, tmp_path / "alone.json", "model.dtype=float32", data=str(rows), metrics=["loss"])
    assert alone["loss"] == pytest.approx(after["loss"], rel=1e-6)
    capsys.readouterr()
    generate_verb(str(run), None, ["broth"], None, [])
    assert capsys.readouterr().out.strip().endswith("bɹˈɔθ")
    merge_verb(str(run / "adapter"), str(tmp_path / "merged"), None, None, [])
    merged = measured(tmp_path / "merged", tmp_path / "merged.json", "model.dtype=float32", data=str(rows))
    assert merged["loss"] == pytest.approx(after["loss"], rel=1e-4)


@pytest.mark.drawn
def test_a_resumed_a_recomputed_and_a_streamed_run_are_the_same(model: Path, words: Path, tmp_path: Path) -> None:
    """Bit for bit, the base's dropout of 0.1 included."""
    recipe = write_recipe(tmp_path, model, words, epochs=None, max_steps=4, save_steps=2)

    def run(name: str, *overrides: str) -> tuple[bytes, list[float]]:
        folder = tmp_path / name
        train_verb(load_recipe(recipe, [f"output.dir={folder}", *overrides]), False, False)
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), losses(folder)

    plain = run("plain", "memory.gradient_checkpointing=false")
    assert run("recomputed", "memory.gradient_checkpointing=true") == plain
    assert run("streamed", "memory.streaming=disk") == plain
    resumed = tmp_path / "plain"
    for name in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(resumed / name)
    status = json.loads((resumed / "status.json").read_text("utf-8"))
    (resumed / "status.json").write_text(json.dumps({**status, "exit_code": 130}))
    train_verb(load_recipe(recipe, [f"output.dir={resumed}", "memory.gradient_checkpointing=false"]), True, False)
    assert (resumed / "adapter" / "adapter_model.safetensors").read_bytes() == plain[0]


def test_positions_count_anew_in_the_answer(model: Path, tmp_path: Path) -> None:
    """The model's table has 64 of them: 50 and 50 fit, 70 do not."""
    rows = tmp_path / "rows.jsonl"
    recipe = write_recipe(tmp_path / "recipe", model, tmp_path)
    for name, source in (("train", 50), ("test", 50)):
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text(json.dumps({"input": "a" * source, "target": "b" * 50}) + "\n")
    assert not make_plan(load_recipe(recipe), device=CPU)[0].refusals
    rows.write_text(json.dumps({"input": "a" * 70, "target": "b"}) + "\n")
    (refusal,) = make_plan(load_recipe(recipe), device=CPU)[0].refusals
    assert refusal.key == "data.max_length"
    assert "64 positions" in refusal.message


def test_a_base_that_does_not_say_how_answers_begin_is_refused(model: Path, words: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((copy / name).read_text("utf-8"))
        values.pop("decoder_start_token_id")
        (copy / name).write_text(json.dumps(values))
    with pytest.raises(ModelError, match="does not state the token that begins every answer") as caught:
        make_plan(load_recipe(write_recipe(tmp_path, copy, words)), device=CPU)
    assert [problem.key for problem in caught.value.problems] == ["model.name_or_path"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "king", "completion": "k"}\n')
    with pytest.raises(ModelError, match="token that begins every answer"):
        measured(copy, tmp_path / "x.json", data=str(rows))


REFUSED = {"cpt": "decoder-only", "llama_adapter": "no LLaMA-Adapter"}
OF_METHOD: dict[str, dict[str, Any]] = {
    **SETTINGS,
    "prefix": {"init": "random", "num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4},
}
SHARES_TENSORS = {"vblora", "vera", "randlora"}  # between layers, whose gradients are then summed in another order


@pytest.mark.slow
@pytest.mark.parametrize("method", known_names("adapters"))
def test_every_method_trains_recomputed_and_streamed_alike(
    model: Path, words: Path, tmp_path: Path, method: str
) -> None:
    recipe = write_recipe(tmp_path, model, words, epochs=None, max_steps=3, warmup_steps=0, scheduler="constant")
    values = json.loads(recipe.read_text("utf-8"))
    values["adapter"] = {"method": method, **OF_METHOD.get(method, {})}
    values["data"].pop("eval")
    recipe.write_text(json.dumps(values))

    def run(name: str, *overrides: str) -> list[float]:
        train_verb(load_recipe(recipe, [f"output.dir={tmp_path / name}", *overrides]), False, False)
        return losses(tmp_path / name)

    if method in REFUSED:
        with pytest.raises(TunekitError, match=REFUSED[method]):
            run("plain")
        return
    plain = run("plain", "memory.gradient_checkpointing=false")
    assert run("recomputed", "memory.gradient_checkpointing=true") == plain
    if method == "full":
        with pytest.raises(TunekitError, match="and a streamed base is read-only"):
            run("streamed", "memory.streaming=disk")
    else:
        streamed = run("streamed", "memory.streaming=disk")
        assert streamed == plain or (method in SHARES_TENSORS and streamed == pytest.approx(plain, rel=1e-5))
    still = run("still", "training.learning_rate=0")
    assert still[0] == plain[0]
    assert still[1:] != plain[1:]
