"""Runs tasks of lm-eval on a loaded model, and compares the results of two models document by document."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tunekit.basics import reach_of_equal, student
from tunekit.contracts import Objective, Progress, no_progress
from tunekit.errors import InputError, ModelError, TunekitError, listed
from tunekit.files.work_folder import temporary_folder
from tunekit.machine.devices import Devices
from tunekit.machine.versions import error_words, needed
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.model.transformers_guard import quiet, replaced
from tunekit.recipe.evaluation import EvaluationSection
from tunekit.tuned.model import TunedModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

KEY = "evaluation.tasks"
TEMPLATE_KEY = "evaluation.task_chat_template"
NO_TEMPLATE = "the tokenizer has no chat template", "name a file in data.chat_template, or write false"
FloatArray = NDArray[np.float64]
RESAMPLES = 1000  # for the standard errors of metrics that are no mean
MOST_NAMED = 5  # tasks that a note names
LEFT_OUT = -1.0  # lm-eval's value of a document that a metric leaves out


@dataclass(frozen=True)
class TaskScore:
    """The value of a metric of a task. `documents`: one number for each document, whose mean is `value`; empty for
    metrics that are not functions of means."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool
    count: int
    documents: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class TaskDifference:
    """How tuning changed a metric over the same documents. `low` to `high` is a 95 % interval of after minus before."""

    task: str
    metric: str
    before: float
    after: float
    low: float
    high: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """The result in words: better, worse, or no clear difference."""
        if self.low <= 0 <= self.high:
            return "no clear difference"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"


def require_harness() -> None:
    """Raises: InputError if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(*needed(KEY, "run: pip install 'tunekit[evals]'", error)) from error


@dataclass(frozen=True)
class Tasks:
    """Tasks in the form that lm-eval accepts: names that it knows, or the contents of YAML files."""

    settings: EvaluationSection
    manager: TaskManager
    specs: Sequence[str | dict[str, Any]]
    without_lengths: dict[str, None] = field(default_factory=dict)  # computed tasks that do not generate their prompts

    def notes(self) -> list[str]:
        """A note about computed tasks on which evaluation.task_lengths has no effect."""
        if not (self.settings.task_lengths and self.without_lengths):
            return []
        names = listed(list(self.without_lengths), MOST_NAMED)
        return [f"evaluation.task_lengths has no effect on {names}, which do not generate their prompts"]


def load_tasks(settings: EvaluationSection) -> Tasks:
    """Find the tasks that `settings` names. lm-eval's own 14,000 files are read only if a task is named without a file.

    Raises: InputError for an unknown name, a missing file, a YAML file of a group of tasks, or if lm-eval is not
    installed.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"tokenizer": ""}  # run_tasks writes the tokenizer's folder into it
    if settings.task_lengths:
        metadata["max_seq_lengths"] = list(settings.task_lengths)
    files = {name: _read_task(Path(name)) for name in settings.tasks if Path(name).suffix in (".yaml", ".yml")}
    with _quiet():
        manager = TaskManager(include_defaults=len(files) < len(settings.tasks), metadata=metadata)
    for name in settings.tasks:
        if name not in files and name not in manager.all_tasks:
            how = "write the name of a task of lm-eval, or the path of a task's YAML file"
            raise InputError(f"lm-eval has no task {name!r}", how, key=KEY)
    return Tasks(settings, manager, [files.get(name, name) for name in settings.tasks])


def run_tasks(
    model: TunedModel,
    tokenizer: LoadedTokenizer,
    objective: Objective,
    tasks: Tasks,
    devices: Devices,
    progress: Progress = no_progress,
    template: str | None = None,
) -> list[TaskScore]:
    """Score the model on the tasks. `objective`: an objective whose rows are texts. `template`: a chat template that
    replaces the tokenizer's own.

    Raises: ModelError if the model is not a causal language model, or if the settings request a chat template and there
    is none; InputError if a task fails.
    """
    family, settings = model.base.family, tasks.settings
    if not family.answers or family.reads_source or not family.reads_ids:
        what = f"{model.base.facts.name_or_path} is {family.text}; tasks need a causal language model"
        raise ModelError(what, f"remove {KEY}", key=KEY)
    if settings.task_chat_template and (template or tokenizer.chat_template) is None:
        raise ModelError(*NO_TEMPLATE, key=TEMPLATE_KEY)
    from lm_eval import simple_evaluate

    from tunekit.evaluation.tasks.harness import HarnessModel

    harness = HarnessModel(model, tokenizer, objective, devices, settings.batch_size, progress, template)
    with temporary_folder() as folder, _quiet():
        tokenizer.save(Path(folder))  # generated tasks count tokens
        tasks.manager.metadata["tokenizer"] = folder
        try:
            results = simple_evaluate(
                harness,
                tasks=deepcopy(tasks.specs),
                task_manager=tasks.manager,
                limit=settings.task_documents,
                apply_chat_template=settings.task_chat_template,
                bootstrap_iters=RESAMPLES,
            )
        except (TunekitError, RuntimeError):  # the second also if memory runs out
            raise
        except Exception as error:  # the code of tasks and data sets may raise anything
            raise _task_error("lm-eval cannot compute a task", error) from error
    tasks.without_lengths.update(dict.fromkeys(fixed_tasks(results)))
    return list(scores_of(results))


def fixed_tasks(results: Mapping[str, Any]) -> list[str]:
    """The computed tasks whose prompts come from a data set, not from code that generates them."""
    return [name for name, config in results.get("configs", {}).items() if not config.get("custom_dataset")]


