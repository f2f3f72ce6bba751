"""Multiple choice: makes questions from evaluation rows or prompts, and computes a score for each possible answer."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunekit.contracts import Objective, Progress, Row, RowKind, Sums, no_progress
from tunekit.data.encoding.answers import answer_of, prompt_of, with_answer, with_own_text
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.problems import Problems
from tunekit.data.rows import Written
from tunekit.errors import DataError, RecipeError
from tunekit.evaluation.row_losses import text_digest
from tunekit.evaluation.scores import summed_evaluation
from tunekit.formats.example import ChatExample, CompletionExample, Example, Message, question_turns
from tunekit.machine.devices import Devices
from tunekit.model.attention.documents import keeps_documents_apart, within_windows
from tunekit.objectives.losses.confusion import label_sums
from tunekit.objectives.rows.choices import Answer, Question, make_question, split_question
from tunekit.recipe.evaluation import CHOICE_SUMS
from tunekit.tuned.model import TunedModel

Made = TypeVar("Made")
KEY = "evaluation.content_free_prompt"

CHUNK_QUESTIONS = 512  # questions whose scores are summed together
TAIL_TOKENS = 8  # answers have the same ids after prompts whose last TAIL_TOKENS tokens are equal
CONTENT_FREE = ("N/A", "[MASK]", "")  # texts in place of a row's text; source: Zhao et al. 2021, section 5
WIDEST_TOKENS = 2048  # longest prompt with all answers (or twice the prompt): the mask grows with the square


@dataclass(frozen=True)
class Choices:
    """The recipe's possible answers, and the kind of score by which they are compared."""

    texts: tuple[str, ...]
    score: str  # sum, mean_per_token or mean_per_byte
    content_free_prompt: str | None = None  # scores are calibrated by this prompt, with CONTENT_FREE in place of {}

    @property
    def labels(self) -> list[str]:
        """The answers without white space at both ends."""
        return [text.strip() for text in self.texts]

    def place_of(self, example: Example) -> int:
        """The index of the example's reference answer. Raises: DataError if it is not among the choices."""
        answer, labels = (answer_of(example) or "").strip(), self.labels
        if not answer:
            raise DataError("the row has no answer to compare with evaluation.choices", "write a prompt and its answer")
        if answer not in labels:
            shown = ", ".join(labels[:8]) + (" ..." if len(labels) > 8 else "")
            what = f"the answer {answer[:60]!r} is not among evaluation.choices ({shown})"
            raise DataError(what, "correct the answer, or add it to evaluation.choices")
        if self.content_free_prompt is not None:
            prompt, (start, end) = prompt_of(example), self.around
            if len(prompt) < len(start + end) or not (prompt.startswith(start) and prompt.endswith(end)):
                shown = prompt if len(prompt) <= 60 else f"{prompt[:30]} ... {prompt[-30:]}"
                what = f"the prompt {shown!r} does not have the form of {self.content_free_prompt!r}"
                raise DataError(
                    what,
                    "correct the row, or correct evaluation.content_free_prompt, in which {} stands for the row's text",
                )
        return labels.index(answer)

    @property
    def around(self) -> tuple[str, str]:
        """The text before and the text after a row's content, which are the same in every prompt."""
        start, _, end = (self.content_free_prompt or "").partition("{}")
        return start, end


