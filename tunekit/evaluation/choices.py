"""Answers to choose from: the questions of evaluation rows or prompts, and the scores of their answers."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from tunekit.contracts import Batch, Objective, Progress, Row, RowKind, Sums, no_progress
from tunekit.data.encoding.answers import answer_of, prompt_of, with_answer, with_own_text
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.problems import Problems
from tunekit.data.rows import Written
from tunekit.errors import DataError, RecipeError
from tunekit.evaluation.scores import summed_evaluation
from tunekit.formats.example import ChatExample, CompletionExample, Example, Message
from tunekit.machine.devices import Devices
from tunekit.model.attention.documents import keeps_documents_apart, within_windows
from tunekit.objectives.losses.confusion import label_sums
from tunekit.objectives.rows.choices import Answer, Question, make_question, split_question
from tunekit.recipe.evaluation import CHOICE_SUMS
from tunekit.tuned.model import TunedModel

Made = TypeVar("Made")
KEY = "evaluation.content_free_prompt"

CHUNK_QUESTIONS = 512  # whose scores are added up together
TAIL_TOKENS = 8  # of a prompt, after which an answer's ids are taken to be those of another prompt that ends so
CONTENT_FREE = ("N/A", "[MASK]", "")  # in place of a row's own text; source: Zhao et al. 2021, section 5
WIDEST_TOKENS = 2048  # of a prompt with answers side by side, whose mask grows with the square; or twice the prompt


@dataclass(frozen=True)
class Choices:
    """The answers to choose from, as they are written, and how they are compared."""

    texts: tuple[str, ...]
    score: str  # sum, mean_per_token or mean_per_byte
    content_free_prompt: str | None = None  # scores are calibrated by this prompt, with CONTENT_FREE in place of {}

    @property
    def labels(self) -> list[str]:
        """Without the blanks around them."""
        return [text.strip() for text in self.texts]

    def place_of(self, example: Example) -> int:
        """Which of them is the example's own answer. Raises: DataError where none is."""
        answer, labels = (answer_of(example) or "").strip(), self.labels
        if not answer:
            raise DataError("there is no answer to compare with evaluation.choices", "give a prompt and its answer")
        if answer not in labels:
            shown = ", ".join(labels[:8]) + (" ..." if len(labels) > 8 else "")
            what = f"the answer {answer[:60]!r} is not among evaluation.choices ({shown})"
            raise DataError(what, "mend it, or add it there")
        if self.content_free_prompt is not None:
            prompt, (start, end) = prompt_of(example), self.around
            if len(prompt) < len(start + end) or not (prompt.startswith(start) and prompt.endswith(end)):
                shown = prompt if len(prompt) <= 60 else f"{prompt[:30]} ... {prompt[-30:]}"
                what = f"the prompt {shown!r} has not the form of {self.content_free_prompt!r}"
                raise DataError(what, "mend it, or evaluation.content_free_prompt, where {} is a row's own text")
        return labels.index(answer)

    @property
    def around(self) -> tuple[str, str]:
        """What is before and after a row's own text in every prompt."""
        start, _, end = (self.content_free_prompt or "").partition("{}")
        return start, end


class QuestionMaker:
    """Makes a Question of an example, its last answer replaced by each choice and encoded as a training row.

    A row is encoded once for each prompt: the ids of the other answers are those of an earlier row whose prompt ended
    with the same tokens.
    """

    def __init__(self, choices: Choices, kind: RowKind) -> None:
        self.choices, self.kind = choices, kind.with_options(replace(kind.options, train_on="last"))
        self._known: dict[tuple[int, ...], tuple[Answer, ...]] = {}
        self._lengths: set[int] = set()

    def make(self, example: Example, origin: str, *, keep_blanks: bool = False) -> Question:
        """The question; the row's own answer must be a choice, and the blanks around it stay.

        Raises: DataError where it is none, or where there is no prompt.
        """
        own = answer_of(example) or ""
        right = 0 if keep_blanks else self.choices.place_of(example)
        start, end = own[: len(own) - len(own.lstrip())], own[len(own.rstrip()) :]
        texts = self.choices.texts if keep_blanks else [f"{start}{label}{end}" for label in self.choices.labels]
        try:
            return self._encoded(example, texts, origin, right)
        except Dropped as reason:
            raise DataError(f"{reason}, so that no answer can be chosen", "leave the row out") from None

    def content_free(self, make: Callable[[str], Example], *, keep_blanks: bool = False) -> list[Question]:
        """The questions that calibrate the others, if any do. `make`: the example with a text in place of its own.

        Raises: RecipeError where one of them has no prompt.
        """
        if self.choices.content_free_prompt is None:
            return []
        try:
            return [self.make(make(text), f"the prompt of {text!r}", keep_blanks=keep_blanks) for text in CONTENT_FREE]
        except DataError as error:
            what = f"with {', '.join(map(repr, CONTENT_FREE))} in place of {{}}: {error.problems[0].what}"
            raise RecipeError(what, "write the words around a row's own text", key=KEY) from error

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
            raise DataError("there is no prompt, so that an answer's first token is never predicted", "write one")
        if "trained" in first.parts:
            length = len(question.answers[0].ids)
            self._lengths.add(length)
            key = (length, *ids[-length - TAIL_TOKENS :])
            self._known[key] = question.answers
        return question


