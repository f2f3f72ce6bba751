"""TARGET of eval, generate and merge: what is no target is told at once, and so is a result that could not be kept."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tunekit.evaluate
from tests.support.data_case import write_lines
from tests.support.plans import make_plan
from tests.support.train_case import train, write_recipe
from tunekit.errors import DataError, InputError, ModelError, RecipeError, RunFolderError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb, read_prompts
from tunekit.plan import plan_verb
from tunekit.recipe.load import load_recipe
from tunekit.targets.target import find_target, load_target

ROWS = [{"prompt": "a", "completion": "b"}]


def test_a_name_that_is_nothing_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_hub(section: object, *, weights: bool) -> None:
        raise ModelError("nosuch is not on this machine and the hub cannot be reached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunekit.targets.target.find_source", no_hub)
    with pytest.raises(InputError) as caught:
        evaluate_verb("nosuch", None, None, None, [], None, [])
    text = str(caught.value)
    for words in (
        "nosuch is neither a folder",
        "recipe (.yaml)",
        ".gguf file",
        "the hub cannot be reached",
        "check the path",
    ):
        assert words in text


def test_a_path_that_is_nothing_says_so_without_the_hub() -> None:
    with pytest.raises(InputError, match=r"^\./nosuch is neither a folder, .* there is no folder or file \./nosuch"):
        find_target("./nosuch", None, [])


def test_a_folder_named_like_a_recipe_is_no_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base.yaml")
    assert find_target(str(folder), None, []).model.name_or_path == str(folder)


def test_rewritten_overrides_are_printed(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    rewrite = "command line: torch_dtype -> model.dtype"
    evaluate_verb(str(tiny_llama), None, str(rows), None, [], None, ["torch_dtype=float32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line == rewrite or line.endswith(" ...")] == [
        rewrite,
        f"loading {tiny_llama} ...",
        "evaluating 1 rows ...",
    ]
    generate_verb(str(tiny_llama), None, ["a"], None, ["torch_dtype=float32", "evaluation.max_new_tokens=1"])
    printed = capsys.readouterr()
    assert rewrite in printed.err
    assert rewrite not in printed.out


def test_eval_takes_data_keys_and_columns(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns, length and template of --data, of a recipe's rows, and of rows that only an override names."""
    monkeypatch.chdir(tmp_path)
    same = write_lines(tmp_path / "same.jsonl", [{"prompt": "ab", "completion": "cd"}])
    write_lines(tmp_path / "other.jsonl", [{"question": "ab", "answer": "cd"}])
    recipe = tmp_path / "recipe.yaml"
    sections = {"model": str(tiny_llama), "data": {"train": "absent.jsonl", "max_length": 3}, "output": {"dir": "run"}}
    recipe.write_text(json.dumps(sections))
    dtype, result = "model.dtype=float32", tmp_path / "result.json"
    columns = ["data.eval.0.columns.question=prompt", "data.eval.0.columns.answer=completion"]

    def measure(target: Path, data: str | None, *overrides: str) -> dict[str, float]:
        evaluate_verb(str(target), None, data, None, [], str(result), [dtype, *overrides])
        found: dict[str, float] = json.loads(result.read_text())
        return found

    wanted = measure(tiny_llama, str(same))
    assert measure(tiny_llama, "other.jsonl", *columns) == wanted
    assert measure(tiny_llama, None, "data.eval=other.jsonl", *columns) == wanted
    assert measure(recipe, "other.jsonl", *columns, "data.max_length=99") == wanted
    (tmp_path / "t.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    talk = str(write_lines(tmp_path / "talk.jsonl", [{"messages": turns}]))
    assert measure(tiny_llama, talk, "data.chat_template=t.jinja")["tokens"] < measure(tiny_llama, talk)["tokens"]
    with pytest.raises(RecipeError, match=r"data\.eval\.0\.columns\.question: 'promt' is not a field"):
        measure(tiny_llama, "other.jsonl", "data.eval.0.columns.question=promt")
    with pytest.raises(InputError, match="there are no evaluation rows"):
        measure(tiny_llama, None, "data.max_length=9")


def test_prompts_from_standard_input_and_sampling(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(prompt: list[str] | None, prompts: str | None, **settings: Any) -> list[str]:
        stream = SimpleNamespace(buffer=io.BytesIO(b"one\n\ntwo\n"), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stream)
        generate_verb(str(tiny_llama), None, prompt, prompts, ["model.dtype=float32"], **settings)
        return capsys.readouterr().out.splitlines()

    piped = ask(None, None, max_new_tokens=5)
    assert [json.loads(line)["prompt"] for line in piped] == ["one", "two"]
    assert ask(None, "-", max_new_tokens=5) == piped
    assert ask(None, None, max_new_tokens=5, temperature=2.0, top_k=1) == piped
    drawn = ask(None, None, max_new_tokens=5, temperature=2.0, seed=1)
    assert drawn == ask(None, None, max_new_tokens=5, temperature=2.0, seed=1) != piped
    with pytest.raises(InputError, match="without --temperature nothing is sampled, so --top-p has no effect"):
        ask(["one"], None, top_p=0.5)
    with pytest.raises(InputError, match="--score reads answers and generates none, so --temperature has no effect"):
        generate_verb(str(tiny_llama), None, None, None, [], temperature=1.0, score="answers.jsonl")
    assert ask(["one", "two"], None, max_new_tokens=5) == piped


def test_rewritten_keys_of_a_recipe_are_printed_too(tiny_llama: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ROWS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"base_model": str(tiny_llama), "data": {"train": "rows.jsonl"}, "output": {"dir": "run"}})
    )
    (rewrite,) = find_target(str(recipe), None, []).notes
    assert rewrite.endswith("base_model -> model.name_or_path")


