"""TARGET of eval, generate and merge: what is no target is told at once, and so is a result that could not be kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tunekit.evaluate
from tests.data_case import write_lines
from tunekit.errors import InputError, ModelError, RunFolderError
from tunekit.evaluate import evaluate_verb
from tunekit.generate import generate_verb
from tunekit.plan import plan_verb
from tunekit.planning.plan import make_plan
from tunekit.recipe.load import load_recipe
from tunekit.tuned.target import find_target, load_target

ROWS = [{"prompt": "a", "completion": "b"}]


def test_a_name_that_is_nothing_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_hub(section: object, *, weights: bool) -> None:
        raise ModelError("nosuch is not on this machine and the hub cannot be reached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunekit.tuned.target.find_source", no_hub)
    with pytest.raises(InputError) as caught:
        evaluate_verb("nosuch", None, None, None, [], None, [])
    text = str(caught.value)
    for words in ("nosuch is no folder", "recipe (.yaml)", ".gguf file", "the hub cannot be reached", "check the path"):
        assert words in text


def test_a_path_that_is_nothing_says_so_without_the_hub() -> None:
    with pytest.raises(InputError, match=r"^\./nosuch is no folder .* there is no folder or file \./nosuch"):
        find_target("./nosuch", None, [])


def test_rewritten_overrides_are_printed(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    rewrite = "command line: torch_dtype -> model.dtype"
    evaluate_verb(str(tiny_llama), None, str(rows), None, [], None, ["torch_dtype=float32"])
    assert rewrite in capsys.readouterr().out
    generate_verb(str(tiny_llama), None, "a", None, ["torch_dtype=float32", "evaluation.max_new_tokens=1"])
    printed = capsys.readouterr()
    assert rewrite in printed.err
    assert rewrite not in printed.out


def test_rewritten_keys_of_a_recipe_are_printed_too(tiny_llama: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ROWS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"base_model": str(tiny_llama), "data": {"train": "rows.jsonl"}, "output": {"dir": "run"}})
    )
    (rewrite,) = find_target(str(recipe), None, []).rewrites
    assert rewrite.endswith("base_model -> model.name_or_path")


@pytest.mark.parametrize("place", ["nowhere/result.json", "folder"])
def test_a_result_that_could_not_be_kept_is_told_first(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*values: object) -> None:
        raise AssertionError("nothing is loaded before that is known")

    (tmp_path / "folder").mkdir()
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(tunekit.evaluate, "load_target", fail)
    with pytest.raises(RunFolderError, match="folder"):
        evaluate_verb(str(tiny_llama), None, str(rows), None, [], str(tmp_path / place), [])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(tiny_llama), "data": {"train": "rows.jsonl"}, "output": {"dir": "run"}}))
    monkeypatch.setattr("tunekit.planning.plan.make_plan", fail)
    with pytest.raises(RunFolderError, match="folder"):
        plan_verb(str(recipe), [], str(tmp_path / place))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "recipe.yaml", "rows.jsonl"]


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
