"""Tasks of lm-eval: scores as lm-eval's own model class computes them, changes by tuning, and what is refused.

Tests that need lm-eval run in a child, which finds it among TUNEKIT_PROGRAMS too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.train_case import in_child, train_in_child, write_recipe
from tunekit.artifacts.report.markdown import markdown_page
from tunekit.artifacts.report.run_report import run_report
from tunekit.artifacts.report.tasks import score_table
from tunekit.artifacts.report.values import read_run
from tunekit.errors import DataError, InputError
from tunekit.evaluation.continuations import continuation_scores
from tunekit.evaluation.tasks.run import TaskScore, fixed_tasks, scores_of, task_differences
from tunekit.files.durable import write_json
from tunekit.machine.devices import Devices
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import LoadedTarget, find_target, load_target, measuring_objective

STORIES = Path(os.environ.get("TUNEKIT_SHARED", "../shared")) / "models" / "stories260k"
HARNESS = Path(os.environ.get("TUNEKIT_PROGRAMS", "")) / "lm-eval"
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "colours.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["red", "green", "blue as the sky"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture
def harness() -> Callable[[], None]:
    """A function that makes lm-eval importable in a child."""
    if not (HARNESS / "lm_eval").is_dir() and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is absent: pip install 'tunekit[evals]'")
    return lambda: sys.path.append(str(HARNESS))


def loaded_model(model: Path) -> LoadedTarget:
    return load_target(find_target(str(model), None, ["model.dtype=float32"]), torch.device("cpu"))


def write_task(folder: Path, count: int = 12) -> Path:
    """A task with its documents."""
    rows = [{"question": f"The {thing} number {at} is", "answer": at % 3} for at in range(count) for thing in ("ball",)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "colours.yaml"
    path.write_text(json.dumps(TASK), encoding="utf-8")  # JSON is YAML
    return path


def test_continuations_have_the_log_probabilities_of_the_models_own_logits(tiny_llama: Path) -> None:
    loaded = loaded_model(tiny_llama)
    base, draw = loaded.model.base, np.random.default_rng(0)
    objective = measuring_objective(base, loaded.processor)
    contexts = [draw.integers(5, 60, size).tolist() for size in (1, 7, 20)]
    pairs = [(context, draw.integers(5, 60, size).tolist()) for context in contexts for size in (1, 4, 9)]
    pairs.append((contexts[1], pairs[3][1]))  # the same pair again: four continuations of one context
    pairs.append((contexts[0], []))
    greedy = list(contexts[2])
    with torch.no_grad():
        for _ in range(3):
            greedy.append(int(base.net(torch.tensor([greedy])).logits[0, -1].argmax()))
        pairs.append((contexts[2], greedy[len(contexts[2]) :]))
        expected = []
        for context, end in pairs:
            if not end:
                expected.append((0.0, True))
                continue
            scores = base.net(torch.tensor([[*context, *end]])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
            hits = scores.argmax(-1).tolist() == end
            expected.append((float(scores.gather(1, torch.tensor(end)[:, None]).sum()), hits))
    found = continuation_scores(loaded.model, objective, pairs, Devices(torch.device("cpu")), batch_size=2)
    assert [hits for _, hits in found] == [hits for _, hits in expected]
    assert found[-1][1]  # the greedy one
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_a_text_may_fill_all_positions_of_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    """The last token is only predicted, so a table of 8 positions is enough for 9 tokens. lm-eval's windows use it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "gpt2"))
    GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=16, n_layer=1, n_head=2, n_positions=8)).save_pretrained(folder)
    loaded = loaded_model(folder)
    objective, net = measuring_objective(loaded.model.base, loaded.processor), loaded.model.base.net
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    with torch.no_grad():
        scores = net(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)  # (T, V)
    devices = Devices(torch.device("cpu"))
    pairs = [(ids[:1], ids[1:]), (ids[:8], ids[8:]), (ids[:8], [4])]
    found = continuation_scores(loaded.model, objective, pairs, devices, batch_size=2)
    expected = [scores[torch.arange(8), ids[1:]].sum(), scores[7, 13], scores[7, 4]]
    assert [score for score, _ in found] == pytest.approx([float(score) for score in expected], abs=1e-4)
    with pytest.raises(DataError, match="need 9 positions, but the model has 8"):
        continuation_scores(loaded.model, objective, [(ids, [3])], devices, batch_size=2)


