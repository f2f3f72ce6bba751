"""One evaluation of the eval rows, as the recipe's `evaluation:` asks for it.

Model, rows and settings go in; metrics by name come out, those of the objective always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from tunekit.contracts import Batch, Objective, Rows
from tunekit.data.batching.windows import evaluation_batches
from tunekit.data.rows import Prompt, RowSet
from tunekit.machine.devices import Devices
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.recipe.names import facts_of, needs_generation
from tunekit.tuned.answers import answer_questions, text_metrics
from tunekit.tuned.model import TunedModel
from tunekit.tuned.scores import EvaluationSums, summed_evaluation, undisturbed


@dataclass(frozen=True)
class Evaluator:
    """Computes metrics over one set of rows: the objective's, and `metric_names`, or those of the settings."""

    model: TunedModel
    objective: Objective
    devices: Devices
    rows: Rows
    questions: Sequence[Prompt]  # see questions_for
    settings: EvaluationSection
    metric_names: tuple[str, ...] = ()
    template: str | None = None  # of the questions, where it is not the tokenizer's own
    on_split: Callable[[Batch], None] = lambda batch: None  # told of a batch that ran out of memory

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> tuple[EvaluationSums, dict[str, float]]:
        """The sums, and every metric by name. Raises: EvaluationStopped where `stop` says so."""
        batches = partial(evaluation_batches, self.rows, self.objective, batch_size=self.settings.batch_size)
        mine = islice(batches(), self.devices.rank, None, self.devices.world)
        with undisturbed(self.model):
            objective = self.objective.measuring(self.model, self.rows, mine, self.devices.gather)
        sums = summed_evaluation(self.model, objective, batches(), self.devices, stop, self.on_split)
        wanted = list(dict.fromkeys([*self.objective.metrics, *(self.metric_names or self.settings.metrics)]))
        texts = [name for name in wanted if needs_generation(name)]
        computed = sums.metrics([name for name in wanted if name not in texts])
        if texts:
            answers = answer_questions(
                self.model,
                self.objective,
                self.questions,
                self.devices,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                template=self.template,
            )
            computed |= text_metrics(texts, answers, [question.reference for question in self.questions])
        return sums, {name: computed[name] for name in wanted}


def questions_for(rows: RowSet, metric_names: Sequence[str]) -> Sequence[Prompt]:
    """The prompts of the evaluation rows where one of these metrics, or of the objective's, needs answers.

    They are read here and now: the files may have moved by the time of an evaluation.
    """
    names = [*rows.objective.metrics, *metric_names]
    return rows.evaluation_prompts() if any(needs_generation(name) for name in names) else ()


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best` in the metric's own direction; NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best if facts_of("metrics", metric).HIGHER_IS_BETTER else value < best
