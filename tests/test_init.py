"""`tunekit init DATA`: the recipe fits the rows, is valid, and plans within this machine's memory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel

from tunekit.data.looking.first_look import look_at, proposed_objectives
from tunekit.data.looking.first_recipe import LENGTHS
from tunekit.errors import DataError, InputError, RecipeError, TunekitError, exit_message
from tunekit.init import _labelled, init_verb, models_at_hand
from tunekit.planning.plan import plan as plan_run
from tunekit.planning.prepare import prepare
from tunekit.recipe.load import load_recipe
from tunekit.recipe.reading.first_values import rules
from tunekit.recipe.reading.names import known_names
from tunekit.recipe.reading.schema import schema_text
from tunekit.recipe.reading.shipped import SCHEMA_LINE, SCHEMA_NAME
from tunekit.recipe.recipe import Recipe

OF_FILES = [each.model_fields["method"].default for each in proposed_objectives() if each.medium]
ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "sft": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]},
    "classify": {"text": "so good", "label": "positive"},
    "token_classify": {"words": ["Ada", "left"], "tags": ["B-PER", "O"]},
    "dpo": {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    "kto": {"prompt": "Hi", "completion": "Hello", "label": True},
    "speech": {"path": "hi.wav", "text": "Hi"},
    "audio_classify": {"path": "hi.wav", "label": "greeting"},
}


def write(path: Path, row: dict[str, object], count: int = 40) -> Path:
    rows = (json.dumps(row).replace("Hi", f"Hi {number}") + "\n" for number in range(count))
    path.write_text("".join(rows), encoding="utf-8")
    return path


def init(data: Path | None, output: Path, model: Path | str | None = None, **more: object) -> None:
    values = {"method": None, "quantization": "none", "evaluation": None} | more
    init_verb(None if data is None else str(data), str(output), None if model is None else str(model), **values)  # type: ignore[arg-type]


def tunekit(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tunekit", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def shipped(objective: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{objective.replace('_', '-')}-lora.yaml").recipe


def values_of_files(recipe: Recipe) -> tuple[object, ...]:
    """What init writes for recordings and images as the shipped recipe has it."""
    training = recipe.training
    return recipe.adapter.model_dump()["target_modules"], training.learning_rate, training.scheduler, training.max_steps


@pytest.mark.parametrize("objective", ROWS)
def test_the_objective_follows_from_the_rows(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    data = write(tmp_path / "my rows.jsonl", ROWS[objective])
    init(data, tmp_path / "recipe.yaml", "org/model")
    assert (tmp_path / "recipe.yaml").read_text("utf-8").startswith(f"{SCHEMA_LINE}\n#")
    assert (tmp_path / SCHEMA_NAME).read_text("utf-8") == schema_text()
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert recipe.objective.method == objective
    assert recipe.data.train[0].path == str(data)
    assert recipe.data.max_length == (2048 if objective in OF_FILES else 256)  # the recordings' length is the model's
    assert recipe.model.name_or_path == "org/model"
    if objective in OF_FILES:
        assert values_of_files(recipe) == values_of_files(shipped(objective))
    said = capsys.readouterr().out
    assert f"40 {'recordings' if 'path' in ROWS[objective] else 'rows'} of format" in said
    assert "org/model is not on this machine yet" in said


def test_a_path_is_no_sound_by_itself(tmp_path: Path) -> None:
    look = look_at(str(write(tmp_path / "code.jsonl", {"path": "hi.py", "text": "Hi"})))
    assert look is not None
    assert (look.objective, look.format_name) == ("sft", "text")


def test_a_model_that_is_here_is_planned(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["sft"])
    init(data, tmp_path / "new.yaml", tiny_llama)
    said = capsys.readouterr().out
    assert "steps; predicted peak" in said
    assert load_recipe(tmp_path / "new.yaml").recipe.model.quantization == "none"
    before = (tmp_path / "new.yaml").read_bytes()
    (tmp_path / SCHEMA_NAME).write_text("{}")
    with pytest.raises(RecipeError, match="exists already"):
        init(data, tmp_path / "new.yaml", tiny_llama)
    init(data, tmp_path / "another.yaml", "org/model")
    assert (tmp_path / SCHEMA_NAME).read_text("utf-8") == "{}"
    assert (tmp_path / "new.yaml").read_bytes() == before
    capsys.readouterr()
    init(data, tmp_path / "builtin.yaml", "builtin:tiny-llama")
    assert "steps; predicted peak" in capsys.readouterr().out


def test_little_memory_takes_a_packed_base(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tunekit.machine.memory.available_bytes", lambda device: 1000)
    init(write(tmp_path / "rows.jsonl", ROWS["sft"]), tmp_path / "new.yaml", tiny_llama)
    assert load_recipe(tmp_path / "new.yaml").recipe.model.quantization == "nf4"
    assert "does not fit in memory; set memory.budget" in capsys.readouterr().out


def test_columns_that_hold_questions_and_answers_are_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", {"question": "Hi", "answer": "Hello"})
    init(data, tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml").recipe
    assert recipe.data.train[0].columns == {"question": "prompt", "answer": "completion"}
    assert "40 rows of format prompt_completion (question, answer)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def encoder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(tokenizer) + 5, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("labels", "rows", "steps"), [(2, 50, 300), (77, 400, 1001), (2, 1000, 500), (2, 3000, 1500)])
def test_measured_values_are_written_for_an_encoder(
    labels: int, rows: int, steps: int, encoder: Path, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"text {number}", "label": f"label {number % labels}"}) for number in range(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    init(tmp_path / "rows.jsonl", tmp_path / "r.yaml", encoder)
    training = load_recipe(tmp_path / "r.yaml").recipe.training
    assert (training.learning_rate, training.max_steps, training.epochs) == (1e-3, steps, None)
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == (16, 1)


@pytest.mark.parametrize(
    ("row", "method", "rate"),
    [
        ({"text": "text", "label": ["a", "b"]}, "lora", 1e-3),
        ({"words": ["a", "b"], "tags": ["O", "B-X"]}, "lora", 1e-3),
        ({"text": "text", "label": "a"}, "ia3", 5e-3),
        ({"text": "text", "label": "a"}, "prompt", 0.1),
    ],
)
def test_each_measured_rule_is_written(
    row: dict[str, Any], method: str, rate: float, encoder: Path, tmp_path: Path
) -> None:
    other = {"label": ["b"]} if isinstance(row.get("label"), list) else {"label": "b"} if "label" in row else {}
    lines = [json.dumps({**row, **(other if at % 2 else {})} | _numbered(row, at)) for at in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    init(tmp_path / "rows.jsonl", tmp_path / "r.yaml", encoder, method=method)
    training = load_recipe(tmp_path / "r.yaml").recipe.training
    assert (training.learning_rate, training.max_steps) == (rate, 300)


def _numbered(row: dict[str, Any], at: int) -> dict[str, Any]:
    return {"words": ["a", f"b{at}"]} if "words" in row else {"text": f"text {at}"}


@pytest.mark.parametrize(("base", "labels"), [("tiny_llama", ("good", "bad")), ("encoder", (0.5, 1.5))])
def test_unmeasured_runs_keep_the_published_values(
    base: str, labels: tuple[object, object], request: Any, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"text {number}", "label": labels[number % 2]}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), "utf-8")
    init(tmp_path / "rows.jsonl", tmp_path / "r.yaml", request.getfixturevalue(base))
    training = load_recipe(tmp_path / "r.yaml").recipe.training
    assert (training.learning_rate, training.epochs, training.max_steps) == (2e-4, 3, None)


def test_the_rules_are_shown_with_what_nothing_was_measured_for() -> None:
    shown = tunekit("init", "--show-rules").stdout
    for rule in rules():
        assert {name.split()[0] for name in rule.objectives} <= {*known_names("objectives")}
        assert {*rule.methods} <= {*known_names("adapters")}
        assert all(text in shown for text in rule.measured.values())
    assert "# objectives: audio_classify, " in shown
    assert "dora, " in shown.splitlines()[-2]
    assert "ia3, " not in shown.splitlines()[-2]


def test_one_command_trains_and_reports(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS["sft"], 12)
    command = ("init", "rows.jsonl", "--model", "builtin:tiny-llama", "--train")
    done = tunekit(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/first/status.json").read_text("utf-8"))["finished"]
    assert "final training loss" in done.stdout
    again = tunekit(*command, "--output", "again.yaml", cwd=tmp_path)
    assert again.returncode == 0
    refused = tunekit(*command[:-1], "--minutes", "2", cwd=tmp_path)
    assert (refused.returncode, "add --train" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_one_command_searches_for_better_values(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS["sft"], 24)
    done = tunekit("init", "rows.jsonl", "--model", "builtin:tiny-llama", "--train", "--minutes", "1.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/first/best.yaml").exists()
    assert "final training loss" in done.stdout


RATES = {"sft": 2e-4, "dpo": 5e-6, "kto": 5e-6, "classify": 2e-4, "speech": 1e-3}


@pytest.mark.parametrize("objective", RATES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_learning_rate_is_the_objectives(objective: str, method: str, tmp_path: Path) -> None:
    init(write(tmp_path / "rows.jsonl", ROWS[objective]), tmp_path / "r.yaml", "org/model", method=method)
    rate = RATES[objective] if method == "lora" else min(2e-5, RATES[objective] / 10)
    assert load_recipe(tmp_path / "r.yaml").recipe.training.learning_rate == pytest.approx(rate)


def test_the_learning_rate_is_the_methods(tmp_path: Path) -> None:
    init(write(tmp_path / "rows.jsonl", ROWS["sft"]), tmp_path / "r.yaml", "org/model", method="ia3")
    assert load_recipe(tmp_path / "r.yaml").recipe.training.learning_rate == 5e-3


@pytest.mark.parametrize(("count", "share"), [(2, 0.2), (300, 0.2), (2000, 0.1), (10_000, 0.02)])
def test_enough_rows_are_evaluated_and_the_best_step_is_reached(count: int, share: float, tmp_path: Path) -> None:
    init(write(tmp_path / "rows.jsonl", ROWS["sft"], count), tmp_path / "r.yaml", "org/model")
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert recipe.data.eval == share
    assert (recipe.evaluation.best, recipe.evaluation.samples) == ("eval.loss", 4)
    training = recipe.training
    per_step = training.micro_batch_size * training.gradient_accumulation_steps  # type: ignore[operator]
    steps = training.epochs * count * (1 - share) / per_step  # type: ignore[operator]
    assert training.eval_steps == training.save_steps
    assert training.eval_steps <= max(steps / 9, 1)
    assert steps / training.eval_steps < 12


def test_a_long_text_is_split(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 1000, "utf-8")
    init(tmp_path / "book.txt", tmp_path / "r.yaml", tiny_llama)
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert (recipe.data.excess_length, recipe.data.max_length, recipe.data.eval) == ("split", 1024, None)
    assert (recipe.evaluation.best, recipe.training.save_steps) == (None, 1)


@pytest.mark.parametrize("text", ["שלום עולם", "加牛奶的茶", "ชากับนม", "شاي مع حليب"])
def test_the_models_tokenizer_counts_the_tokens(
    text: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{number} {text * 30}"} for number in range(10, 50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    init(tmp_path / "rows.jsonl", tmp_path / "guessed.yaml", "org/model")
    bound = look_at(str(tmp_path / "rows.jsonl"))
    assert bound is not None
    length = len(rows[0]["text"].encode()) + 1  # a byte each, and the end of the text
    assert 0.95 * length <= bound.longest  # this tokenizer spells spaces too, of which words take few
    capsys.readouterr()
    init(tmp_path / "rows.jsonl", tmp_path / "counted.yaml", tiny_llama)
    said = " ".join(capsys.readouterr().out.split())
    assert f"99.5% of the rows have at most {length:,} tokens, counted with the model's tokenizer" in said
    assert "dropped" not in said
    fitting = next(size for size in LENGTHS if size >= length)
    assert load_recipe(tmp_path / "counted.yaml").recipe.data.max_length == fitting


def test_a_column_that_is_called_as_labels_are_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["text,category", *(f"Where is card {number}?,{('lost', 'late')[number % 2]}" for number in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines), "utf-8")
    init(tmp_path / "rows.csv", tmp_path / "r.yaml", "org/model")
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert (recipe.objective.method, recipe.data.train[0].format) == ("classify", "labels")
    assert recipe.data.train[0].columns == {"category": "label"}
    assert recipe.evaluation.metrics == ("loss", "accuracy", "macro_f1")
    assert "labels are the 2 values of category" in capsys.readouterr().out
    look, asked = look_at(str(tmp_path / "rows.csv")), list[str]()
    assert look is not None
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "no")  # type: ignore[func-returns-value]
    assert _labelled(look, asks=True).objective == "sft"
    assert "The column category has 2 values" in asked[0]


@pytest.mark.parametrize(("values", "told"), [(("good", "bad"), True), ((1, 0, 2), True), (("same",), False)])
def test_a_column_of_few_values_beside_a_text_may_be_its_label(
    values: tuple[object, ...], told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"It was {number}.", "mood": values[number % len(values)]} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    init(tmp_path / "rows.jsonl", tmp_path / "mine.yaml", "org/model")
    out = capsys.readouterr().out
    assert ("columns: {mood: label}" in out.partition("wrote ")[2]) is told  # after the recipe that it changes exists
    assert "columns: {mood" not in out.partition("wrote ")[0]


@pytest.mark.parametrize(
    ("row", "columns", "format_name", "problem_type"),
    [
        ({"text": "Hi", "labels": ["card", "money"]}, {}, "labels", "multi_label_classification"),
        ({"text": "Hi", "labels": '["card", "money"]'}, {}, "labels", "multi_label_classification"),
        ({"text": "Hi", "label": "3.5"}, {}, "labels", "regression"),
        ({"premise": "Hi", "hypothesis": "Hello", "rating": 3.5}, {"rating": "label"}, "label_pairs", "regression"),
    ],
)
def test_lists_numbers_and_pairs_are_recognised_as_labels(
    row: dict[str, object], columns: dict[str, str], format_name: str, problem_type: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", row)
    init(data, tmp_path / "r.yaml", "org/model")
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert recipe.data.train[0].columns == columns
    assert recipe.objective.model_dump()["problem_type"] == problem_type
    look = look_at(str(data))
    assert look is not None
    assert look.format_name == format_name


@pytest.mark.parametrize(
    ("row", "objective", "columns"),
    [
        ({"sentence": "Hi", "label": 1, "idx": 3}, "classify", {"sentence": "text"}),
        ({"review": "Hi", "label": "positive"}, "classify", {"review": "text"}),
        ({**ROWS["sft"], "label": "greeting"}, "sft", {}),
        ({"instruction": "Hi", "output": "Hello", "label": "greeting"}, "sft", {}),
        ({"question": "Hi", "answer": "Hello", "label": 1}, "sft", {"question": "prompt", "answer": "completion"}),
        ({"instruction": "Hi", "output": "Hello", "kto_tag": False}, "kto", {}),
    ],
)
def test_a_label_is_a_rating_only_beside_an_answer(
    row: dict[str, object], objective: str, columns: dict[str, str], tmp_path: Path
) -> None:
    init(write(tmp_path / "rows.jsonl", row), tmp_path / "r.yaml", "org/model")
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert (recipe.objective.method, recipe.data.train[0].columns) == (objective, columns)
    write(tmp_path / "rows.jsonl", {"title": "Hi", "body": "Hello", "label": 1})
    with pytest.raises(DataError, match="the first row has 'title', 'body', 'label', which fits no format"):
        look_at(str(tmp_path / "rows.jsonl"))


def test_any_name_of_a_column_gives_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"Where is card {number}?,{number % 2},{('lost', 'late')[number % 2]}" for number in range(40)]
    for header in ('text,"my\ncategory",sentiment', "text,my\x07category,sentiment"):
        (tmp_path / "rows.csv").write_text("\n".join([header, *rows]), "utf-8")
        (tmp_path / "r.yaml").unlink(missing_ok=True)
        init(tmp_path / "rows.csv", tmp_path / "r.yaml", "org/model")
        assert load_recipe(tmp_path / "r.yaml").recipe.data.train[0].columns == {"sentiment": "label"}
    (tmp_path / "rows.csv").write_text("\n".join(["text,it's,[kind]", *rows]), "utf-8")
    init(tmp_path / "rows.csv", tmp_path / "s.yaml", "org/model")
    notes = " ".join(capsys.readouterr().out.split()).split("data.train: ")
    sources = [yaml.safe_load(note[: note.index("}}") + 2]) for note in notes if note.startswith("{path")]
    assert [source["columns"] for source in sources] == [{"it's": "label"}, {"[kind]": "label"}]


def test_the_label_of_pairs_is_the_only_column_of_few_values(tmp_path: Path) -> None:
    lines = [f"{number},Question {number}?,Another {number}?,{number % 2}" for number in range(40)]
    data = tmp_path / "pairs.csv"
    data.write_text("\n".join(["id,question1,question2,equal", *lines]), "utf-8")
    init(data, tmp_path / "r.yaml", "org/model")
    assert load_recipe(tmp_path / "r.yaml").recipe.data.train[0].columns == {"equal": "label"}
    data.write_text("\n".join(["id,question1,question2", *(line[:-2] for line in lines)]), "utf-8")
    look = look_at(str(data))  # two texts without a label
    assert look is not None
    assert look.objective == "embed"
    lines = [f"{line},{line[-1]}" for line in lines]
    data.write_text("\n".join(["id,question1,question2,equal,same", *lines]), "utf-8")
    with pytest.raises(
        DataError, match="two texts, and equal or same could be their label; rename the column to label"
    ) as caught:
        look_at(str(data))
    assert "data.train" not in str(caught.value)  # there is no recipe yet


@pytest.mark.parametrize(
    ("row", "loss", "reason", "metric"),
    [
        ({"query": "Hi", "document": "Hello"}, "multiple_negatives_ranking", "64 rows", "ndcg_at_10"),
        ({"anchor": "Hi", "positive": "Hello", "negative": "Bye"}, "multiple_negatives_ranking", "64", "ndcg_at_10"),
        ({"sentence1": "Hi", "sentence2": "Hello"}, "multiple_negatives_ranking", "are the negatives", "ndcg_at_10"),
        ({"query": "Hi", "document": "Hello", "score": 0.3}, "cosent", "order of the similarities", "spearman"),
        ({"sentence1": "Hi", "sentence2": "Hello", "similarity": 4.5}, "cosent", "order", "spearman"),
        ({"query": "Hi", "passage": "Hello", "label": 1}, "contrastive", "similar or not", "average_precision"),
        ({"query": "Hi", "document": "A", "negative": "B", "scores": [3.5, 1]}, "margin_mse", "teacher", "ndcg_at_10"),
    ],
)
def test_rows_of_texts_get_the_loss_that_reads_them(
    row: dict[str, object], loss: str, reason: str, metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(write(tmp_path / "rows.jsonl", row), tmp_path / "r.yaml")
    recipe, said = load_recipe(tmp_path / "r.yaml").recipe, " ".join(capsys.readouterr().out.split())
    assert recipe.objective.model_dump()["loss"] == loss
    assert recipe.model.name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    training = recipe.training
    assert training.micro_batch_size * training.gradient_accumulation_steps >= 64
    assert recipe.evaluation.best == f"eval.{metric}"
    assert f"objective.loss: {loss}, for " in said
    assert reason in said


def test_numbers_beside_a_text_are_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(write(tmp_path / "rows.jsonl", {"text": "Hi", "score": 3.5}), tmp_path / "r.yaml", "org/model")
    output = " ".join(capsys.readouterr().out.split())
    assert "score has numbers: to predict them" in output
    assert "problem_type: regression}, and data.train: {path: ..., format: labels, columns: {score: label}}" in output


def test_long_rows_get_room(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", {"text": "word " * 1000})
    look = look_at(str(tmp_path / "rows.jsonl"))
    assert look is not None
    assert 1300 < look.longest < 1600
    init(tmp_path / "rows.jsonl", tmp_path / "r.yaml", "org/model")
    assert load_recipe(tmp_path / "r.yaml").recipe.data.max_length == 2048


def test_in_a_terminal_four_questions_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    data = write(tmp_path / "rows.jsonl", ROWS["sft"])
    asked: list[str] = []
    answers = iter([str(data), "org/model", "full", "0"])

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    init(None, tmp_path / "r.yaml")
    assert len(asked) == 4
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert (recipe.adapter.method, recipe.data.eval, recipe.training.learning_rate) == ("full", None, 2e-5)


def test_names_are_quoted_for_yaml_and_for_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "my #1.yaml"
    init(write(tmp_path / "rows.jsonl", ROWS["sft"]), recipe, "org/model")
    assert load_recipe(recipe).recipe.output.dir.endswith("runs/my #1")
    assert f"tunekit preview '{recipe}'" in capsys.readouterr().out


def test_an_interrupted_init_leaves_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunekit.init.fitted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        init(write(tmp_path / "rows.jsonl", ROWS["sft"]), tmp_path / "r.yaml", "org/model")
    assert not (tmp_path / "r.yaml").exists()


def test_what_is_wrong_is_said_and_nothing_written(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", {"x": 1})
    out = tmp_path / "r.yaml"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the first row has 'x', which fits no format") as refused:
        init(data, out, "org/model")
    assert "rename the fields in the file, or copy a recipe with `tunekit recipes sft-lora --copy" in str(refused.value)
    with pytest.raises(DataError, match="there is no file"):
        init(tmp_path / "absent.jsonl", out, "org/model")
    good = write(tmp_path / "good.jsonl", ROWS["sft"])
    with pytest.raises(InputError, match="no method 'lorra'"):
        init(good, out, "org/model", method="lorra")
    with pytest.raises(InputError, match="not a share of the rows"):
        init(good, out, "org/model", evaluation=0.6)
    with pytest.raises(RecipeError) as caught:
        init(good, out, "org/model", quantization="nf5")
    text, _ = exit_message(caught.value)
    assert text.startswith(f"{out} is not written, because:\nmodel.quantization: ")  # no line of a removed file
    assert not out.exists()
    assert not (tmp_path / SCHEMA_NAME).exists()


def test_rows_beside_images_are_named_although_no_recipe_is_written(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mixed := tmp_path / "mixed").mkdir()
    (mixed / "a.png").write_bytes(b"only its name is read")
    (mixed / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(TunekitError):
        init(mixed, tmp_path / "recipe.yaml", tiny_llama)
    said = " ".join("".join(capsys.readouterr()).split())
    assert "mixed: the rows of rows.jsonl are not read, because the folder contains media; to train" in said


def test_models_of_the_hubs_cache_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    files = {"models--org--one": "config.json", "models--org--half": "readme", "datasets--a--b": "config.json"}
    for name, file in files.items():
        (tmp_path / name / "snapshots" / "x").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "x" / file).touch()
    assert models_at_hand() == ["org/one"]


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ("audio_classify", ("rings/a.wav", "knocks/b.flac")),
        ("image_classify", ("cats/a.png", "dogs/b.jpg")),
        ("dreambooth", ("a.png", "b.jpg")),
    ],
)
def test_a_folder_of_files_is_no_text(
    objective: str, names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"only its name is read")
    init(tmp_path / "photos", tmp_path / "recipe.yaml")
    recipe = load_recipe(tmp_path / "recipe.yaml").recipe
    assert recipe.objective.method == objective
    example = shipped(objective)
    assert recipe.model.name_or_path == example.model.name_or_path
    assert values_of_files(recipe) == values_of_files(example)
    text, said = (tmp_path / "recipe.yaml").read_text("utf-8"), capsys.readouterr().out
    assert "token" not in text + said
    assert "max_length" not in text
    unit = "recordings" if objective == "audio_classify" else "images"
    assert f"2 {unit} of format" in text
    assert f"a folder of {unit}" in text
    assert ("quantization" in text) == (objective != "dreambooth")  # a pipeline's weights are never packed
    assert ("write [photos] to measure the loss on the training images" in text) == (objective == "dreambooth")


def test_files_that_are_no_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.HEIC", "c.txt", "d.txt", "e.txt", "f.txt", ".hidden"):
        (tmp_path / "photos" / name).write_bytes(b"only its name is read")
    init(tmp_path / "photos", tmp_path / "recipe.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("1 image of format image")
    assert "5 files are not read, because the format is not supported: b.HEIC, c.txt, d.txt, e.txt" in said
    assert "and 1 more; convert .heic to .png or .jpg" in said
    assert "hidden" not in said


def test_recordings_without_transcripts_are_told_so(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(b"only its name is read")
    with pytest.raises(DataError, match=r"metadata\.jsonl") as caught:
        init(tmp_path / "sounds", tmp_path / "recipe.yaml")
    assert "{file_name: FILE, text: ...} for each file; or " in str(caught.value)
    assert "{file_name: FILE, label: ...} for each file, or make one folder per class with its files" in str(
        caught.value
    )


def test_columns_that_are_not_read_and_the_schema_are_named(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}] for n in range(12)]
    rows = [{"messages": each, "audio": "a.wav", "id": number} for number, each in enumerate(turns)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    init_verb(str(tmp_path / "chat.jsonl"), str(tmp_path / "recipe.yaml"), str(tiny_llama), "lora", "none", 0.1)
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: the format chat does not read 'audio', 'id'" in said
    assert f"recipe.yaml and {tmp_path}/{SCHEMA_NAME}, with which editors check and complete" in said.replace("/ ", "/")
    assert said.count("of the rows have at most") == 1
    assert "at most about" not in said


def test_advice_about_the_rows_can_be_followed(tiny_llama: Path, tmp_path: Path) -> None:
    """The recipe is written, although it cannot be planned before its owner decides about the reasoning."""
    answer = {"role": "assistant", "content": "Hello", "thinking": "I greet."}
    rows = write(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "Hi"}, answer]})
    out = tmp_path / "r.yaml"
    with pytest.raises(DataError) as caught:
        init(rows, out, tiny_llama)
    lines = exit_message(caught.value)[0].splitlines()
    assert lines[0].startswith(f"wrote {out} and {tmp_path / SCHEMA_NAME}, with which editors")
    assert lines[0].endswith("; the run can be planned after this change of the recipe:")
    assert "does not read 'thinking' of a message" in lines[1]
    assert "data.reasoning: drop removes it" in lines[1]
    out.write_text(out.read_text("utf-8").replace("\ndata:", "\ndata:\n  reasoning: drop"), "utf-8")
    plan, _ = plan_run(prepare(load_recipe(out), torch.device("cpu")))
    assert (plan.rows.training.dropped, plan.refusals) == (0, [])


IMAGE_ROWS: dict[str, dict[str, Any]] = {
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ROWS["sft"]["messages"][1]]
    },  # type: ignore[index]
    "LLaVA": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "ok"}],
    },
    "column": {**ROWS["sft"], "images": ["data:image/png;base64," + "QUJD" * 10_000]},
}


@pytest.mark.parametrize("form", IMAGE_ROWS)
def test_conversations_with_images_get_a_base_that_reads_them(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(write(tmp_path / "rows.jsonl", IMAGE_ROWS[form]), tmp_path / "first.yaml")
    recipe = load_recipe(tmp_path / "first.yaml").recipe
    assert recipe.model.name_or_path == load_recipe(ROOT / "recipes" / "vision-lora.yaml").recipe.model.name_or_path
    assert recipe.objective.method == "sft"
    assert recipe.data.max_length == 2048  # room for the tokens of the image, but not for its bytes
    assert recipe.data.image_tokens == 1280  # these images cannot be read
    assert "40 rows with images of format" in capsys.readouterr().out


def test_the_limit_of_images_is_that_of_the_largest_image(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")  # 15 x 8 tokens of 28 pixels
    init(write(tmp_path / "rows.jsonl", IMAGE_ROWS["parts"]), tmp_path / "first.yaml")
    assert load_recipe(tmp_path / "first.yaml").recipe.data.image_tokens == 128
    init(write(tmp_path / "text.jsonl", ROWS["sft"]), tmp_path / "text.yaml")
    assert "image_tokens" not in (tmp_path / "text.yaml").read_text()


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
def test_a_base_with_a_lower_limit_keeps_it(model_type: str, tmp_path: Path) -> None:
    """Of 16 tokens, and of 4 tokens."""
    from tests.support.image_text_case import write_image_rows, write_image_text

    folder = write_image_text(model_type, tmp_path / "model")
    init(write_image_rows(tmp_path), tmp_path / "first.yaml", model=str(folder))
    assert "image_tokens" not in (tmp_path / "first.yaml").read_text()
