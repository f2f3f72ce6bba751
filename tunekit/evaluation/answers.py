"""Generates answers to prompts, and computes text metrics of these answers."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from tunekit.contracts import Answering, AnswerLimits, Progress, no_progress
from tunekit.data.rows import Prompt
from tunekit.evaluation.row_losses import text_digest
from tunekit.evaluation.scores import EvaluationStopped, undisturbed
from tunekit.machine.devices import Devices
from tunekit.metrics.pairs import MeanOfPairs
from tunekit.tuned.model import TunedModel


def answer_questions(
    model: TunedModel,
    answering: Answering,
    questions: Sequence[Prompt],
    devices: Devices,
    limits: AnswerLimits,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Generate the model's answer to each question, in order. The questions are divided among the ranks. On each rank,
    questions of similar length share a batch. Raises: EvaluationStopped if `stop` returns true on any rank."""
    assert answering.write is not None  # the settings of the objective state which metrics it has
    mine = sorted(range(devices.rank, len(questions), devices.world), key=lambda at: _size(questions[at].prompt))
    texts, size = list[str](), limits.batch_size
    with undisturbed(model):
        for done in range(0, len(questions), devices.world * size):
            if devices.any(int(stop())):
                raise EvaluationStopped
            progress("answers written", done, len(questions))
            if chunk := mine[len(texts) : len(texts) + size]:
                texts += answering.write(model, [questions[index].prompt for index in chunk], limits)
    gathered = dict(devices.gather(list(zip(mine, texts, strict=True))))
    return [gathered[index] for index in range(len(questions))]


def _size(prompt: object) -> int:
    """The number of ids of a prompt; 0 if the prompt is a recording or an image."""
    return len(prompt) if isinstance(prompt, Sequence) else 0


def text_metrics(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    normalized: Callable[[str], str] = str,
) -> dict[str, float]:
    """The named metrics over all pairs of answer and reference. `normalized`: a function that normalises texts, for
    metrics whose module sets NORMALIZED. If a metric leaves pairs out, NAME_left_out is the number of these pairs."""
    metrics = dict[str, float]()
    for name in names:
        metric = import_module(f"tunekit.metrics.{name}")
        pairs = [predictions, references]
        if getattr(metric, "NORMALIZED", False):
            pairs = [[normalized(text) for text in texts] for texts in pairs]
        metrics[name] = metric.score(*pairs)
        empty = sum(not text.strip() for text in pairs[1]) if getattr(metric, "LEAVES_OUT", False) else 0
        metrics |= {f"{name}_left_out": float(empty)} if empty else {}
    return metrics


def answer_values(
    names: Sequence[str], prompts: Sequence[Prompt], predictions: Sequence[str], normalized: Callable[[str], str] = str
) -> dict[str, dict[str, list[Any]]]:
    """For each named metric that is a mean over pairs: `values`, the metric of each pair; and `digests`, hashes that
    identify the same row in every run."""
    references = [prompt.reference for prompt in prompts]
    digests = [text_digest(prompt.text, prompt.reference) for prompt in prompts]
    rows = dict[str, dict[str, list[Any]]]()
    for name in names:
        metric = import_module(f"tunekit.metrics.{name}")
        if isinstance(metric.score, MeanOfPairs):
            pairs = [[normalized(text) for text in texts] for texts in (predictions, references)]
            pairs = pairs if getattr(metric, "NORMALIZED", False) else [list(predictions), references]
            rows[name] = {"digests": digests, "values": metric.score.of_each(pairs[0], pairs[1])}
    return rows
