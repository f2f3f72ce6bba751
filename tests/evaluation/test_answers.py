"""Generated answers of an evaluation: where a stop ends it, and which rows it needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.evaluation.test_batch_size import evaluator_of
from tests.objectives.test_dpo import write_recipe
from tests.objectives.test_kto import unpaired
from tunekit.contracts import Answering, AnswerLimits, Progress
from tunekit.data.rows import Prompt
from tunekit.errors import DataError
from tunekit.evaluation.answers import answer_questions
from tunekit.evaluation.evaluator import check_answers
from tunekit.evaluation.scores import EvaluationStopped
from tunekit.machine.devices import make_devices
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.tuned.model import TunedModel


def test_a_stop_ends_the_answers_after_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunekit.evaluation.answers.undisturbed", lambda model: nullcontext())
    written: list[int] = []

    def write(model: Any, prompts: Any, limits: AnswerLimits) -> list[str]:
        written.append(len(prompts))
        return ["a"] * len(prompts)

    model: Any = None
    questions, limits = [Prompt([1], "a", "q")] * 6, AnswerLimits(4, batch_size=2)
    values = (model, Answering("text", write=write), questions, make_devices(), limits)
    with pytest.raises(EvaluationStopped):
        answer_questions(*values, stop=lambda: len(written) == 1)
    assert written == [2]
    assert answer_questions(*values) == ["a"] * 6


def test_a_stop_ends_the_pass_that_measures_all_rows(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KTO's KL: the policy and the reference score each batch."""
    recipe = write_recipe(tmp_path, tiny_llama, unpaired(12), objective={"method": "kto"}, data={"eval": 0.5})
    evaluator = replace(evaluator_of(recipe), settings=EvaluationSection(batch_size=1))
    scored, score = list[int](), TunedModel.scores

    def counted(*values: Any, **named: Any) -> Any:
        scored.append(1)
        return score(*values, **named)

    monkeypatch.setattr(TunedModel, "scores", counted)
    with pytest.raises(EvaluationStopped):
        evaluator.evaluate(lambda: len(scored) >= 2)
    assert len(scored) == 2


def test_a_stop_ends_the_pictures_before_the_next_one(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, unpaired(12), objective={"method": "kto"}, data={"eval": 0.5})
    drawn = list[int]()

    def draw(model: Any, progress: Progress) -> list[Any]:
        for number in range(3):
            progress("images drawn", number, 3)
            drawn.append(number)
        return [np.zeros((2, 2, 3), np.uint8)] * 3

    evaluator = evaluator_of(recipe)
    objective = replace(evaluator.objective, answering=Answering("picture", report_pictures=draw))
    evaluator = replace(evaluator, objective=objective)
    with pytest.raises(EvaluationStopped):
        evaluator.evaluate(lambda: bool(drawn))
    assert drawn == [0]
    assert len(evaluator.evaluate().pictures) == 3


@pytest.mark.parametrize(
    ("metric", "references", "missing"),
    [
        ("rouge_l", [], True),
        ("rouge_l", [""], False),
        ("wer", ["", " "], True),
        ("wer", ["", "a"], False),
        ("wer_normalized", ["(noise)"], True),
        ("loss", [], False),
    ],
)
def test_text_metrics_need_a_reference(metric: str, references: list[str], missing: bool) -> None:
    """Metrics of speech leave pairs with an empty reference out."""
    answering = Answering("text", normalize=lambda text: text.replace("(noise)", ""))
    prompts = [Prompt([1], reference, "q") for reference in references]
    rows: Any = SimpleNamespace(
        objective=SimpleNamespace(answering=answering), evaluation_prompts=lambda: iter(prompts)
    )
    with pytest.raises(DataError, match=f"{metric} compares with") if missing else nullcontext():
        check_answers(rows, ["loss", metric])