def test_requests_are_answered_as_by_lm_evals_own_class(harness: Callable[[], None], tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is absent")
    result = tmp_path / "result.json"

    def work() -> None:
        harness()
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tunekit.evaluation.tasks.harness import HarnessModel, _StopTexts

        loaded, devices = loaded_model(STORIES), Devices(torch.device("cpu"))
        objective = measuring_objective(loaded.model.base, loaded.processor)
        ours = HarnessModel(loaded.model, loaded.tokenizer, objective, devices, 3)
        net = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
        theirs = HFLM(pretrained=net, tokenizer=AutoTokenizer.from_pretrained(STORIES), batch_size=3, device="cpu")
        story = "Once upon a time, there was a little girl named Lily. "
        pairs = [(story[:cut], end) for cut in (0, 21, 54) for end in (" She", " He", " The dog was big.", "She ran")]
        pairs.append((story * 60, "She was happy."))  # longer than the model's table
        texts = [(story * 2,), (story * 60,)]
        comma = loaded.tokenizer.encode("a,")[-1]
        loaded.model.base.generation_config.eos_token_id = net.generation_config.eos_token_id = [2, comma]
        until = ([".", "<s>"], ["dog"], [])
        settings = [{"until": texts, "max_gen_toks": 30, "do_sample": False} for texts in until]
        begins = (story, "Tom and his dog", "One day, a big bear")
        prompts = [(text, setting) for text in begins for setting in settings]
        values = [
            [
                model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs]),
                model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, text, 0) for text in texts]),
                model.generate_until([Instance("generate_until", {}, prompt, 0) for prompt in prompts]),
                [model.max_length, model.prefix_token_id, model.eot_token_id],
            ]
            for model in (ours, theirs)
        ]
        for end in ("", story * 60):  # HFLM stops at an assertion
            with pytest.raises(InputError, match=r"a continuation of (0|9\d\d) tokens, but the model needs 1 to 512"):
                ours.loglikelihood([Instance("loglikelihood", {}, (story.strip(), end), 0)])
        with pytest.raises(InputError, match="an empty text in its generation_kwargs"):  # HFLM ends after one token
            ours.generate_until([Instance("generate_until", {}, (story, {"until": ""}), 0)])
        named = loaded.tokenizer.encode("Once upon<s>")
        assert _StopTexts(loaded.tokenizer, ["<s>"]).ended(named)
        result.write_text(json.dumps(values), encoding="utf-8")

    ended = in_child(work, tmp_path / "log")
    assert ended.code == 0, ended.output
    (scores, rolling, texts, facts), (their_scores, their_rolling, their_texts, their_facts) = json.loads(
        result.read_text("utf-8")
    )
    assert facts == their_facts
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in their_scores]
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in their_scores], rel=1e-5)
    assert rolling == pytest.approx(their_rolling, rel=1e-5)
    assert texts == their_texts
    assert all(texts)


