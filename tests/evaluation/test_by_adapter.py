"""eval over a table whose rows name adapters: each has the metrics of its own evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.data_case import tokenizer_of
from tests.talking.test_conversation import adapter_of, peft_folder
from tunekit.data.rows import load_evaluation_rows
from tunekit.errors import TunekitError
from tunekit.evaluate import evaluate_verb
from tunekit.evaluation.by_adapter import rows_by_adapter
from tunekit.objectives.base import make_objective
from tunekit.recipe.data import DataSection, Source
from tunekit.recipe.objectives.sft import SftSettings

ROWS = [{"prompt": f"Say {number} things.", "completion": " yes" * (1 + number % 3)} for number in range(9)]
METRICS = ("loss", "exact_match")
SETTINGS = ["model.dtype=float32", "evaluation.max_new_tokens=4", "evaluation.batch_size=2"]


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import PromptTuningConfig

    folder = tmp_path_factory.mktemp("table")
    adapter_of(tiny_llama, folder / "one", 1, use_dora=True)
    adapter_of(tiny_llama, folder / "run" / "adapter", 2)
    peft_folder(tiny_llama, folder / "prompt", 3, PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    return folder


def write(folder: Path, adapters: list[Any]) -> Path:
    rows = [row | {"adapter": name} for row, name in zip(ROWS, adapters, strict=False)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / "rows.jsonl"


def evaluated(target: Path, data: Path, column: str | None = None) -> Any:
    result = data.with_suffix(".result")
    evaluate_verb(str(target), None, str(data), None, METRICS, str(result), SETTINGS, column)
    return json.loads(result.read_text("utf-8"))


@pytest.mark.drawn
def test_each_adapter_is_as_in_an_evaluation_of_its_own(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    names = ["one", "run", None, "prompt", "run", str(folder / "one"), "run", "", "prompt"]
    results = evaluated(tiny_llama, write(folder, names), "adapter")["adapters"]
    places = {"one": folder / "one", "run": folder / "run" / "adapter", "prompt": folder / "prompt", None: tiny_llama}
    assert {*results} == {str(place) if name else "base" for name, place in places.items()}
    assert len({result["loss"] for result in results.values()}) == 4
    for name, place in places.items():
        alone = tmp_path / "alone.jsonl"
        chosen = [
            row
            for row, at in zip(ROWS, names, strict=True)
            if at in ({None, ""} if name is None else {name, str(place)})
        ]
        alone.write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")
        assert results[str(place) if name else "base"] == evaluated(place, alone)


def test_the_column_counts_as_read(folder: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tiny_llama, write(folder, ["one"]), "adapter")
    assert "does not read" not in capsys.readouterr().out
    evaluated(tiny_llama, write(folder, ["one"]))
    assert "does not read 'adapter'" in capsys.readouterr().out


def test_rows_of_an_array_on_one_line_have_their_own_adapters(folder: Path, tiny_llama: Path) -> None:
    names = ["one", "run", None, "one"]
    rows = [row | {"adapter": name} for row, name in zip(ROWS, names, strict=False)]
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    source = Source(path=str(folder / "rows.json"))
    objective = make_objective(SftSettings(), tokenizer_of(tiny_llama))
    loaded = load_evaluation_rows(DataSection(train=(source,), eval=(source,)), objective, seed=0)
    groups = rows_by_adapter(loaded, (source,), "adapter")
    assert [len(group.evaluation or ()) for group in groups.values()] == [2, 1, 1]
    references = [[prompt.reference for prompt in group.evaluation_prompts()] for group in groups.values()]
    assert references == [
        [ROWS[0]["completion"], ROWS[3]["completion"]],
        [ROWS[1]["completion"]],
        [ROWS[2]["completion"]],
    ]


def test_wrong_rows_and_targets_are_refused(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TunekitError, match=r"(?s)rows\.jsonl:2.*none contains no adapter.*rows\.jsonl:3"):
        evaluated(tiny_llama, write(folder, ["one", "none", 5]), "adapter")
    with pytest.raises(TunekitError, match=r"has the column 'adaptor'; did you mean 'adapter'\?"):
        evaluated(tiny_llama, write(folder, ["one"]), "adaptor")
    with pytest.raises(TunekitError, match="needs the adapters' base model as TARGET"):
        evaluated(folder / "one", write(folder, ["one"]), "adapter")
    wrong = [adapter_of(tiny_llama, tmp_path / f"a{number}", number) for number in range(2)]
    (wrong[0] / "chat_template.jinja").write_text("x", "utf-8")
    (wrong[1] / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(TunekitError, match=r"(?s)a0: has its own chat template.*a1"):
        evaluated(tiny_llama, write(folder, ["one", *map(str, wrong)]), "adapter")