class QuestionMaker:
    """Makes a Question of an example. Each choice in turn replaces the last answer, and the result is encoded in the
    same way as a training row.
    If an earlier prompt ended with the same tokens, only the first choice is encoded. The ids of the other choices are
    reused from the earlier question."""

    def __init__(self, choices: Choices, kind: RowKind) -> None:
        self.choices, self.kind = choices, kind.with_options(replace(kind.options, train_on="last"))
        self._known: dict[tuple[int, ...], tuple[Answer, ...]] = {}
        self._lengths: set[int] = set()

    def make(self, example: Example, origin: str, *, keep_blanks: bool = False) -> Question:
        """Make the question of an example. If the row's reference answer has white space at its ends, every choice gets
        the same white space.
        Raises: DataError if the reference answer is not a choice, or if there is no prompt."""
        own = answer_of(example) or ""
        right = 0 if keep_blanks else self.choices.place_of(example)
        start, end = own[: len(own) - len(own.lstrip())], own[len(own.rstrip()) :]
        texts = self.choices.texts if keep_blanks else [f"{start}{label}{end}" for label in self.choices.labels]
        try:
            return self._encoded(example, texts, origin, right)
        except Dropped as reason:
            raise DataError(f"{reason}, so no answer can be chosen", "leave the row out") from None

    def content_free(self, make: Callable[[str], Example], *, keep_blanks: bool = False) -> list[Question]:
        """The questions that calibrate the scores; empty if scores are not calibrated. `make`: returns an example in
        which the given text replaces the row's content.
        Raises: RecipeError if one of the questions has no prompt."""
        if self.choices.content_free_prompt is None:
            return []
        try:
            return [self.make(make(text), f"the prompt of {text!r}", keep_blanks=keep_blanks) for text in CONTENT_FREE]
        except DataError as error:
            what = f"with {', '.join(map(repr, CONTENT_FREE))} in place of {{}}: {error.problems[0].what}"
            raise RecipeError(
                what, "write the text that all prompts share, with {} in place of a row's own text", key=KEY
            ) from error

    def _encoded(self, example: Example, texts: Sequence[str], origin: str, right: int) -> Question:
        first = self.kind.encode(with_answer(example, texts[0]), origin)
        if "trained" in first.parts:
            ids = first.parts["ids"][: int(first.parts["trained"].nonzero()[0][-1]) + 1].tolist()
            for length in self._lengths:
                known = self._known.get((length, *ids[-length - TAIL_TOKENS :]))
                if known is not None:
                    return Question(first.parts["ids"][: len(ids) - length], known, origin, right)
        rest = [self.kind.encode(with_answer(example, text), origin) for text in texts[1:]]
        question = make_question([first, *rest], right)
        if not len(question.prompt):
            raise DataError("the row has no prompt, so the answer's first token cannot be scored", "write a prompt")
        if "trained" in first.parts:
            length = len(question.answers[0].ids)
            self._lengths.add(length)
            key = (length, *ids[-length - TAIL_TOKENS :])
            self._known[key] = question.answers
        return question


def make_questions(examples: Iterable[Written], choices: Choices, kind: RowKind) -> list[Question]:
    """Make the question of each evaluation row, then the questions that calibrate the scores.
    Raises: DataError that lists the rows whose answer is not a choice."""
    maker, rows = QuestionMaker(choices, kind), list(examples)
    found = of_every_row(rows, lambda row: maker.make(row.example, f"{row.file}:{row.line}"))
    return found + maker.content_free(lambda text: with_own_text(rows[0].example, *choices.around, text))


def of_every_row(rows: Iterable[Written], make: Callable[[Written], Made]) -> list[Made]:
    """The result of `make` for each row. Raises: DataError that lists all rows for which `make` raised an error."""
    problems, results = Problems(), []
    for row in rows:
        try:
            results.append(make(row))
        except DataError as error:
            problems.add_error(row.file, row.line, error)
    problems.raise_if_any()
    return results


def choice_scores(
    model: TunedModel,
    objective: Objective,
    choices: Choices,
    questions: Sequence[Question],
    devices: Devices,
    *,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
    on_split: Callable[[str], None] = lambda size: None,
    progress: Progress = no_progress,
) -> Tensor:
    """The score of each answer, (rows, choices) float64. There are three kinds of score. sum: the sum of the tokens'
    log-probabilities, including the end token (which lm-eval's acc excludes). mean_per_token: the sum divided by the
    number of tokens. mean_per_byte: the sum divided by the bytes of the answer's text (lm-eval's acc_norm divides by
    characters).
    Calibration subtracts, from each answer's score, the logarithm of the answer's mean probability among all answers
    after the content-free prompts. These prompts are the last of `questions`.
    A forward has at most as many positions as `batch_size` copies of the longest prompt with an answer.
    Raises: DataError if a question needs more positions than the model has; EvaluationStopped if `stop` returns
    true."""
    most, chunks = batch_size * max(question.longest for question in questions), []
    for start in range(0, len(questions), CHUNK_QUESTIONS):
        progress("questions answered", start, len(questions))
        chunk = questions[start : start + CHUNK_QUESTIONS]
        sums = answer_sums(model, objective, chunk, devices, most=most, stop=stop, on_split=on_split)
        chunks.append(torch.tensor(sums["scores"], dtype=torch.float64))
    scores = torch.cat(chunks)
    if choices.score == "mean_per_token":
        scores = scores / torch.tensor([question.scored for question in questions])
    if choices.score == "mean_per_byte":
        scores = scores / torch.tensor([len(label.encode()) for label in choices.labels])
    if choices.content_free_prompt is None:
        return scores
    free = scores[-len(CONTENT_FREE) :].log_softmax(dim=1)  # (3, choices)
    return scores[: -len(CONTENT_FREE)] - (free.logsumexp(dim=0) - math.log(len(CONTENT_FREE)))


