"""Answers chosen by their log-probability: against one plain transformers forward for each answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.architectures.tiny import write_tiny
from tests.conftest import write_tiny_llama
from tests.memory.test_streaming_seq2seq import make_net
from tests.support.loop_case import CPU
from tests.support.plans import make_plan
from tunekit.contracts import EncodeOptions
from tunekit.data.encoding.answers import prompt_of, with_own_text
from tunekit.data.rows import Written
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.evaluation import choices as room
from tunekit.evaluation.choices import Choices, choice_scores, choose, make_questions
from tunekit.evaluation.evaluator import is_better
from tunekit.formats.example import ChatExample, CompletionExample, Message
from tunekit.generate import answer
from tunekit.machine.devices import make_devices
from tunekit.metrics import expected_calibration_error
from tunekit.metrics.classes import class_facts
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.objectives.losses.confusion import label_sums
from tunekit.objectives.rows.choices import Answer, Question, split_question
from tunekit.planning.checks import raise_refusals
from tunekit.recipe.load import load_recipe
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.names import settings_class
from tunekit.targets.target import find_target, load_target
from tunekit.train import train_verb
from tunekit.tuned.model import TunedModel

ANSWERS = ("good", "goodness me", "bad", "no", "nothing at all")
ROWS = (("Is it?", " good"), ("A much longer prompt, this one, is it so?", " no"), ("x", " bad"))
OPTIONS = EncodeOptions("assistant", None, max_length=64, excess_length="drop")


def questions_and_model(folder: Path, objective: str, rows: Sequence[tuple[str, str]] = ROWS) -> Any:
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    tokenizer, base = load_tokenizer(section), load_model(section, device=CPU)
    made = make_objective(settings_class("objectives", objective)(method=objective), tokenizer, options=OPTIONS)
    examples = [Written("rows", line, CompletionExample(*row)) for line, row in enumerate(rows, 1)]
    chosen = Choices(ANSWERS, "sum")
    return TunedModel(base, None), made, chosen, make_questions(examples, chosen, made.rows)


def scores(folder: Path, objective: str, batch_size: int = 4) -> torch.Tensor:
    model, made, chosen, questions = questions_and_model(folder, objective)
    return choice_scores(model, made, chosen, questions, make_devices(), batch_size=batch_size)


def plain_scores(folder: Path, prompts: Sequence[str] = tuple(prompt for prompt, _ in ROWS)) -> torch.Tensor:
    """A forward for each prompt and answer: the sum over the answer's tokens and the one that ends it."""
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = torch.zeros(len(prompts), len(ANSWERS), dtype=torch.float64)
    for at, prompt in enumerate(prompts):
        for number, text in enumerate(ANSWERS):
            start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            end = [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = net(torch.tensor([[*start, *end]])).logits[0].log_softmax(-1)
            places = range(len(start) - 1, len(start) + len(end) - 1)
            found[at, number] = sum(float(logits[place, token]) for place, token in zip(places, end, strict=True))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "gemma2", "mistral", "bloom"])
