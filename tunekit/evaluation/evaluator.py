"""Runs an evaluation of all evaluation rows, with the settings in the recipe's `evaluation:` section."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunekit.adapters.several import AdapterSet
from tunekit.contracts import Answering, AnswerLimits, Batch, Objective, Processor, Progress, Rows, no_progress
from tunekit.data.batching.steps import evaluation_batches
from tunekit.data.encoding.answers import answers_of_rows
from tunekit.data.encoding.store import ChosenRows, by_source
from tunekit.data.rows import Prompt, RowSet
from tunekit.errors import DataError, ModelError, RecipeError
from tunekit.evaluation.answers import answer_questions, answer_values, text_metrics
from tunekit.evaluation.choices import (
    CONTENT_FREE,
    KEY,
    Choices,
    choice_scores,
    choice_sums,
    choice_values,
    make_questions,
    of_every_row,
)
from tunekit.evaluation.retrieval import bm25_ranks, load_corpus
from tunekit.evaluation.scores import (
    EvaluationStopped,
    EvaluationSums,
    all_together,
    summed_evaluation,
    undisturbed,
)
from tunekit.machine.devices import Devices
from tunekit.metrics.classes import class_table
from tunekit.metrics.retrieval import search_values
from tunekit.model.load import LoadedModel
from tunekit.objectives.rows.choices import Question
from tunekit.recipe.data import DataSection
from tunekit.recipe.evaluation import CHOICE_METRICS, FROM_DATA, EvaluationSection
from tunekit.recipe.reading.names import facts_of, follows_from, needs_generation
from tunekit.tuned.fit import row_problems
from tunekit.tuned.model import ModelRun, TunedModel

SAMPLES = 8  # answers that a report shows


@dataclass(frozen=True)
class Queries:
    """The queries of an evaluation: prompts that the model answers, and multiple-choice questions. `corpus`: the
    documents to search, if they are not those of the rows. `baseline`: the ranks of relevant documents by BM25."""

    prompts: Sequence[Prompt] = ()
    choices: Choices | None = None
    questions: Sequence[Question] = ()
    corpus: Rows | None = None
    baseline: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: sums, and every metric by name.
    `classes`: `labels`, the `counts` of each label (predicted right, predicted, true) and the `confusion` matrix; None
    if rows have no labels. `samples`: generated answers to the first rows. `sources`: if there are several sources, the
    metrics and the number of `rows` of each. `search`: the metrics of each ranking of documents, by its name.
    `pictures`: images for the report. `facts`: values computed from all rows, which are saved in the adapter's folder.
    `row_metrics`: for each metric of answers that is a mean over rows, the rows' `values` and `digests` (hashes)."""

    sums: EvaluationSums
    metrics: dict[str, float]
    classes: dict[str, Any] | None = None
    samples: list[dict[str, str]] | None = None
    sources: dict[str, dict[str, float]] | None = None
    search: dict[str, dict[str, float]] | None = None
    pictures: Sequence[NDArray[np.uint8]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    row_metrics: Mapping[str, Mapping[str, list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """Computes metrics over one set of rows: the objective's metrics and text metrics. `metric_names`: the text
    metrics; by default the metrics in the settings."""

    model: TunedModel
    objective: Objective
    devices: Devices
    rows: Rows
    queries: Queries
    settings: EvaluationSection
    metric_names: tuple[str, ...] = ()
    template: str | None = None  # chat template of the prompts, if it is not the tokenizer's
    on_split: Callable[[str], None] = lambda size: None  # called with the size of a batch that ran out of memory
    progress: Progress = no_progress

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Evaluate all rows. Raises: EvaluationStopped if `stop` returns true."""
        size, kind = self.settings.batch_size, self.objective.rows
        stores = [self.rows, *([] if self.queries.corpus is None else [self.queries.corpus])]
        batches = chain.from_iterable(evaluation_batches(rows, kind, batch_size=size) for rows in stores)
        mine = takewhile(lambda batch: not stop(), islice(batches, self.devices.rank, None, self.devices.world))

        def gather(values: list[Any]) -> list[Any]:
            if self.devices.any(int(stop())):  # on some rank, `mine` ended early
                raise EvaluationStopped
            return self.devices.gather(values)

        with undisturbed(self.model):
            run = ModelRun(self.model, self.objective.rows, gather, on_split=self.on_split)
            measured = self.objective.evaluation_copy()
            objective = replace(measured, loss=measured.loss.measuring(run, self.rows, mine))
        each = self._by_source(objective, stop)
        sums = all_together(list(each.values()))
        if not sums.values["units"]:
            what = f"no reward returned a number for any of the {sums.rows:,} evaluation rows"
            raise DataError(what, "change a reward so that it returns numbers for these rows", key="data.eval")
        choices, chosen, of_answers = self.queries.choices, tuple[str, ...](), dict[str, Mapping[str, list[Any]]]()
        if choices is not None:
            chosen = CHOICE_METRICS
            scores = self._chosen(choices, self.queries.questions, stop)
            counted = choice_sums(scores, self.queries.questions)
            sums.values.update({name: value.tolist() for name, value in counted.items()})
            of_answers |= choice_values(scores, self.queries.questions)
        always = (*self.objective.loss.metrics, *chosen)
        wanted = list(dict.fromkeys([*always, *(self.metric_names or self.settings.metrics)]))
        texts = [name for name in wanted if needs_generation(name)]
        computed, samples = sums.metrics([name for name in wanted if name not in texts]), None
        if texts or self.queries.prompts:
            prompts, answering = self.queries.prompts, self._answering
            answers = self._answers(prompts, stop)
            references = [prompt.reference for prompt in prompts]
            computed |= text_metrics(texts, answers, references, answering.normalize)
            of_answers |= answer_values(texts, prompts, answers, answering.normalize)
            samples = [
                {"prompt": prompt.text, "reference": prompt.reference, "answer": answer}
                for prompt, answer in zip(prompts[: self.settings.samples or SAMPLES], answers, strict=False)
            ]
        ordered = {name: computed.pop(name) for name in wanted} | computed  # then the numbers of pairs left out
        of_rows = [name for name in wanted if name not in texts and name not in chosen]
        sources, pictures = _sources(each, of_rows), self._pictures(stop)
        classes = objective.loss.class_counts(sums.values)
        if choices is not None:
            classes = class_table(choices.labels, sums.values["label_counts"], sums.values.get("confusion"))
        search, facts = self._search(objective.loss.measured_ranks), objective.loss.measured_facts
        return Evaluation(sums, ordered, classes, samples, sources, search, pictures, facts, of_answers)

    def _search(self, ranks: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, dict[str, float]] | None:
        """The metrics of each ranking of documents, and those of BM25; None if nothing was searched."""
        rankings = {**({"bm25": self.queries.baseline} if self.queries.baseline else {}), **ranks}
        return {name: search_values(each, self.settings.cutoffs) for name, each in rankings.items()} if ranks else None

    def query_seconds(self) -> tuple[float, float]:
        """The estimated seconds of an evaluation's generated answers, multiple-choice questions and pictures: of the
        model as it is, and of a model whose answers are as long as the references. Measured are a batch of answers, a
        batch of questions, and all pictures."""
        prompts, questions, choices = self.queries.prompts, self.queries.questions, self.queries.choices
        most, of_answers, share, started = max(self.settings.batch_size, len(CONTENT_FREE)), 0.0, 1.0, time.monotonic()
        if prompts:
            answers = self._answers(prompts[-most:])
            of_answers = (time.monotonic() - started) * max(len(prompts) / most, 1)
            written, wanted = sum(map(len, answers)), sum(len(prompt.reference) for prompt in prompts[-most:])
            share = wanted / written if written and wanted else 1.0
        started, others = time.monotonic(), 0.0
        if choices is not None:
            self._chosen(choices, questions[-most:])  # the last questions calibrate the scores
            others = (time.monotonic() - started) * max(len(questions) / most, 1)
        started = time.monotonic()
        self._pictures()
        others += time.monotonic() - started
        return of_answers + others, of_answers * share + others

    @property
    def _answering(self) -> Answering:
        assert self.objective.answering is not None  # or the recipe's checks refuse the metric
        return self.objective.answering

    def _answers(self, prompts: Sequence[Prompt], stop: Callable[[], bool] = lambda: False) -> list[str]:
        """The model's answers to the prompts."""
        limits = AnswerLimits(self.settings.max_new_tokens, self.settings.batch_size, self.template)
        return answer_questions(self.model, self._answering, prompts, self.devices, limits, self.progress, stop)

    def _pictures(self, stop: Callable[[], bool] = lambda: False) -> list[NDArray[np.uint8]]:
        """The images for the report, which only the main rank generates. Raises: EvaluationStopped, on all ranks, if
        `stop` returns true before an image."""
        answering = self.objective.answering
        if answering is None or answering.report_pictures is None:
            return []
        pictures, stopped = list[NDArray[np.uint8]](), False

        def progress(what: str, done: int, total: int) -> None:
            if stop():
                raise EvaluationStopped
            self.progress(what, done, total)

        if self.devices.is_main:
            try:
                with undisturbed(self.model):
                    pictures = answering.report_pictures(self.model, progress)
            except EvaluationStopped:
                stopped = True
        if self.devices.any(int(stopped)):
            raise EvaluationStopped
        return pictures

    def _by_source(self, objective: Objective, stop: Callable[[], bool]) -> dict[str, EvaluationSums]:
        """The sums of each source's rows, by the source's name."""
        done = 0

        def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
            nonlocal done
            for batch in batches:
                yield batch
                done += len(batch.rows)
                self.progress("evaluation rows measured", done, len(self.rows))

        sums = {}
        for name, rows in by_source(self.rows).items():
            batches = evaluation_batches(rows, self.objective.rows, batch_size=self.settings.batch_size)
            sums[name] = summed_evaluation(self.model, objective, counted(batches), self.devices, stop, self.on_split)
        return sums

    def _chosen(
        self, choices: Choices, questions: Sequence[Question], stop: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """The scores of the possible answers: (rows, choices) float64."""
        return choice_scores(
            self.model,
            self.objective,
            choices,
            questions,
            self.devices,
            batch_size=self.settings.batch_size,
            stop=stop,
            on_split=self.on_split,
            progress=self.progress,
        )


def _sources(each: Mapping[str, EvaluationSums], names: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """The finite metrics of each source; None if there is only one source. A source without units (such as one whose
    rows have no rewards) has no metrics. Metrics of chosen answers are computed only from all rows. Values computed
    from all rows (thresholds, KL) are the same for all sources. So the losses of sources, weighted by units, add up to
    the loss of all rows."""
    if len(each) < 2:
        return None
    names = [name for name in names if all(follows_from(name, sums.values) for sums in each.values())]
    by_source = {source: sums.metrics(names) if sums.values["units"] else {} for source, sums in each.items()}
    return {
        source: {"rows": each[source].rows, **{name: value for name, value in values.items() if math.isfinite(value)}}
        for source, values in by_source.items()
    }


def queries_of(
    rows: RowSet, settings: EvaluationSection, metric_names: Sequence[str], data: DataSection | None = None
) -> Queries:
    """The prompts and questions of an evaluation. If a metric needs generated answers, there is a prompt for each row;
    otherwise only for the rows in the report. Questions are made if the settings contain choices. With `from_data`, the
    choices are the answers in the rows of `data`.
    The rows are read now, because the files may have moved when an evaluation starts."""
    names = [*rows.objective.loss.metrics, *metric_names]
    shown = settings.samples if rows.objective.answering is not None else 0
    needed = None if any(needs_generation(name) for name in names) else shown
    check_answers(rows, names)
    prompts = tuple(islice(rows.evaluation_prompts(), needed))
    choices = choices_of(settings, rows.objective, data)
    corpus = load_corpus(settings, rows)
    if rows.objective.rows.documents is not None:
        documents = None if corpus is None else ChosenRows([corpus.all_rows])
        return Queries(prompts, corpus=documents, baseline=bm25_ranks(rows, corpus))
    if choices is None:
        if settings.content_free_prompt is not None:
            raise RecipeError(
                "there are no choices to calibrate", "add evaluation.choices, or remove this key", key=KEY
            )
        return Queries(prompts)
    return Queries(prompts, choices, make_questions(rows.evaluation_examples(), choices, rows.objective.rows))


def check_answers(rows: RowSet, metric_names: Sequence[str]) -> None:
    """Check that text metrics have a reference answer to compare with. Raises: DataError that names the metric."""
    for name in filter(needs_generation, metric_names):
        facts, answering = facts_of("metrics", name), rows.objective.answering
        normalize = answering.normalize if answering and getattr(facts, "NORMALIZED", False) else str
        answers = (normalize(prompt.reference) for prompt in rows.evaluation_prompts())
        if not any(answer.strip() or not getattr(facts, "LEAVES_OUT", False) for answer in answers):
            what = f"{name} compares with reference answers, but no evaluation row has one"
            raise DataError(what, f"add answers to the evaluation rows, or remove {name}", key="evaluation.metrics")


def check_queries(rows: RowSet, settings: EvaluationSection, data: DataSection) -> None:
    """Check the answers of evaluation rows before a model is loaded. Raises: DataError if a metric has no answers, or
    with a list of the rows whose answer is not a choice."""
    choices = choices_of(settings, rows.objective, data)
    if rows.evaluation is None:
        return
    check_answers(rows, settings.metrics)
    load_corpus(settings, rows)
    if choices is not None:
        of_every_row(rows.evaluation_examples(), lambda row: choices.place_of(row.example))


def choices_of(settings: EvaluationSection, objective: Objective, data: DataSection | None) -> Choices | None:
    """The possible answers in the settings; None if there are none. Raises: RecipeError if the objective's rows have no
    prompts with answers."""
    texts = settings.choices
    if texts is None:
        return None
    if not objective.rows.has_choices:
        what = f"multiple choice needs prompts with answers, and rows of the objective {objective.name} have none"
        raise RecipeError(what, "leave evaluation.choices out", key="evaluation.choices")
    if texts == FROM_DATA:
        if data is None:
            raise RecipeError(
                "from_data takes the choices from the rows of a recipe, but there is no recipe",
                "list the answers",
                key="evaluation.choices",
            )
        texts = answers_of_rows(data, objective.rows.example)
    return Choices(tuple(texts), settings.choice_score, settings.content_free_prompt)


def calibration_notes(settings: EvaluationSection) -> list[str]:
    """A note that describes how choices are calibrated, and what this costs."""
    if settings.choices is None or settings.content_free_prompt is None:
        return []
    texts = ", ".join(map(repr, CONTENT_FREE))
    return [
        f"choices are calibrated by {settings.content_free_prompt!r} with {texts} in place of {{}}: "
        f"each evaluation scores {len(CONTENT_FREE)} prompts in addition to its rows"
    ]


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` is better than `best` for this metric; a value that is not finite is never better."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value > best if facts_of("metrics", metric).HIGHER_IS_BETTER else value < best


def adapter_losses(
    model: LoadedModel,
    adapters: AdapterSet,
    processor: Processor,
    objective: Objective,
    rows: Rows,
    devices: Devices,
    settings: EvaluationSection,
) -> dict[str | None, float]:
    """The mean loss of each adapter, weighted by tokens. The key None has the loss of the base without an adapter.
    Raises: ModelError if rows do not fit the model."""
    losses: dict[str | None, float] = {}
    for name in (None, *adapters.adapters):
        adapters.switch(name)
        tuned = TunedModel(model, adapters.adapters.get(name or ""))
        problems = row_problems(model, processor, objective.rows, [rows], tuned.virtual_tokens)
        if problems:
            raise ModelError.of(problems)
        evaluator = Evaluator(tuned, objective, devices, rows, Queries(), settings, metric_names=("loss",))
        losses[name] = evaluator.evaluate().metrics["loss"]
    adapters.switch(None)
    return losses