def answer_sums(
    model: TunedModel,
    objective: Objective,
    questions: Sequence[Question],
    devices: Devices,
    *,
    most: int,
    stop: Callable[[], bool] = lambda: False,
    on_split: Callable[[str], None] = lambda size: None,
) -> dict[str, list[list[float]]]:
    """The sums of ChoiceLoss for questions that have equally many answers. A forward has at most `most` positions.
    Raises: DataError if a question needs more positions than the model has; EvaluationStopped if `stop` returns
    true."""
    _check_positions(model, questions)
    longest = max(question.longest for question in questions)
    apart, shared = model.base.family.reads_source, _shares_prompt(model, longest)
    rows: list[Row] = []
    for number, question in enumerate(questions):
        widest = most if apart else min(most, max(WIDEST_TOKENS, 2 * len(question.prompt)))
        rows += split_question(question, number, widest if shared else 0, apart=apart)
    kind, loss = objective.rows.choosing((len(questions), len(questions[0].answers)), model.base.dtype)
    batches = (kind.collate([[row] for row in group]) for group in _groups(rows, most))
    scorer = replace(objective, rows=kind, loss=loss)
    return summed_evaluation(model, scorer, batches, devices, stop, on_split).values


def choice_sums(scores: Tensor, questions: Sequence[Question]) -> Sums:
    """The sums from which label metrics (such as accuracy) are computed. Shapes: scores (rows, choices)."""
    sums = label_sums(scores, torch.tensor([question.right for question in questions[: len(scores)]]))
    return {name: value for name, value in sums.items() if name in CHOICE_SUMS}


def choice_values(scores: Tensor, questions: Sequence[Question]) -> dict[str, dict[str, list[Any]]]:
    """The accuracy of each row (1 if the right answer is chosen, else 0), and hashes that identify the same row in
    every run. Shapes: scores (rows, choices)."""
    questions = questions[: len(scores)]
    right = scores.argmax(dim=1) == torch.tensor([question.right for question in questions])  # (rows,)
    digests = [text_digest(question.prompt.tobytes(), str(question.right)) for question in questions]
    return {"accuracy": {"digests": digests, "values": right.double().tolist()}}


def choose(
    model: TunedModel,
    objective: Objective,
    choices: Choices,
    prompts: Sequence[str],
    batch_size: int,
    devices: Devices,
    system: str | None = None,
) -> list[str]:
    """The most likely of the choices for each prompt. If there is a chat template, the prompt is encoded as a user's
    turn, after an optional system message."""
    maker, (start, end) = QuestionMaker(choices, objective.rows), choices.around

    def answered(prompt: str) -> Example:
        turns = (*question_turns(prompt, system), Message("assistant", choices.texts[0]))
        return ChatExample(turns, without_template=CompletionExample(prompt, choices.texts[0]))

    questions = [
        maker.make(answered(prompt), f"prompt {number}", keep_blanks=True) for number, prompt in enumerate(prompts, 1)
    ]
    questions += maker.content_free(lambda text: answered(f"{start}{text}{end}"), keep_blanks=True)
    scores = choice_scores(model, objective, choices, questions, devices, batch_size=batch_size)
    return [choices.labels[number] for number in scores.argmax(dim=1).tolist()]


def _groups(rows: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """Groups of rows of similar sizes, longest first. A group has at most `most` positions."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.size):
        if group and (len(group) + 1) * group[0].size > most:
            yield group
            group = []
        group.append(row)
    yield group


def _shares_prompt(model: TunedModel, longest: int) -> bool:
    """Whether one sequence can contain a prompt and all its answers. For this, the model must hide the answers from
    each other, and no attention window may be shorter than the sequence."""
    family, net = model.base.family, model.base.net
    if model.virtual_tokens:
        return False
    return family.reads_source or (keeps_documents_apart(net) and within_windows(net, longest))


def _check_positions(model: TunedModel, questions: Sequence[Question]) -> None:
    table = model.base.family.learned_positions(model.base.net)
    for question in questions:
        apart = model.base.family.reads_source
        length = max(len(question.prompt), *(len(answer.ids) for answer in question.answers)) if apart else 0
        length = model.virtual_tokens + (length or question.longest - 1)  # the last token is only predicted
        if table is not None and length > table:
            what = f"{question.origin}: the prompt and an answer need {length} positions, but the model has {table}"
            raise DataError(what, "shorten the prompt or the answer")