def test_scores_are_those_of_one_forward_for_each_answer(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path) if kind == "llama" else write_tiny(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if "sliding_window" in config:  # as long as the longest prompt with its answers
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 64}), "utf-8")
    model = questions_and_model(folder, "sft")[0]
    assert room._shares_prompt(model, 60) == (kind != "bloom")
    expected = plain_scores(folder)
    for batch_size in (1, 4):
        assert torch.allclose(scores(folder, "sft", batch_size), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_reads_the_prompt_once(kind: str, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    make_net(kind, vocab_size=300, decoder_start_token_id=0).save_pretrained(tmp_path)  # type: ignore[operator]
    net = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    for batch_size in (1, 4):
        found = scores(tmp_path, "seq2seq", batch_size)
        for at, (prompt, _) in enumerate(ROWS):
            for number, text in enumerate(ANSWERS):
                ids = [*tokenizer(f" {text}")["input_ids"], tokenizer.eos_token_id]
                with torch.no_grad():
                    source = torch.tensor([tokenizer(prompt)["input_ids"]])
                    logits = net(source, decoder_input_ids=torch.tensor([[0, *ids[:-1]]])).logits[0].log_softmax(-1)
                expected = float(logits.gather(1, torch.tensor(ids)[:, None]).sum())
                assert float(found[at, number]) == pytest.approx(expected, rel=1e-4)


def test_scores_are_compared_as_asked_and_answers_encoded_once(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    rows = (*ROWS, ("Another one: is it?", " bad"), ("Is it?", " goodness me"))
    model, made, chosen, questions = questions_and_model(folder, "sft", rows)
    assert questions[3].answers is not questions[0].answers  # the prompts end with other tokens
    assert questions[4].answers is questions[0].answers
    assert [question.right for question in questions] == [0, 3, 2, 2, 1]
    plain = choice_scores(model, made, chosen, questions, make_devices(), batch_size=4)
    lengths = {"mean_per_token": [len(answer) + 2 for answer in ANSWERS], "mean_per_byte": [*map(len, ANSWERS)]}
    for name, sizes in lengths.items():  # a byte is a token here; the blank before an answer and its end are tokens
        found = choice_scores(model, made, Choices(ANSWERS, name), questions, make_devices(), batch_size=4)
        assert torch.allclose(found, plain / torch.tensor(sizes), rtol=1e-6)


@pytest.mark.parametrize("score", ["sum", "mean_per_byte"])
def test_calibrated_scores_are_those_of_plain_forwards_over_the_mean_of_content_free_prompts(
    score: str, tmp_path: Path
) -> None:
    folder, form = write_tiny_llama(tmp_path), "Is {} good? It is:"
    rows = tuple((form.format(text), answer) for text, answer in (("it", " good"), ("", " no"), ("{a} b", " bad")))
    model, made, _, _ = questions_and_model(folder, "sft", rows)
    chosen = Choices(ANSWERS, score, form)
    examples = [Written("rows", line, CompletionExample(*row)) for line, row in enumerate(rows, 1)]
    questions = make_questions(examples, chosen, made.rows)
    found = choice_scores(model, made, chosen, questions, make_devices(), batch_size=4)
    bytes_of = torch.tensor([*map(len, ANSWERS)]) if score == "mean_per_byte" else 1
    free = plain_scores(folder, [f"Is {text} good? It is:" for text in ("N/A", "[MASK]", "")]) / bytes_of
    prior = (free.exp() / free.exp().sum(dim=1, keepdim=True)).mean(dim=0)  # (choices,)
    expected = plain_scores(folder, [prompt for prompt, _ in rows]) / bytes_of - prior.log()
    assert found.shape == (3, len(ANSWERS))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert room.choice_sums(found, questions)["calibration"][:, 0].sum() == 3
    chosen_of = [ANSWERS[at] for at in expected.argmax(dim=1).tolist()]
    blanks = Choices(tuple(f" {answer}" for answer in ANSWERS), score, form)
    assert choose(model, made, blanks, [prompt for prompt, _ in rows], 4, make_devices()) == chosen_of


def test_a_text_stands_in_place_of_the_users_last_turn_and_of_the_prompt_without_a_template() -> None:
    turns = [Message("system", "Be short."), Message("user", "Old: x"), Message("assistant", "a")]
    turns += [Message("user", "Say: apple"), Message("assistant", "b")]
    row = ChatExample(tuple(turns), without_template=CompletionExample("### Say: apple\n###", "b"))
    assert prompt_of(row) == "Say: apple"
    free = with_own_text(row, "Say: ", "", "N/A")
    assert isinstance(free, ChatExample)
    assert [turn.content for turn in free.messages] == ["Be short.", "Old: x", "a", "Say: N/A", "b"]
    assert free.without_template == CompletionExample("### Say: N/A\n###", "b")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("most", "held"), [(0, [1, 1, 1, 1]), (24, [3, 1]), (29, [4]), (40, [4])])
def test_no_sequence_is_larger_than_asked(most: int, held: list[int], apart: bool) -> None:
    answers = tuple(Answer((1,) * size, (True,) * size) for size in (3, 5, 2, 9))
    question = Question(np.arange(10), answers, "rows:1")
    rows = list(split_question(question, 2, most, apart=apart))
    assert np.concatenate([row.parts["cells"] for row in rows]).tolist() == [8, 9, 10, 11]
    counts = [len(row.parts["lengths"]) for row in rows]
    assert apart or counts == held
    assert all(row.size <= max(most, question.longest) for row in rows)
    if apart:  # each answer with the prompt before it, all as wide as the widest
        widths = [10 + int(row.parts["lengths"].max()) for row in rows]
        assert [row.size for row in rows] == [count * width for count, width in zip(counts, widths, strict=True)]


def write_recipe(folder: Path, base: Path, **evaluation: Any) -> Path:
    """Which word is in the text; choices with blanks before them in the rows."""
    words = {"red": "stop", "green": "go", "amber": "wait"}
    for name, count in (("train", 24), ("test", 9)):
        rows = [
            (f"{'so ' * (at % 3)}{list(words)[at % 3]}. Do:", f" {list(words.values())[at % 3]}") for at in range(count)
        ]
        lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    values = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"train": "train.jsonl", "eval": "test.jsonl", "max_length": 64},
        "adapter": {"method": "lora", "r": 4},
        "training": {"learning_rate": 0.1, "micro_batch_size": 8, "gradient_accumulation_steps": 1, "epochs": 3,
                     "eval_steps": 3, "save_steps": 9},
        "evaluation": {"choices": ["stop", "go", "wait"], "best": "eval.accuracy", **evaluation},
        "output": {"dir": "run"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.drawn
def test_a_run_is_steered_and_reported_by_what_it_chooses(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    recipe = write_recipe(tmp_path, base)
    train_verb(load_recipe(recipe), False, False)
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text("utf-8"))
    evaluations = {entry["step"]: entry["eval"] for entry in report["evaluations"]}
    assert set(evaluations[0]) == {"loss", "perplexity", "accuracy", "macro_f1", "expected_calibration_error"}
    best = max(value["accuracy"] for step, value in evaluations.items() if step)
    assert report["best_step"] == min(step for step, value in evaluations.items() if step and value["accuracy"] == best)
    evaluate_verb(str(run), None, None, None, [], str(tmp_path / "after.json"), ["evaluation.choices=from_data"])
    after = json.loads((tmp_path / "after.json").read_text("utf-8"))
    assert after["accuracy"] == best
    assert after["classes"]["labels"] == ["go", "stop", "wait"]
    order = [report["classes"]["labels"].index(label) for label in after["classes"]["labels"]]
    confusion = report["classes"]["confusion"]
    assert after["classes"]["confusion"] == [[confusion[row][column] for column in order] for row in order]
    assert [line["rows"] for line in after["classes"]["per_class"]] == [3, 3, 3]
    assert "Each label, with the exported weights" in (run / "report.md").read_text("utf-8")
    target = load_target(find_target(str(run), None, ['evaluation.choices=[" stop", " go"]']), CPU)
    choices = Choices((" stop", " go"), "sum")
    expected = choose(target.model, target.objective, choices, ["red. Do:"], 1, make_devices())
    assert answer(target, ["red. Do:"]) == expected
    assert expected[0] in ("stop", "go")


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        (
            {"choices": ["stop", "go"]},
            r"test\.jsonl:3: the answer 'wait' is not among evaluation\.choices \(stop, go\)",
        ),
        ({"choices": ["stop"]}, r"evaluation\.choices: needs at least two answers"),
        ({"choices": ["stop", "stop "]}, r"evaluation\.choices: names the answer 'stop' twice"),
        ({"choices": "stop"}, r"evaluation\.choices: must be from_data or a list"),
        (
            {"content_free_prompt": "Say {} Do:"},
            r"test\.jsonl:1: the prompt 'red\. Do:' does not have the form of 'Say \{\} Do:'",
        ),
        ({"content_free_prompt": "Do:"}, r"evaluation\.content_free_prompt: must be a text with exactly one \{\}"),
        (
            {"choices": None, "best": None, "content_free_prompt": "{} Do:"},
            r"evaluation\.content_free_prompt: there are no choices to calibrate",
        ),
        ({"choices": None}, r"evaluation\.best: accuracy is not in evaluation\.metrics"),
        (
            {"choices": None, "best": None, "metrics": ["macro_f1"]},
            r"objective sft has no metric macro_f1; its metrics are .*evaluation\.choices",
        ),
    ],
)
def test_wrong_choices_are_named(tmp_path: Path, evaluation: dict[str, Any], said: str) -> None:
    recipe = write_recipe(tmp_path, write_tiny_llama(tmp_path / "base"), **evaluation)
    for verb in (
        lambda: evaluate_verb(str(recipe), None, None, None, [], None, []),
        lambda: raise_refusals(make_plan(load_recipe(recipe), device=CPU)[0]),
    ):
        with pytest.raises(TunekitError, match=said) as caught:
            verb()
        assert caught.value.exit_code == 2


