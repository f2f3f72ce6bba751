"""Speech to text: cross entropy on the transcript of a recording, given what the encoder heard.

Comes in: recordings with their texts, then a Batch and the decoder's last hidden states.  Goes out: rows of log-mel
features and an answer, then Loss (sum over the answers' tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    IGNORED,
    Batch,
    Loss,
    ModelOutput,
    Part,
    Row,
    RowLayout,
    Sampling,
    Sums,
)
from tunekit.data.batching.pad import lay_end_to_end
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.errors import DataError, Problem, RecipeError
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.objectives.losses.logprobs import loss_of_positions, sums_of_positions
from tunekit.objectives.recordings import PARTS, Recording, SpeechEncoder, make_row, transcripts
from tunekit.objectives.spec_augment import HeardObjective
from tunekit.recipe.objectives.speech import SpeechSettings

Array = NDArray[Any]


class Speech(HeardObjective):
    """loss = sum over the answers' tokens of -log p(token | recording, tokens before it); divided by the step's number
    of them. Those that name language and task are predicted too, as transformers' own labels are."""

    metrics: Sequence[str] = ("loss", "perplexity")

    def __init__(self, settings: SpeechSettings, processor: SpeechProcessor) -> None:
        super().__init__(settings, processor)
        self.settings, self.processor = settings, processor
        self.facts = settings.model_dump(include={"language", "task", "timestamps"})
        self.generation = generation_of(settings, processor)
        self.layout = RowLayout(
            PARTS,
            token_parts=("answer",),
            sizes=2,
            token_sizes=(1,),
            least=(processor.frames, 0) if processor.padded else (),
            told_by=("features", "place"),
            alike=None if processor.padded else "samples",
        )

    def row_encoder(self, options: EncodeOptions) -> SpeechEncoder:
        """Raises: RecipeError for options that mean nothing of recordings."""
        problems = []
        if options.train_on != "assistant":
            problems.append(
                Problem("of a recording its transcript is trained on", "write assistant", key="data.train_on")
            )
        if options.excess_length == "truncate":
            what = "a cut recording would be taught the text of the whole"
            problems.append(Problem(what, "write drop, split or error", key="data.excess_length"))
        if problems:
            raise RecipeError.of(problems)
        return SpeechEncoder(self.settings, self.processor, options)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The whole recording, and of its answer the tokens start .. stop-1."""
        parts = {**row.parts, "answer": row.parts["answer"][start : stop + 1]}
        return make_row(parts, row.sizes[0], row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row: the longest recording that the model hears, and an answer of so many tokens, or of as many as it can
        have."""
        row, processor = next(rows), self.processor
        parts = {**row.parts, "answer": np.resize(row.parts["answer"], min(size, processor.longest_answer) + 1)}
        if not processor.padded:
            samples = np.asarray([processor.seconds * processor.rate], np.int32)
            parts |= {"samples": samples, "features": np.zeros(samples, np.float32), "place": np.zeros(0, np.uint8)}
        return [make_row(parts, processor.frames, row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Recordings, and answers, which need no mask: padding comes last.

        Shapes: input_features (B, M, F) or input_values (B, N); decoder_input_ids, labels (B, A): position a predicts
        labels[a].
        """
        rows = [row for (row,) in sequences]
        answers = [row.parts["answer"] for row in rows]
        inputs = {
            self.processor.input_name: self.heard(rows),
            "decoder_input_ids": lay_end_to_end([[answer[:-1]] for answer in answers], self.processor.tokenizer.pad_id),
        }
        labels = lay_end_to_end([[answer[1:]] for answer in answers], IGNORED)
        size = max([*(row.sizes[0] for row in rows), *self.layout.least]) + labels.shape[1]
        return Batch(inputs, {"labels": labels}, tuple(map(tuple, sequences)), line_size=size)

    def spans(self, row: Row) -> list[Part]:
        """How long the recording is, and the answer."""
        answer, none = row.parts["answer"], np.zeros(0, np.int32)
        title = f"recording: {self.seconds(row):.2f} s"
        return [Part(none, none.astype(bool), title), Part(answer, np.arange(len(answer)) > 0)]

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, A, D) -> total (1,)."""
        return loss_of_positions(output, *_labelled(batch))

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, correct and units, over tokens of the answers."""
        return sums_of_positions(output, *_labelled(batch), None, batch)

    def normalized(self, text: str) -> str:
        """The words of a text, spelled alike."""
        return str(self.processor.normalize(text)).strip()

    def answer(
        self,
        model: Any,
        prompts: Sequence[Recording],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """What is said in each recording; one longer than the model hears at once is cut where it is quiet."""
        return transcripts(model.base, self.processor, prompts, max_new_tokens, batch_size, sampling)


def generation_of(settings: SpeechSettings, processor: SpeechProcessor) -> Mapping[str, Any]:
    """What a merged model's generation settings say: how it was trained to begin its answers."""
    if not processor.padded:
        return {}
    if not processor.multilingual or settings.language is None:
        return {"forced_decoder_ids": None}
    code = processor.language_code(settings.language)
    return {"forced_decoder_ids": None, "language": code, "task": settings.task}


def _labelled(batch: Batch) -> tuple[Tensor, Tensor]:
    """(N,) indices into the flattened positions of the answers, and their labels."""
    labels = batch.targets["labels"]  # (B, A)
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns]


def make(settings: SpeechSettings, processor: SpeechProcessor, facts: Mapping[str, Any]) -> Speech:
    """The objective of `objective: speech`; facts are what an adapter's folder keeps of its settings.

    Raises: RecipeError for a language that the model does not know.
    """
    settings = settings.model_copy(update={key: facts[key] for key in SpeechSettings.model_fields if key in facts})
    if settings.language is None and processor.multilingual:  # what a model says that was merged of one trained so
        own = {key: processor.generation.get(key) for key in ("language", "task")}
        settings = settings.model_copy(update={key: value for key, value in own.items() if value is not None})
    try:
        if settings.language is not None or not processor.multilingual:
            processor.prefix(settings.language, settings.task, settings.timestamps)
    except DataError as error:
        raise RecipeError(error.problems[0].what, error.problems[0].how, key="objective.language") from None
    if settings.apply_spec_augment and not processor.padded:
        what = "masks frequencies and frames, and the model hears samples"
        raise RecipeError(what, "leave it out, or choose Whisper", key="objective.apply_spec_augment")
    return Speech(settings, processor)
