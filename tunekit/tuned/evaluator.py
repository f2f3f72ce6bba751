"""One evaluation of the eval rows, as the recipe's `evaluation:` asks for it.

Model, rows and settings go in; metrics by name come out, loss and perplexity always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tunekit.contracts import Batch, EncodedRows, Objective, Tokenizer
from tunekit.data.batching.windows import evaluation_batches
from tunekit.machine.devices import Devices
from tunekit.model.load import LoadedModel
from tunekit.objectives.base import make_objective
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.names import facts_of, needs_generation
from tunekit.recipe.objectives.sft import SftSettings
from tunekit.recipe.recipe import supervised_objective
from tunekit.tuned.answers import Question, answer_questions, text_metrics
from tunekit.tuned.fit import check_family
from tunekit.tuned.model import TunedModel
from tunekit.tuned.scores import LOSS_METRICS, LossSums, summed_evaluation


@dataclass(frozen=True)
class Evaluator:
    """Computes `metric_names` over one set of rows."""

    model: TunedModel
    objective: Objective
    tokenizer: Tokenizer
    devices: Devices
    batches: Callable[[], Iterable[Batch]]
    questions: Callable[[], Sequence[Question]]  # asked for only where a metric needs answers
    metric_names: tuple[str, ...]
    max_new_tokens: int
    batch_size: int
    on_split: Callable[[Batch], None] = lambda batch: None  # told of a batch that ran out of memory

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> tuple[LossSums, dict[str, float]]:
        """The sums, and every metric by name.

        Raises: EvaluationStopped where `stop` says so.
        """
        sums = summed_evaluation(self.model, self.objective, self.batches(), self.devices, stop, self.on_split)
        wanted = list(dict.fromkeys([*LOSS_METRICS, *self.metric_names]))
        texts = [name for name in wanted if needs_generation(name)]
        computed = sums.metrics([name for name in wanted if name not in texts])
        if texts:
            questions = self.questions()
            answers = answer_questions(
                self.model,
                self.tokenizer,
                questions,
                self.devices,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
            computed |= text_metrics(texts, answers, [question.reference for question in questions])
        return sums, {name: computed[name] for name in wanted}


def make_evaluator(
    model: TunedModel,
    objective: Objective,
    tokenizer: Tokenizer,
    devices: Devices,
    rows: EncodedRows,
    questions: Callable[[], Sequence[Question]],
    settings: EvaluationSection,
    *,
    max_length: int,
    metric_names: tuple[str, ...] = (),
    on_split: Callable[[Batch], None] = lambda batch: None,
) -> Evaluator:
    """The evaluator of `rows`, with the section's metrics unless others are named."""
    return Evaluator(
        model=model,
        objective=objective,
        tokenizer=tokenizer,
        devices=devices,
        batches=lambda: evaluation_batches(
            rows, batch_size=settings.batch_size, pad_id=tokenizer.pad_id, max_length=max_length
        ),
        questions=questions,
        metric_names=metric_names or settings.metrics,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        on_split=on_split,
    )


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best` in the metric's own direction; NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best if facts_of("metrics", metric).HIGHER_IS_BETTER else value < best


def measuring_objective(base: LoadedModel, logits_chunk_tokens: int) -> Objective:
    """What measures the loss of answers where no recipe names an objective.

    Raises: ModelError where nothing does.
    """
    settings = supervised_objective(base.family.name) or SftSettings()
    objective = make_objective(settings, logits_chunk_tokens=logits_chunk_tokens)
    check_family(base, objective)
    return objective