@pytest.mark.drawn
def test_prompts_are_turns_of_a_chat_as_in_lm_evals_own_class(
    harness: Callable[[], None], tiny_llama: Path, tmp_path: Path
) -> None:
    choices, generated, result = write_task(tmp_path), tmp_path / "answers.yaml", tmp_path / "result.json"
    generation = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    others = {"task": "answers", "output_type": "generate_until", "generation_kwargs": generation}
    metrics = {"metric_list": [{"metric": "exact_match"}], "description": "Answer.", "doc_to_target": "red"}
    shots = {"num_fewshot": 2, "fewshot_split": "test", "gen_prefix": "It is", "repeats": 1}
    kept = {name: value for name, value in TASK.items() if name != "doc_to_choice"}
    generated.write_text(json.dumps(kept | others | metrics | shots), encoding="utf-8")

    def work() -> None:
        harness()
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from tunekit.evaluation.tasks.harness import HarnessModel
        from tunekit.evaluation.tasks.run import load_tasks
        from tunekit.recipe.evaluation import EvaluationSection

        loaded, devices = loaded_model(tiny_llama), Devices(torch.device("cpu"))
        objective = measuring_objective(loaded.model.base, loaded.processor)
        ours = HarnessModel(loaded.model, loaded.tokenizer, objective, devices, 3)
        net = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        theirs = HFLM(pretrained=net, tokenizer=AutoTokenizer.from_pretrained(tiny_llama), batch_size=3, device="cpu")
        group = tmp_path / "group.yaml"
        group.write_text(json.dumps({"group": "both", "task": ["colours", "answers"]}), encoding="utf-8")
        with pytest.raises(InputError, match=r"group\.yaml describes a group of tasks"):
            load_tasks(EvaluationSection(tasks=(str(group),)))
        values = []
        for model in (ours, theirs):
            tasks = load_tasks(EvaluationSection(tasks=(str(choices), str(generated))))
            found = simple_evaluate(
                model, tasks=tasks.specs, task_manager=tasks.manager, apply_chat_template=True, bootstrap_iters=0
            )
            samples = {
                name: [[each["arguments"], each["resps"]] for each in found["samples"][name]]
                for name in found["samples"]
            }
            values.append([found["results"], samples])
        result.write_text(json.dumps(values, default=str), encoding="utf-8")

    ended = in_child(work, tmp_path / "log")
    assert ended.code == 0, ended.output
    (scores, samples), (their_scores, their_samples) = json.loads(result.read_text("utf-8"))
    assert scores == their_scores
    for (prompts, answers), (their_prompts, their_answers) in zip(
        samples["answers"], their_samples["answers"], strict=True
    ):
        assert (prompts, answers) == (their_prompts, their_answers)
        assert prompts[0][0].endswith("<|im_start|>assistant\nIt is")
    for (prompts, answers), (their_prompts, their_answers) in zip(
        samples["colours"], their_samples["colours"], strict=True
    ):
        assert prompts == their_prompts
        assert "<|im_start|>user" in prompts[0][0]
        theirs = [float(each[0][0]) for each in their_answers]
        assert [float(each[0][0]) for each in answers] == pytest.approx(theirs, rel=1e-5)