@pytest.mark.parametrize(
    ("place", "said"), [("nowhere/result.json", "there is no folder .*nowhere"), ("folder", "folder is a folder")]
)
def test_a_result_that_could_not_be_kept_is_told_first(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str
) -> None:
    def fail(*values: object) -> None:
        raise AssertionError("nothing is loaded before that is known")

    (tmp_path / "folder").mkdir()
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(tunekit.evaluate, "load_target", fail)
    with pytest.raises(RunFolderError, match=said):
        evaluate_verb(str(tiny_llama), None, str(rows), None, [], str(tmp_path / place), [])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(tiny_llama), "data": {"train": "rows.jsonl"}, "output": {"dir": "run"}}))
    monkeypatch.setattr("tunekit.planning.ranks.prepare", fail)
    with pytest.raises(RunFolderError, match=said):
        plan_verb(load_recipe(recipe), str(tmp_path / place))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "recipe.yaml", "rows.jsonl"]


@pytest.mark.slow
def test_the_real_gguf_file_is_parsed_once_for_tokenizer_and_base(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing it takes seconds."""
    if smollm2.suffix != ".gguf":
        pytest.skip("the real model is a folder here")
    import gguf

    parsed: list[str] = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: str, *given: object) -> None:
            parsed.append(str(path))
            super().__init__(path, *given)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {smollm2}\ndata: {{train: {rows}}}\noutput: {{dir: {tmp_path / 'run'}}}\n")
    loaded = load_recipe(recipe)
    make_plan(loaded, device=torch.device("cpu"))
    assert parsed == [str(smollm2)]
    load_target(find_target(str(smollm2), None, []), torch.device("cpu"))
    assert parsed == [str(smollm2)] * 2


def test_standard_input_without_a_prompt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(DataError, match=r"^standard input: it contains no prompt; .* --prompt TEXT"):
        read_prompts(Path("-"))


def test_a_run_of_an_earlier_version_is_not_evaluated_on_a_share(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training rows and evaluation rows were others, so that the score would be too good."""
    recipe = write_recipe(tmp_path, tiny_llama, training={"max_steps": 1, "epochs": None, "warmup_steps": 0})
    with monkeypatch.context() as patched:
        patched.setattr("tunekit.artifacts.fingerprint.NUMERICS", 1)  # in environment.json and in the checkpoint
        run = train(recipe)
    with pytest.raises(InputError, match=r"^data\.eval: an earlier version of tunekit .*; name a file .* --data FILE"):
        evaluate_verb(str(run), None, None, None, [], None, [])
    evaluate_verb(str(run), None, str(tmp_path / "train.jsonl"), None, [], None, [])
    (run / "status.json").unlink()
    with pytest.raises(RunFolderError, match=r"data\.eval: an earlier version .*; start a new run") as caught:
        train(tmp_path / "recipe.yaml", resume=True)
    assert len(caught.value.problems) == 1