def make_questions(examples: Iterable[Written], choices: Choices, kind: RowKind) -> list[Question]:
    """The question of each evaluation row, then those that calibrate them.

    Raises: DataError naming each row whose answer is no choice.
    """
    maker, rows = QuestionMaker(choices, kind), list(examples)
    found = of_every_row(rows, lambda row: maker.make(row.example, f"{row.file}:{row.line}"))
    return found + maker.content_free(lambda text: with_own_text(rows[0].example, *choices.around, text))


def of_every_row(rows: Iterable[Written], make: Callable[[Written], Made]) -> list[Made]:
    """What is made of each row. Raises: DataError naming every row of which nothing can be made."""
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
    on_split: Callable[[Batch], None] = lambda batch: None,
    progress: Progress = no_progress,
) -> Tensor:
    """(rows, choices) float64: of each answer the sum of its tokens' log-probabilities, the token that ends it
    included (lm-eval's acc compares sums, without that token); mean_per_token: over their number; mean_per_byte: over
    the bytes of its text (lm-eval's acc_norm takes characters). Calibrated: less the logarithm of the mean probability
    that the answer has, among all answers, after the content-free prompts, which are the last of `questions`.

    No forward has more positions than `batch_size` of the longest prompts with one answer.
    Raises: DataError beyond the model's positions; EvaluationStopped where `stop` says so.
    """
    longest = max(question.longest for question in questions)
    _check_positions(model, questions)
    apart, shared = model.base.family.reads_source, _shares_prompt(model, longest)
    most, chunks = batch_size * longest, []
    for start in range(0, len(questions), CHUNK_QUESTIONS):
        chunk = questions[start : start + CHUNK_QUESTIONS]
        progress("questions answered", start, len(questions))
        rows: list[Row] = []
        for number, question in enumerate(chunk):
            widest = most if apart else min(most, max(WIDEST_TOKENS, 2 * len(question.prompt)))
            rows += split_question(question, number, widest if shared else 0, apart=apart)
        kind, loss = objective.rows.choosing((len(chunk), len(choices.texts)), model.base.dtype)
        batches = (kind.collate([[row] for row in group]) for group in _groups(rows, most))
        scorer = replace(objective, rows=kind, loss=loss)
        sums = summed_evaluation(model, scorer, batches, devices, stop, on_split)
        chunks.append(torch.tensor(sums.values["scores"], dtype=torch.float64))
    scores = torch.cat(chunks)
    if choices.score == "mean_per_token":
        scores = scores / torch.tensor([question.scored for question in questions])
    if choices.score == "mean_per_byte":
        scores = scores / torch.tensor([len(label.encode()) for label in choices.labels])
    if choices.content_free_prompt is None:
        return scores
    free = scores[-len(CONTENT_FREE) :].log_softmax(dim=1)  # (3, choices)
    return scores[: -len(CONTENT_FREE)] - (free.logsumexp(dim=0) - math.log(len(CONTENT_FREE)))


def choice_sums(scores: Tensor, questions: Sequence[Question]) -> Sums:
    """What the metrics of labels are made of. Shapes: scores (rows, choices)."""
    sums = label_sums(scores, torch.tensor([question.right for question in questions[: len(scores)]]))
    return {name: value for name, value in sums.items() if name in CHOICE_SUMS}


def choose(
    model: TunedModel,
    objective: Objective,
    choices: Choices,
    prompts: Sequence[str],
    batch_size: int,
    devices: Devices,
) -> list[str]:
    """The likeliest answer to each prompt, which is a user's turn where there is a chat template."""
    maker, (start, end) = QuestionMaker(choices, objective.rows), choices.around

    def answered(prompt: str) -> Example:
        turns = (Message("user", prompt), Message("assistant", choices.texts[0]))
        return ChatExample(turns, without_template=CompletionExample(prompt, choices.texts[0]))

    questions = [
        maker.make(answered(prompt), f"prompt {number}", keep_blanks=True) for number, prompt in enumerate(prompts, 1)
    ]
    questions += maker.content_free(lambda text: answered(f"{start}{text}{end}"), keep_blanks=True)
    scores = choice_scores(model, objective, choices, questions, devices, batch_size=batch_size)
    return [choices.labels[number] for number in scores.argmax(dim=1).tolist()]


def _groups(rows: Sequence[Row], most: int) -> Iterator[list[Row]]:
    """Rows of similar sizes, longest first, as many as `most` positions hold."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.size):
        if group and (len(group) + 1) * group[0].size > most:
            yield group
            group = []
        group.append(row)
    yield group


def _shares_prompt(model: TunedModel, longest: int) -> bool:
    """Whether answers of one prompt may be computed beside each other: surely apart, and none beyond a window."""
    family, net = model.base.family, model.base.net
    if model.virtual_tokens:
        return False
    return family.reads_source or (keeps_documents_apart(net) and within_windows(net, longest))


def _check_positions(model: TunedModel, questions: Sequence[Question]) -> None:
    table = model.base.family.learned_positions(model.base.net)
    for question in questions:
        apart = model.base.family.reads_source
        length = max(len(question.prompt), *(len(answer.ids) for answer in question.answers)) if apart else 0
        length = model.virtual_tokens + (length or question.longest)
        if table is not None and length > table:
            what = f"{question.origin}: {length} tokens with an answer, and the model's positions end at {table}"
            raise DataError(what, "shorten it")