@pytest.mark.drawn
def test_eval_measures_a_run_and_its_base(
    harness: Callable[[], None], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tasks")
    task, run = write_task(folder), folder / "run"
    sections: dict[str, Any] = {"evaluation": {"tasks": [task.name]}, "training": {"epochs": 1.0}}
    recipe = write_recipe(folder, tiny_llama, **sections)
    ended = train_in_child(recipe, run, before=harness)
    assert ended.code == 0, ended.output
    assert "it/s" not in ended.output  # a progress bar of lm-eval
    trained = json.loads((run / "tasks.json").read_text("utf-8"))
    (run / "tasks.json").unlink()
    earlier = {part: [each | {"task": "mmlu"} for each in trained[part]] for part in trained}
    wrong = {"absent": {"dataset_path": "no/such-data-set"}, "misspelt": {"doc_to_text": "{{qestion}}"}}
    for name, change in wrong.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**TASK, **change, "task": name}), encoding="utf-8")
    (folder / "broken.yaml").write_text("task: [a", encoding="utf-8")

    def work() -> None:
        from tunekit.evaluate import evaluate_tasks

        evaluate_tasks(str(run), None, [str(task)], None, ["model.dtype=bfloat16"])
        assert not (run / "tasks.json").exists()  # the run's own dtype is float32
        write_json(run / "tasks.json", {part: earlier[part] + trained[part] for part in trained})
        evaluate_tasks(str(run), None, [str(task)], str(folder / "out.json"), [])
        for name, words in (
            ("absent", "lm-eval cannot compute a task: .*no/such-data-set"),
            ("misspelt", "lm-eval cannot compute a task: UndefinedError: 'qestion' is undefined"),
            ("broken", r"broken\.yaml cannot be read: ParserError"),
        ):
            with pytest.raises(InputError, match=words):
                evaluate_tasks(str(run), None, [str(folder / f"{name}.yaml")], None, [])
        with pytest.raises(InputError, match="lm-eval has no task 'no_such_task'"):
            evaluate_tasks(str(run), None, ["no_such_task"], None, [])

    ended = in_child(work, folder / "log", harness)
    assert ended.code == 0, ended.output
    assert ended.output.count("loading ") == 4  # a wrong name is refused before the base is loaded
    values = json.loads((folder / "out.json").read_text("utf-8"))
    all_values = json.loads((run / "tasks.json").read_text("utf-8"))
    assert all_values == {part: earlier[part] + values[part] for part in trained}
    for part in ("scores", "before"):
        in_training = [each["value"] for each in trained[part]]
        assert [each["value"] for each in values[part]] == pytest.approx(in_training)
    assert [(each["task"], each["metric"], each["count"]) for each in values["scores"]] == [
        ("colours", "acc", 12),
        ("colours", "acc_norm", 12),
    ]
    assert all(each["standard_error"] is not None for each in values["scores"])
    assert "Changes by tuning" in markdown_page(run_report(read_run(run)))


@pytest.mark.drawn
def test_a_stop_during_the_tasks_of_a_run_leaves_them_out(
    harness: Callable[[], None], tiny_llama: Path, tmp_path: Path
) -> None:
    def before() -> None:
        harness()
        from tunekit.training import result

        def stop(*inputs: object, **named: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        result.measure_tasks = stop  # type: ignore[assignment]

    task = write_task(tmp_path)
    sections: dict[str, Any] = {"evaluation": {"tasks": [task.name]}, "training": {"epochs": 1.0}}
    ended = train_in_child(write_recipe(tmp_path, tiny_llama, **sections), tmp_path / "run", before=before)
    assert ended.code == 0, ended.output
    assert "stopped by SIGINT during the tasks: evaluation.tasks are not measured" in ended.output.replace("\n", " ")
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text("utf-8"))["exit_code"] == 0


@pytest.mark.drawn
def test_tasks_that_last_longer_than_the_time_limit_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    def before() -> None:
        from tunekit.planning import checks
        from tunekit.training import result
        from tunekit.training.time_limit import TimeLimit

        checks.find_spec = lambda name: True  # type: ignore[attr-defined, assignment]  # lm-eval need not be here
        result.load_tasks = lambda settings: None  # type: ignore[assignment, return-value]
        result.measure_tasks = lambda *inputs, **named: time.sleep(60)  # type: ignore[assignment]
        TimeLimit.left = 0.1  # type: ignore[method-assign, assignment]

    task = write_task(tmp_path)
    sections: dict[str, Any] = {"evaluation": {"tasks": [task.name]}, "training": {"epochs": 1.0, "max_minutes": 60}}
    ended = train_in_child(write_recipe(tmp_path, tiny_llama, **sections), tmp_path / "run", before=before)
    assert ended.code == 0, ended.output
    words = " ".join(ended.output.split())
    assert "training.max_minutes left too little time for evaluation.tasks; measure them with: tunekit eval " in words
    assert not (tmp_path / "run" / "tasks.json").exists()
    report = json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    assert report["starts"][0]["minutes"] < 1
    assert "tasks" not in report["seconds"]  # the next start would keep this time free, which is too short again
    assert json.loads((tmp_path / "run" / "status.json").read_text("utf-8"))["finished"] is True


