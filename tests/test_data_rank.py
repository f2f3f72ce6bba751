"""`tunekit data rank`: planted wrong rows of tiny runs are listed, rows are kept, and bad input is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_tiny_llama
from tests.objectives.test_classify import bert as bert
from tests.objectives.test_classify import llama as llama
from tests.objectives.test_classify import train, write_recipe
from tests.objectives.test_dpo import pairs as pair_rows
from tests.objectives.test_dpo import train as train_pairs
from tests.objectives.test_dpo import write_recipe as write_pair_recipe
from tests.objectives.test_problem_types import write_recipe as write_numbers
from tests.support.train_case import write_recipe as write_chat_recipe
from tunekit.artifacts.report.values import read_run
from tunekit.contracts import Batch, Objective, Row, RowLayout
from tunekit.data.rows import RowSet
from tunekit.data_rank import _labels, _run_rows, data_rank_verb
from tunekit.errors import AdapterError, InputError, ModelError, ResourceError, RunFolderError
from tunekit.evaluation.row_listing import Ranking
from tunekit.evaluation.row_ranking import WRONG
from tunekit.evaluation.row_states import RowReader
from tunekit.machine.devices import make_devices
from tunekit.recipe.load import load_recipe
from tunekit.targets.states import load_states
from tunekit.targets.target import LoadedTarget, find_target
from tunekit.training.influence import SIZE, _short_together, make_projection, row_gradients
from tunekit.training.split_gradients import Take, split_gradients
from tunekit.tuned.model import ModelRun, TunedModel

SAVES = {"save_steps": 7, "keep_checkpoints": 9}
WRONG_LINES = (8, 20)
SPLIT = {"excess_length": "split", "max_length": 48, "eval": None}


@pytest.fixture(scope="module")
def classifier(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 42 rows, of which two have a wrong label."""
    folder = tmp_path_factory.mktemp("rank")
    recipe = write_recipe(folder, bert, training={**SAVES, "epochs": 4})
    lines = (folder / "train.jsonl").read_text("utf-8").splitlines()
    for line in WRONG_LINES:
        row = json.loads(lines[line - 1])
        lines[line - 1] = json.dumps({**row, "label": {"yes": "no", "no": "perhaps", "perhaps": "yes"}[row["label"]]})
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return train(recipe)