@pytest.mark.drawn
def test_calibrated_choices_steer_a_run_resident_streamed_and_resumed(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    recipe = write_recipe(tmp_path, base, content_free_prompt="{} Do:")
    found = {}
    for name, overrides in {"resident": (), "streamed": ("memory.streaming=disk",)}.items():
        train_verb(
            load_recipe(recipe, [f"output.dir={tmp_path / name}", "training.save_steps=3", *overrides]), False, False
        )
        report = json.loads((tmp_path / name / "report.json").read_text("utf-8"))
        found[name] = {entry["step"]: entry["eval"] for entry in report["evaluations"]}
        note = "each evaluation scores 3 prompts in addition to its rows"
        assert any(note in each for each in json.loads((tmp_path / name / "plan.json").read_text("utf-8"))["notes"])
        assert note in (tmp_path / name / "report.md").read_text("utf-8")
    assert found["resident"] == {step: pytest.approx(metrics, rel=1e-4) for step, metrics in found["streamed"].items()}
    after = {}
    for name, overrides in {"calibrated": [], "plain": ["evaluation.content_free_prompt=null"]}.items():
        evaluate_verb(str(tmp_path / "resident"), None, None, None, [], str(tmp_path / "after.json"), overrides)
        after[name] = json.loads((tmp_path / "after.json").read_text("utf-8"))
    name = "expected_calibration_error"
    best = json.loads((tmp_path / "resident" / "report.json").read_text("utf-8"))["best_step"]
    assert after["calibrated"][name] == found["resident"][best][name] != after["plain"][name]
    again = [f"output.dir={tmp_path / 'resident'}", "training.save_steps=3"]
    with pytest.raises(TunekitError, match=r"evaluation\.content_free_prompt: changed since the run"):
        train_verb(load_recipe(recipe, [*again, "evaluation.content_free_prompt=null"]), True, False)
    shutil.rmtree(tmp_path / "resident" / "checkpoints" / "step-000009")
    (tmp_path / "resident" / "status.json").unlink()
    train_verb(load_recipe(recipe, again), True, False)
    report = json.loads((tmp_path / "resident" / "report.json").read_text("utf-8"))
    assert {entry["step"]: entry["eval"] for entry in report["evaluations"]} == found["resident"]


def test_answers_that_only_generate_chooses_from_need_no_evaluation_rows(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_tiny_llama(tmp_path / "base"), best=None)
    raise_refusals(make_plan(load_recipe(recipe, ["~data.eval"]), device=CPU)[0])


def test_a_metric_of_labels_needs_choices(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_tiny_llama(tmp_path / "base"), choices=None, best=None)
    with pytest.raises(
        TunekitError,
        match=r"--metric: objective sft has no metric accuracy; its metrics are .*loss.*evaluation\.choices",
    ):
        evaluate_verb(str(recipe), None, None, None, ["accuracy"], None, [])


def test_a_classifier_has_nothing_to_choose_of(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_tiny_llama(tmp_path / "base"))
    values = json.loads(recipe.read_text("utf-8")) | {"objective": "classify"}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(TunekitError, match="this objective has other rows"):
        load_recipe(recipe)


def test_scores_that_are_not_finite_are_wrong() -> None:
    """They have no bin of probabilities; the step's own check names the rows of a loss that is not finite."""
    scores = torch.tensor([[float("nan")] * 2, [0.0, float("nan")], [2.0, 1.0]])
    sums = {name: value.tolist() for name, value in label_sums(scores, torch.tensor([0, 0, 0])).items()}
    assert (sums["correct"], sums["units"]) == (1, 3)
    assert [is_better("loss", value, None) for value in (float("nan"), float("inf"), 1.0)] == [False, False, True]


def test_sums_of_scores_give_calibration() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.95, 0.05]], dtype=torch.float64).log()
    sums = {name: value.tolist() for name, value in label_sums(scores, torch.tensor([0, 1, 1, 0])).items()}
    assert sums["confusion"] == [[2, 0], [1, 1]]
    assert (sums["correct"], sums["units"]) == (3, 4)
    expected = (abs(0.9 - 1) + abs(0.7 - 0) + abs(0.8 - 1) + abs(0.95 - 1)) / 4  # each in a bin of its own
    assert expected_calibration_error.from_sums(sums) == pytest.approx(expected)
    facts = class_facts({"labels": ["a", "b"], "counts": sums["label_counts"]})
    assert facts["per_class"][0] == {"label": "a", "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "rows": 2}
    with pytest.raises(ValueError, match="no labelled rows"):
        expected_calibration_error.from_sums({"calibration": [[0, 0, 0]]})