@pytest.mark.drawn
def test_a_task_that_fails_does_not_fail_the_run(harness: Callable[[], None], tiny_llama: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"evaluation": {"tasks": ["no_such_task"]}, "training": {"epochs": 1.0}}
    ended = train_in_child(write_recipe(tmp_path, tiny_llama, **sections), tmp_path / "run", before=harness)
    assert ended.code == 0, ended.output
    assert "lm-eval has no task 'no_such_task'" in " ".join(ended.output.split())
    assert (tmp_path / "run" / "report.html").exists()


def test_a_metric_that_leaves_out_all_documents_has_no_score() -> None:
    samples = [{"filter": "none", "512": value, "4096": -1.0} for value in (1.0, 0.0)]
    values = {"512,none": 0.5, "512_stderr,none": 0.5, "4096,none": -1}
    results = {"samples": {"niah": samples}, "results": {"niah": values}, "higher_is_better": {"niah": {}}}
    assert [(each.metric, each.value, each.documents) for each in scores_of(results)] == [("512", 0.5, (1.0, 0.0))]


def bootstrap_error(metric: Callable[[Any], float], documents: Any) -> float:
    """The standard error of a metric over drawn documents."""
    draws = np.random.default_rng(1).integers(len(documents), size=(4000, len(documents)))
    return float(np.std([metric(documents[draw]) for draw in draws]))


@pytest.mark.parametrize(
    ("metric", "of"),
    [
        ("word_perplexity", lambda pairs: np.exp(-pairs[:, 0].sum() / pairs[:, 1].sum())),
        ("bits_per_byte", lambda pairs: -pairs[:, 0].sum() / pairs[:, 1].sum() / np.log(2)),
        ("perplexity", lambda values: np.exp(-values.mean())),
    ],
)
def test_perplexities_are_compared_document_by_document(metric: str, of: Callable[[Any], float]) -> None:
    """The errors of one score and of a change are those of a bootstrap over documents."""
    draw = np.random.default_rng(0)
    counts = draw.integers(20, 200, 80).astype(float)
    before = np.stack([-counts * draw.normal(2.0, 0.2, 80), counts], axis=1)  # (documents, 2)
    after = before - np.stack([counts * draw.normal(0.05, 0.05, 80), 0 * counts], axis=1)
    if metric == "perplexity":
        before, after = before[:, 0] / counts, after[:, 0] / counts

    def score_of(documents: Any) -> TaskScore:
        samples = [{"filter": "none", metric: each} for each in documents.tolist()]
        values = {f"{metric},none": float(of(documents)), f"{metric}_stderr,none": "N/A"}
        results = {"samples": {"pages": samples}, "results": {"pages": values}}
        return next(scores_of(results | {"higher_is_better": {"pages": {metric: False}}}))

    scores = [score_of(documents) for documents in (before, after)]
    assert scores[0].standard_error == pytest.approx(bootstrap_error(of, before), rel=0.05)
    (change,) = task_differences(scores[:1], scores[1:])
    assert (change.low + change.high) / 2 == pytest.approx(of(after) - of(before))
    both = np.concatenate([before.reshape(80, -1), after.reshape(80, -1)], axis=1)
    width = both.shape[1] // 2
    error = bootstrap_error(lambda some: of(some[:, width:].squeeze()) - of(some[:, :width].squeeze()), both)
    assert (change.high - change.low) / 2 / 1.959964 == pytest.approx(error, rel=0.05)
    assert change.verdict == "worse"


def test_the_base_has_a_value_also_where_no_change_is_known() -> None:
    scores = [{"task": "words", "metric": "bits_per_byte", "value": 1.5, "standard_error": 0.1, "count": 3}]
    before = [{**scores[0], "value": 2.0}]
    assert score_table(scores, before) == (
        ["task", "metric", "base", "value", "standard error", "documents"],
        [["words", "bits_per_byte", 2.0, 1.5, 0.1, 3]],
    )
    assert score_table(scores)[1] == [["words", "bits_per_byte", 1.5, 0.1, 3]]