def _read_task(path: Path) -> dict[str, Any]:
    """The content of a task's YAML file. Raises: InputError for a missing file, or a YAML file of a group of tasks."""
    if not path.is_file():
        raise InputError(f"{path}: no such file", "check the path", key=KEY)
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = dict(load_yaml(path, resolve_func=True))
    except Exception as error:  # the file may name code
        raise _task_error(f"{path} cannot be read", error) from error
    if "group" in config:  # lm-eval reads these only from its own folders
        raise InputError(f"{path} describes a group of tasks", "write the files of the group's tasks", key=KEY)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        config["dataset_kwargs"]["data_files"] = _near(files, path.parent)
    return config


def _task_error(what: str, error: Exception) -> InputError:
    how = "check the task's file, its data and the connection; tunekit --debug shows the place"
    return InputError(f"{what}: {error_words(error)}", how, key=KEY)


def _near(files: object, folder: Path) -> object:
    """The paths of a task's data files. A relative path is resolved in the task's folder if the file exists there."""
    if isinstance(files, Mapping):
        return {name: _near(value, folder) for name, value in files.items()}
    if isinstance(files, str):
        return str(folder / files) if (folder / files).exists() else files
    return [_near(value, folder) for value in files] if isinstance(files, list) else files


def scores_of(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    """The metrics of each task, and the means of each group of tasks."""
    groups = ((name, list(_group_samples(results, name))) for name in results.get("groups", {}))
    for task, samples in chain(results["samples"].items(), groups):
        for name, value in results["results"][task].items():
            metric, _, rule = name.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            documents = [sample[metric] for sample in samples if sample["filter"] == rule and metric in sample]
            if documents and all(value == LEFT_OUT for value in documents):
                continue  # a length of RULER that was not asked for
            numbers = _numbers(documents, float(value))
            error = results["results"][task].get(f"{metric}_stderr,{rule}")
            if not isinstance(error, int | float) and len(numbers) > 1:  # lm-eval has none for perplexities by word
                error = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))
            yield TaskScore(
                task,
                metric if rule == "none" else f"{metric} ({rule})",
                float(value),
                float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                results["higher_is_better"][task].get(metric) is not False,
                len(documents),
                numbers,
            )


def _group_samples(results: Mapping[str, Any], name: str) -> Iterator[Any]:
    """The documents of all tasks of a group, which may contain groups."""
    yield from results["samples"].get(name, ())
    for part in results["group_subtasks"].get(name, ()):
        yield from _group_samples(results, part)


def _numbers(documents: Sequence[object], value: float) -> tuple[float, ...]:
    """One number for each document, so that their mean is `value`; empty if the metric is not a function of means.

    A perplexity is a function of means over documents. It uses log-probabilities x, or pairs of x and a number of words
    or bytes n. A document's number is the first-order change that it causes in the metric (the delta method):
    e^-mean(x) (1 - x + mean(x)), and with the rate r = sum(x) / sum(n): e^-r (1 - (x - r n) / mean(n)).
    """
    entries = [tuple(each) if isinstance(each, tuple | list) else (each,) for each in documents]
    if len({len(each) for each in entries}) != 1 or not all(
        isinstance(n, int | float) for each in entries for n in each
    ):
        return ()
    array = np.array(entries, dtype=np.float64)  # (documents, 1 or 2)
    kinds = _means(array[array != LEFT_OUT]) if array.shape[1] == 1 else _rates(array) if array.shape[1] == 2 else ()
    with np.errstate(all="ignore"):  # pairs of other metrics may sum to 0
        matching = (each for each in kinds if math.isclose(float(each.mean()), value, rel_tol=1e-9, abs_tol=1e-9))
        return tuple(map(float, next(matching, ())))


def _means(values: FloatArray) -> Iterator[FloatArray]:
    """Each document's number for a mean, then for the perplexity of a mean. Shapes: (documents,) -> (documents,)."""
    yield values
    yield np.exp(-values.mean()) * (1 - values + values.mean())


def _rates(pairs: FloatArray) -> Iterator[FloatArray]:
    """Each document's number for a perplexity per word or byte, then for bits per byte. Shapes: (documents, 2) ->
    (documents,)."""
    rate = pairs[:, 0].sum() / pairs[:, 1].sum()
    changes = (pairs[:, 0] - rate * pairs[:, 1]) / pairs[:, 1].mean()
    yield np.exp(-rate) * (1 - changes)
    yield -(rate + changes) / math.log(2)


def task_differences(before: Sequence[TaskScore], after: Sequence[TaskScore]) -> list[TaskDifference]:
    """The change of each metric that has a number for each document. The 95 % interval is computed from the differences
    of the documents' numbers."""
    earlier = {(score.task, score.metric): score for score in before}
    results = []
    for score in after:
        old = earlier.get((score.task, score.metric))
        if old is None or len(score.documents) < 2 or len(old.documents) != len(score.documents):
            continue
        changes = np.array(score.documents) - np.array(old.documents)  # (documents,)
        mean, error = float(changes.mean()), float(changes.std(ddof=1)) / math.sqrt(len(changes))
        half = student(len(changes) - 1) * error if np.ptp(changes) else reach_of_equal(mean, len(changes))
        results.append(
            TaskDifference(
                score.task, score.metric, old.value, score.value, mean - half, mean + half, score.higher_is_better
            )
        )
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context manager that hides lm-eval's notices and progress bars, and git's message outside a repository."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), replaced(vars(evaluator), get_git_commit_hash=lambda: None):
            yield
    finally:
        logger.setLevel(level)