@pytest.fixture(scope="module")
def chat(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return train(write_chat_recipe(folder, tiny_llama, training={"save_steps": 3, "keep_checkpoints": 3}))


def ranked(run: Path, **options: Any) -> dict[str, Any]:
    file = run.parent / "rank.json"
    data_rank_verb(
        *(str(run), options.get("keep"), options.get("output"), options.get("influence", False), str(file)),
        allow_code=options.get("allow_code", False),
    )
    return dict(json.loads(file.read_text("utf-8")))


@pytest.mark.slow
def test_planted_wrong_labels_are_first(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (classifier.parent / "train.jsonl").read_bytes()
    result = ranked(classifier, keep=0.9, output=str(classifier.parent / "kept.jsonl"), influence=True)
    assert {f"train.jsonl:{line}" for line in WRONG_LINES} == set(result["lists"][WRONG][:2])
    assert result["steps"] == [7, 14, 21, 28]
    assert {"before", "after", "mean", "spread", "margin", "disagreement", "influence", "wrong"} < set(
        result["rows"][0]
    )
    page, shown = (classifier / "rank.html").read_text("utf-8"), capsys.readouterr().out
    assert all(f"train.jsonl:{line}" in text for line in WRONG_LINES for text in (page, shown))
    rows = [json.loads(line) for line in (classifier.parent / "kept.jsonl").read_text("utf-8").splitlines()]
    lines = before.decode().splitlines()
    left = {int(place.rpartition(":")[2]) for place in result["kept"]["left_out"]}
    assert set(WRONG_LINES) <= left
    assert rows == [json.loads(text) for number, text in enumerate(lines, 1) if number not in left]
    assert (classifier.parent / "train.jsonl").read_bytes() == before
    with pytest.raises(InputError, match=r"kept\.jsonl: the file exists"):
        ranked(classifier, keep=0.9, output=str(classifier.parent / "kept.jsonl"))


@pytest.mark.slow
def test_losses_are_those_of_an_evaluation(chat: Path) -> None:
    """The mean loss of the rows, weighted by their tokens, is the loss of `eval` on the same rows."""
    from tunekit.evaluate import evaluate_verb

    result = ranked(chat)
    assert "margin" in result["rows"][0]
    assert "likely wrong" in result["lists"]
    evaluate_verb(str(chat), None, str(chat.parent / "train.jsonl"), None, [], str(chat.parent / "eval.json"), [])
    held = json.loads((chat / "evaluation_rows.json").read_text("utf-8"))
    expected = json.loads((chat.parent / "eval.json").read_text("utf-8"))
    total = expected["loss"] * expected["supervised_tokens"] - sum(held["losses"])
    target = find_target(str(chat), None, [])
    rows = _run_rows(read_run(chat), load_recipe(chat / "recipe.yaml"), target)
    after = [row["after"] for row in result["rows"]]
    assert np.dot(after, rows.train.supervised) == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["prompt", "init_from", "regression", "lora_fa", "loftq"])
def test_losses_before_and_after_are_those_of_the_run(
    start: str, chat: Path, bert: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run measured the same rows at step 0 and at its end. Before training, the model is the base with a prompt,
    with the adapter that the run continues, with LoftQ's correction of a quantized base, or with a head that starts at
    the mean number."""
    few = {"save_steps": 3, "keep_checkpoints": 9, "epochs": 1}
    if start == "regression":
        recipe = write_numbers(tmp_path, bert, "three", data={"eval": "train.jsonl"}, training=few)
    else:
        settings = json.loads((chat / "adapter" / "tunekit.json").read_text("utf-8"))["settings"]
        adapter = {"method": start}
        if start == "init_from":
            adapter = {**{key: settings[key] for key in ("method", "r", "alpha")}, start: str(chat / "adapter")}
        if start == "loftq":
            adapter = {"method": "lora", "r": 4, "start": start}
        model = {"quantization": "nf4" if start == "loftq" else "none"}
        recipe = write_chat_recipe(tmp_path, tiny_llama, model=model, data={"eval": "train.jsonl"}, training=few)
        recipe.write_text(json.dumps({**json.loads(recipe.read_text("utf-8")), "adapter": adapter}), encoding="utf-8")
    run = train(recipe)
    rows, measured = ranked(run, influence=True)["rows"], json.loads((run / "evaluation_rows.json").read_text("utf-8"))
    for name, losses in (("before", measured["before"]), ("after", measured["losses"])):
        expected = np.divide(losses, measured["units"])
        assert np.allclose([row[name] for row in rows], expected, atol=1e-5)
    assert any(row["disagreement"] for row in rows)  # numbers are not classes
    said = capsys.readouterr().out
    assert ", and before training: " in said
    assert "rows have no classes, so 'likely wrong' lists the 10% of the rows with the highest scores" in said
    assert "next: read the rows in rank.html and correct wrong ones; if many are wrong, leave a" in said
    if start == "init_from":
        shutil.move(chat / "adapter", tmp_path / "moved")
        result = ranked(run)
        shutil.move(tmp_path / "moved", chat / "adapter")
        assert "before training" not in capsys.readouterr().out  # the cost counts only what is computed
        assert "teaches nothing" not in result["lists"]
        assert "before" not in result["rows"][0]


@pytest.mark.slow
def test_hidden_states_of_a_prompted_classifier_are_those_of_its_text(bert: Path, tmp_path: Path) -> None:
    """Without the positions of the prompt, which come before each row."""
    recipe = write_recipe(tmp_path, bert, training={"epochs": 1, "save_steps": 7}, data={"max_length": 40})
    prompt = {"method": "prompt", "num_virtual_tokens": 5}
    recipe.write_text(json.dumps({**json.loads(recipe.read_text("utf-8")), "adapter": prompt}), encoding="utf-8")
    rows, loaded = loaded_run(train(recipe))
    model, outputs = loaded.model, list[torch.Tensor]()
    read = RowReader(model, rows.objective, make_devices(), rows.train, 4).read().hidden
    layer = model.base.family.layers(model.base.net)[-1][1]
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for number in range(4):
        batch = rows.objective.rows.collate([[rows.train[number]]])
        with torch.no_grad(), model.training_mode(False):
            model.output(batch.inputs)
        (states,) = outputs[-1]  # (5 + T, D)
        assert len(states) == 5 + rows.train[number].size
        assert np.allclose(read[number], states[5:].mean(dim=0), atol=1e-5)


@pytest.mark.slow
def test_gradients_of_rows_add_up_to_that_of_all_rows(chat: Path) -> None:
    """Projections of rows' gradients against autograd over one batch of all rows."""
    rows, loaded = loaded_run(chat)
    model = loaded.model
    assert model.adapter is not None
    projection = make_projection(model.adapter.trained())
    gradients = row_gradients(model, rows.objective, rows.train, projection)
    batch = rows.objective.rows.collate([[rows.train[number]] for number in range(len(rows.train))])
    with model.training_mode(False):
        rows.objective.loss.loss(model.output(batch.inputs), batch).total.sum().backward()
    expected = torch.zeros(1, SIZE)
    for name, parameter in model.adapter.trained().items():
        assert parameter.grad is not None
        projection.add(name, parameter.grad, expected)
    summed = (gradients * np.asarray(rows.train.supervised)[:, None]).sum(axis=0)
    assert np.allclose(summed, expected[0].numpy(), atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def pairs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pairs(write_pair_recipe(tmp_path_factory.mktemp("pairs"), tiny_llama, pair_rows(8)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "chat", "pairs"])
def test_rows_together_have_the_gradients_of_rows_alone(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a classifier (rows without padding, a trained head), a decoder, and pairs (two lines for each row). If rows
    together give different gradients, each row is computed alone."""
    run: Path = request.getfixturevalue(name)
    rows, loaded = loaded_run(run)
    model = loaded.model
    assert model.adapter is not None
    projection = make_projection(model.adapter.trained())
    counts = []

    def split(model: TunedModel, objective: Objective, some: Sequence[Row], take: Take) -> None:
        counts.append(len(some))
        split_gradients(model, objective, some, take)

    monkeypatch.setattr("tunekit.training.influence.split_gradients", split)
    together = row_gradients(model, rows.objective, rows.train, projection)
    assert max(counts) > 2
    monkeypatch.setattr("tunekit.training.influence.can_split", lambda model: False)
    alone = row_gradients(model, rows.objective, rows.train, projection)
    assert np.allclose(together, alone, rtol=1e-4, atol=1e-5 * float(np.abs(alone).max()))
    monkeypatch.setattr("tunekit.training.influence.can_split", lambda model: True)
    monkeypatch.setattr("tunekit.training.influence.split_gradients", lambda *arguments: None)
    assert np.allclose(row_gradients(model, rows.objective, rows.train, projection), alone, atol=1e-7)


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (RowLayout({}, (), sizes=2), [(0, 2, 1)]),
        (RowLayout({}, (), sizes=2, minimum=(300, 0)), [(0,), (2,), (1,)]),  # Whisper's encoder reads 30 seconds
        (RowLayout({}, (), sizes=2, paired=True), [(0, 2), (1,)]),
    ],
)
def test_rows_that_are_computed_together_have_few_tokens_and_frames(
    layout: RowLayout, groups: list[tuple[int, ...]]
) -> None:
    """16 recordings of a few tokens needed more than twice the memory of the training."""
    rows: Any = SimpleNamespace(sizes=np.array([[5, 1], [4, 150], [5, 2]]))
    assert [tuple(group) for group in _short_together(rows, layout)] == groups


@pytest.mark.slow
def test_the_reference_scores_of_a_pair_are_computed_once(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All states share them, before training too; the losses are those without the cache."""
    counts: list[int] = []
    reference = ModelRun.reference

    def counted(run: ModelRun, batches: Sequence[Batch], *values: Any) -> list[Any]:
        counts.extend(len(batch.rows) for batch in batches)
        return reference(run, batches, *values)

    monkeypatch.setattr(ModelRun, "reference", counted)
    shutil.rmtree(pairs.parent / "copy", ignore_errors=True)
    shutil.copytree(pairs, pairs.parent / "copy")
    result = ranked(pairs.parent / "copy", influence=True)
    held = len(json.loads((pairs / "evaluation_rows.json").read_text("utf-8"))["losses"])
    assert sum(counts) == len(result["rows"]) + held
    rows, loaded = loaded_run(pairs)
    reader = RowReader(loaded.model, rows.objective, make_devices(), rows.train, 2)
    before, first = reader.read(before=True).losses, reader.read().losses
    assert sum(counts) > 2 * len(result["rows"])
    assert [row["before"] for row in result["rows"]] == pytest.approx(before, rel=1e-5)
    assert [row["after"] for row in result["rows"]] == pytest.approx(first, rel=1e-5)


def loaded_run(run: Path) -> tuple[RowSet, LoadedTarget]:
    """The rows of a run, and its model in the first of its states."""
    target = find_target(str(run), None, [])
    loaded, states = load_states(target, make_devices().device, {})
    states[0].load()
    return _run_rows(read_run(run), load_recipe(run / "recipe.yaml"), target), loaded


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_streamed_base_gives_the_same_gradients_and_losses(
    chat: Path, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunekit.training.influence.can_split", lambda model: False)  # rows together round differently
    target = find_target(str(chat), None, [])
    assert target.recipe is not None
    rows = _run_rows(read_run(chat), load_recipe(chat / "recipe.yaml"), target)
    memory = target.recipe.memory.model_copy(update={"streaming": tier})
    streamed = replace(target, recipe=target.recipe.model_copy(update={"memory": memory}))
    both = []
    for each in (target, streamed):
        loaded, states = load_states(each, make_devices().device, {})
        states[0].load()
        model = loaded.model
        assert model.adapter is not None
        assert (model.slots is None) == (each is target)
        gradients = row_gradients(model, rows.objective, rows.train, make_projection(model.adapter.trained()))
        values = RowReader(model, rows.objective, make_devices(), rows.train, 4).read()
        both.append((gradients, values.losses, values.margins, values.hidden))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*both, strict=True))


@pytest.mark.slow
def test_what_cannot_be_ranked_is_refused(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(chat.parent, tmp_path / "same")
    run = tmp_path / "same" / "run"
    shutil.rmtree(run / "checkpoints")
    assert ranked(run)["steps"] == [6]
    assert "the run has no checkpoints of an adapter: only its result is used" in capsys.readouterr().out
    data = run.parent / "train.jsonl"
    data.write_text(data.read_text("utf-8").replace("say", "tell", 1), encoding="utf-8")
    with pytest.raises(InputError, match="the rows have changed since the run"):
        ranked(run)


@pytest.mark.slow
def test_another_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """With and without checkpoints, and if the base is gone."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    run = train(write_chat_recipe(tmp_path, base, rows=9))
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"which was not found; put the run's base back in its place"):
        ranked(run)
    base.mkdir()
    write_tiny_llama(base, seed=9)
    with pytest.raises(RunFolderError, match=r"trained on a different base than .*; put the run's base back"):
        ranked(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(AdapterError, match=r"trained on a different base .*; put the run's base back"):
        ranked(run)


@pytest.mark.slow
def test_without_evaluation_rows_only_influence_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    run = train(write_chat_recipe(tmp_path, tiny_llama, rows=5, data={"eval": None}, training={"eval_steps": 100}))
    with pytest.raises(InputError, match="the run has none; leave --influence out"):
        ranked(run, influence=True)
    assert ranked(run)["lists"]


@pytest.mark.slow
def test_another_teacher_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "teacher")
    teacher = {"name_or_path": str(tmp_path / "teacher"), "dtype": "float32", "trust_remote_code": True}
    run = train(write_chat_recipe(tmp_path, tiny_llama, rows=9, objective={"method": "distill", "teacher": teacher}))
    environment = json.loads((run / "environment.json").read_text("utf-8"))
    del environment["fingerprint"]["code"]["objective.teacher.trust_remote_code"]  # as in a run of an older version
    (run / "environment.json").write_text(json.dumps(environment), "utf-8")
    assert ranked(run, allow_code=True)["rows"]
    write_tiny_llama(tmp_path / "teacher", seed=9)
    with pytest.raises(InputError, match=r"objective\.teacher\.name_or_path: its files have changed since the run"):
        ranked(run, allow_code=True)


@pytest.mark.slow
def test_a_loss_of_samples_is_refused_before_the_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.objectives.test_grpo import write_prompts

    run = train(write_prompts(tmp_path, tiny_llama, training={"epochs": 1, "save_steps": 4}))
    monkeypatch.setattr(RowReader, "read", None)
    with pytest.raises(InputError, match="the loss of the objective grpo is not a sum over training rows"):
        ranked(run, allow_code=True)  # the reward's


@pytest.mark.slow
def test_one_evaluation_row_has_no_two_halves(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chat_recipe(tmp_path, tiny_llama, rows=1)
    (tmp_path / "train.jsonl").rename(tmp_path / "one.jsonl")
    run = train(write_chat_recipe(tmp_path, tiny_llama, rows=5, data={"eval": "one.jsonl"}))
    assert "influence" in ranked(run, influence=True)["rows"][0]
    assert "two halves of the evaluation rows" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_checkpoint_is_found_before_the_work(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(chat.parent, tmp_path / "same")
    run = tmp_path / "same" / "run"
    damaged = run / "checkpoints" / "step-000003"
    (damaged / "tensors.safetensors").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr("tunekit.data_rank.load_states", None)
        with pytest.raises(RunFolderError, match=r"is damaged.*remove its folder: then only the other checkpoints"):
            ranked(run)
    shutil.rmtree(damaged)
    assert ranked(run)["steps"] == [6]


@pytest.mark.slow
def test_a_split_row_is_kept_or_left_out_as_a_whole(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares count the rows of the files, as training does."""
    recipe = write_chat_recipe(tmp_path, tiny_llama, rows=10, data=SPLIT, training={"eval_steps": 100})
    run = train(recipe)
    assert len(ranked(run)["rows"]) > 10
    for keep, count in ((0.9, 9), (0.5, 5), (0.1, 1)):
        kept = ranked(run, keep=keep, output=str(tmp_path / f"{count}.jsonl"))["kept"]
        lines = (tmp_path / f"{count}.jsonl").read_text("utf-8").splitlines()
        assert (kept["rows"], len(lines), len(set(kept["left_out"]))) == (count, count, 10 - count)
        left = {int(place.rpartition(":")[2]) for place in kept["left_out"]}
        rows = (tmp_path / "train.jsonl").read_text("utf-8").splitlines()
        assert {json.dumps(json.loads(line)) for line in lines}.isdisjoint(rows[number - 1] for number in left)
    said = capsys.readouterr().out
    assert "1 of 10 training rows" in said
    assert "of the 9 rows left out are in no list" in said
    monkeypatch.setattr("tunekit.data_rank.load_states", None)
    with pytest.raises(InputError, match=r"--keep 0\.01 leaves none of 10 training rows"):
        ranked(run, keep=0.01, output=str(tmp_path / "none.jsonl"))


@pytest.mark.slow
def test_rows_that_one_file_cannot_contain_are_found_before_the_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chat_recipe(tmp_path, tiny_llama, rows=5)
    (tmp_path / "more.jsonl").write_text('{"prompt": "How far is it?", "completion": "A mile."}\n', encoding="utf-8")
    data = {"train": ["train.jsonl", "more.jsonl"], "eval": None}
    run = train(write_chat_recipe(tmp_path, tiny_llama, rows=5, data=data, training={"eval_steps": 100}))
    monkeypatch.setattr("tunekit.data_rank.load_states", None)
    with pytest.raises(InputError, match="--output writes one file, but the sources have the formats"):
        ranked(run, keep=0.8, output=str(tmp_path / "kept.jsonl"))

    def read_only(kind: str, path: Path, action: Any) -> Any:
        if path.parent == run:
            raise OSError(errno.EROFS, "Read-only file system")
        return action()

    monkeypatch.setattr("tunekit.files.durable.perform", read_only)
    with pytest.raises(RunFolderError, match=r"cannot create .*rank\.html"):
        ranked(run)


@pytest.mark.slow
def test_a_full_disk_leaves_the_results(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(option: str, name: str, parts: object) -> None:
        raise ResourceError(f"no room for {name}")

    monkeypatch.setattr("tunekit.data_rank.write_rows_file", full)
    (chat.parent / "rank.json").unlink(missing_ok=True)
    with pytest.raises(ResourceError, match="no room"):
        ranked(chat, keep=0.8, output=str(tmp_path / "kept.jsonl"))
    result = json.loads((chat.parent / "rank.json").read_text("utf-8"))
    assert result["lists"]
    assert result["kept"] is None


def test_rows_of_words_or_numbers_have_no_classes() -> None:
    for names, units, expected in (
        (["a"], 1, ["a"] * 4),
        (["a", "b"], 1, ["['a', 'b']"] * 4),
        (["a"], 3, []),  # of three words
        ([], 1, []),  # numbers
    ):
        kind = SimpleNamespace(labels=SimpleNamespace(names=("a", "b")), labels_of=lambda row, names=names: names)
        objective = SimpleNamespace(answering=SimpleNamespace(kind="label"), rows=kind)

        class Rows(list[int]):
            supervised = np.full(4, units)

        rows: Any = SimpleNamespace(objective=objective, train=Rows(range(4)))
        assert _labels(rows) == expected


def test_keep_needs_an_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--output and --json both name"):
        ranked(tmp_path / "run", keep=0.8, output=str(tmp_path / "rank.json"))
    with pytest.raises(InputError, match="--keep and --output need each other"):
        ranked(tmp_path / "run", keep=0.8)
    with pytest.raises(InputError, match="does not contain a run"):
        ranked(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a short row", "a short row"),
        (
            "<|im_start|>user What is the capital of Jordan?<|im_end|> Amman",
            "<|im_start|>user What is the capital of ...",
        ),
        ("長" * 61, "長" * 56 + " ..."),
    ],
)
def test_the_text_of_a_row_is_cut_between_words(text: str, shown: str) -> None:
    """Only trained text is shown, if there is any."""
    for pieces in ([(text, True)], [(text, False)], [("a system prompt", False), (text, True), ("\n", False)]):
        ranking: Any = SimpleNamespace(_text=lambda number, pieces=pieces: pieces)
        assert Ranking.short_text(ranking, 0) == shown
