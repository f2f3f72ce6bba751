"""Speech to text: cross entropy on the transcript of a sound, given what the encoder heard.

Comes in: sounds with their texts, then a Batch and the decoder's last hidden states.  Goes out: rows of log-mel
features and an answer, then Loss (sum over the answers' tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    IGNORED,
    Batch,
    Gather,
    Loss,
    ModelOutput,
    Objective,
    Part,
    Row,
    RowLayout,
    Rows,
    Sampling,
    Sums,
    Window,
)
from tunekit.data.batching.pad import lay_end_to_end
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.errors import DataError, Problem, RecipeError
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.objectives.logprobs import loss_of_positions, sums_of_positions
from tunekit.objectives.recordings import PARTS, Recording, SpeechEncoder, features_of, make_row, transcripts
from tunekit.objectives.rows import RowObjective
from tunekit.objectives.spec_augment import drawn_masks, masked
from tunekit.recipe.objectives.speech import SpeechSettings

Array = NDArray[Any]
MASKS = "masks"  # of SpecAugment, which a step's rows have beside their own parts


class Speech(RowObjective):
    """loss = sum over the answers' tokens of -log p(token | sound, tokens before it); divided by the step's number of
    them. Those that name language and task are predicted too, as transformers' own labels are."""

    metrics: Sequence[str] = ("loss", "perplexity")

    def __init__(self, settings: SpeechSettings, processor: SpeechProcessor) -> None:
        super().__init__(settings, processor)
        self.settings, self.processor = settings, processor
        self.augments = settings.apply_spec_augment
        self.facts = settings.model_dump(include={"language", "task", "timestamps"})
        self.generation = generation_of(settings, processor)
        self.layout = RowLayout(
            PARTS,
            token_parts=("answer",),
            sizes=2,
            token_sizes=(1,),
            least=(processor.frames, 0),
            told_by=("features", "place"),
        )

    def row_encoder(self, options: EncodeOptions) -> SpeechEncoder:
        """Raises: RecipeError for options that mean nothing of sounds."""
        problems = []
        if options.train_on != "assistant":
            problems.append(Problem("of a sound its text is trained on", "write assistant", key="data.train_on"))
        if options.excess_length == "truncate":
            what = "a cut sound would be taught the text of the whole"
            problems.append(Problem(what, "write drop, split or error", key="data.excess_length"))
        if problems:
            raise RecipeError.of(problems)
        return SpeechEncoder(self.settings, self.processor, options)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The whole sound, and of its answer the tokens start .. stop-1."""
        parts = {**row.parts, "answer": row.parts["answer"][start : stop + 1]}
        return make_row(parts, row.sizes[0], row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row: the longest sound that the model hears, and an answer of so many tokens, or of as many as it can
        have."""
        row, longest = next(rows), self.processor.longest_answer
        parts = {**row.parts, "answer": np.resize(row.parts["answer"], min(size, longest) + 1)}
        return [make_row(parts, self.processor.frames, row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Sounds, filled up with silence as the model's extractor does, and answers, which need no mask: padding comes
        last.

        Shapes: input_features (B, M, F); decoder_input_ids, labels (B, A): position a predicts labels[a].
        """
        rows = [row for (row,) in sequences]
        answers = [row.parts["answer"] for row in rows]
        sounds = [masked(features_of(row, self.processor), row.parts.get(MASKS)) for row in rows]
        inputs = {
            "input_features": torch.from_numpy(np.stack(sounds)),
            "decoder_input_ids": lay_end_to_end([[answer[:-1]] for answer in answers], self.processor.tokenizer.pad_id),
        }
        labels = lay_end_to_end([[answer[1:]] for answer in answers], IGNORED)
        size = self.processor.frames + labels.shape[1]
        return Batch(inputs, {"labels": labels}, tuple(map(tuple, sequences)), line_size=size)

    def spans(self, row: Row) -> list[Part]:
        """How long the sound is, and the answer."""
        answer, none = row.parts["answer"], np.zeros(0, np.int32)
        title = f"sound: {row.sizes[0] * self.processor.seconds / self.processor.frames:.2f} s"
        return [Part(none, none.astype(bool), title), Part(answer, np.arange(len(answer)) > 0)]

    def prepare(self, model: object, window: Window, gather: Gather = list) -> Window:
        """Each row with the masks that SpecAugment draws for it in this step."""
        if not self.augments:
            return window
        return replace(window, batches=tuple(self._augmented(batch, window) for batch in window.batches))

    def _augmented(self, batch: Batch, window: Window) -> Batch:
        rows = [
            replace(row, parts={**row.parts, MASKS: drawn_masks(self.settings, row, self.processor.bands, window)})
            for row in batch.rows
        ]
        return self.collate([[row] for row in rows])

    def held_out(self) -> Objective:
        """Rows as they are."""
        found = copy(self)
        found.augments = False
        return found

    def measuring(self, model: object, rows: Rows, batches: Iterable[Batch], gather: Gather) -> Objective:
        """Rows as they are."""
        return self.held_out()

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
        """What is said in each sound; one longer than the model hears at once is cut where it is quiet."""
        return transcripts(model.base, self.processor, prompts, max_new_tokens, batch_size, sampling)


def generation_of(settings: SpeechSettings, processor: SpeechProcessor) -> Mapping[str, Any]:
    """What a merged model's generation settings say: how it was trained to begin its answers."""
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
        if settings.language is not None:
            processor.prefix(settings.language, settings.task, settings.timestamps)
    except DataError as error:
        raise RecipeError(error.problems[0].what, error.problems[0].how, key="objective.language") from None
    return Speech(settings, processor)