def test_a_group_has_the_documents_of_its_tasks() -> None:
    """A group such as mmlu contains groups; its own score is in lm-eval's results, without documents."""
    samples = {name: [{"filter": "none", "acc": value} for value in (1.0, 0.0, 0.0)] for name in ("one", "two")}
    values = {name: {"acc,none": 1 / 3, "alias": name, "sample_len": 3} for name in (*samples, "inner", "outer")}
    groups = {"inner": ["one"], "outer": ["inner", "two"]}
    results = {"samples": samples, "results": values, "group_subtasks": groups, "groups": {"outer": values["outer"]}}
    scores = list(scores_of(results | {"higher_is_better": {name: {"acc": True} for name in values}}))
    assert [(each.task, each.count) for each in scores] == [("one", 3), ("two", 3), ("outer", 6)]
    assert scores[-1].documents == (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)


def score(value: float, documents: tuple[float, ...], *, higher: bool = True) -> TaskScore:
    return TaskScore("words", "acc", value, 0.1, higher, len(documents), documents)


def test_changes_have_intervals_of_the_paired_differences() -> None:
    before = (1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    after = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    (change,) = task_differences([score(0.875, before)], [score(0.25, after)])
    steps = np.array(after) - np.array(before)
    half = 2.364624 * steps.std(ddof=1) / np.sqrt(8)
    assert (change.low, change.high) == pytest.approx((steps.mean() - half, steps.mean() + half), rel=1e-2)
    assert change.verdict == "worse"
    (change,) = task_differences([score(0.875, before, higher=False)], [score(0.25, after, higher=False)])
    assert change.verdict == "better"
    (change,) = task_differences([score(0.875, before)], [score(0.75, (0.0, *before[1:]))])
    assert change.verdict == "no clear difference"
    assert task_differences([score(0.875, ())], [score(0.25, after)]) == []


def test_a_missing_lm_eval_and_a_missing_task_file_are_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.planning.checks import library_problems, template_problems
    from tunekit.validate import validate

    recipe = write_recipe(tmp_path, tiny_llama, evaluation={"tasks": ["niah_single_1", "missing.yaml"]})
    with pytest.raises(InputError, match=r"missing\.yaml"):
        validate(recipe, [])
    loaded = load_recipe(recipe).recipe
    assert loaded.evaluation.tasks == ("niah_single_1", str(tmp_path / "missing.yaml"))
    asked = load_recipe(recipe, ["evaluation.task_chat_template=true"]).recipe
    without = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=None))
    (problem,) = template_problems(asked, without, None)
    assert problem.what == "the tokenizer has no chat template"
    assert not [*template_problems(asked, without, "{{ messages }}"), *template_problems(loaded, without, None)]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("tunekit.planning.checks.find_spec", lambda name: None if name == "lm_eval" else object())
    assert ["tunekit[evals]" in problem.how for problem in library_problems(loaded)] == [True]


def test_lengths_without_effect_are_named(
    tiny_llama: Path, tmp_path: Path, harness: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only tasks that generate their prompts (RULER) read evaluation.task_lengths."""
    rows = [{"question": f"the sky at {hour} is", "answer": hour % 3} for hour in range(4)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(json.dumps(TASK))

    def work() -> None:
        from tunekit.evaluate import evaluate_tasks

        keys = ["evaluation.task_lengths=[64]", "model.dtype=float32"]
        evaluate_tasks(str(tiny_llama), None, [str(tmp_path / "colours.yaml")], None, keys)

    ended = in_child(work, tmp_path / "log", harness)
    assert "evaluation.task_lengths has no effect on colours, which do not generate their prompts" in ended.output


def test_tasks_that_generate_their_prompts_have_lengths() -> None:
    configs = {"niah": {"custom_dataset": "def niah(**kwargs): ..."}, "colours": {"dataset_path": "json"}}
    assert fixed_tasks({"configs": configs}) == ["colours"]
