"""The recordings on which an exported speech model is compared with torch, and torch's log-probabilities for them."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tunekit.arithmetic.merge import logits_of
from tunekit.contracts import Array, Tensors
from tunekit.exports.format import Questions
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.targets.exportable import Exportable
from tunekit.targets.rows import readable_rows
from tunekit.targets.target import load_target

ROWS, TOKENS, TEXT = 4, 128, "The capital of France is Paris."


@dataclass(frozen=True)
class Recordings:
    """Recordings as log-mel features (bands, frames), and the rows of their transcripts in `questions`. `prompts`:
    the ids before each row. The rows begin with the token for "no timestamps", since programs suppress tokens before
    it."""

    features: Sequence[Array]
    prompts: Sequence[Sequence[int]]
    questions: Questions


def make_recordings(exportable: Exportable) -> Recordings:
    """Recordings of the run (without data: one recording of noise), and torch's float32 log-probabilities for them."""
    processor = exportable.processor
    assert isinstance(processor, SpeechProcessor)  # a problem of the format otherwise
    section = exportable.target.model.model_copy(update={"dtype": "float32"})
    loaded = load_target(replace(exportable.target, model=section), torch.device("cpu"))
    model = loaded.model.base
    inputs, described = _inputs(exportable)
    if not inputs:
        prefix = processor.prefix("en" if processor.multilingual else None, "transcribe", timestamps=False)
        answer = torch.tensor([[*prefix, *processor.text_ids(TEXT)]])
        inputs = [{**model.family.trial_inputs(model.net), "decoder_input_ids": answer}]
        described = f"one recording of noise{described}"
    ids = [without_timestamps(processor, each["decoder_input_ids"][0].tolist())[:TOKENS] for each in inputs]
    for values, row in zip(inputs, ids, strict=True):
        values["decoder_input_ids"] = torch.tensor([row])
    starts = [row.index(processor.no_timestamps) for row in ids]
    logits = [each[start:] for each, start in zip(logits_of(model, inputs), starts, strict=True)]
    del loaded, model
    gc.collect()
    rows = [row[start:] for row, start in zip(ids, starts, strict=True)]
    questions = Questions(rows, [each.log_softmax(-1) for each in logits], None, described)
    features = [each["input_features"][0].float().numpy() for each in inputs]
    return Recordings(features, [row[:start] for row, start in zip(ids, starts, strict=True)], questions)


def without_timestamps(processor: SpeechProcessor, row: list[int]) -> list[int]:
    """Remove timestamps from the ids of a transcript, and add the token for "no timestamps" after the prefix."""
    if processor.no_timestamps in row:
        return row
    count = 3 if processor.multilingual else 1  # start, language and task
    return [*row[:count], processor.no_timestamps, *(each for each in row[count:] if each < processor.no_timestamps)]


def _inputs(exportable: Exportable) -> tuple[list[Tensors], str]:
    """(inputs, description): the model's inputs for evaluation rows of the run, or for training rows if there are no
    evaluation rows. If the rows cannot be read: ([], reason)."""
    loaded, reason = readable_rows(exportable.target, exportable.objective)
    if loaded is None:
        return [], reason
    rows, noun = (loaded.train, "training") if loaded.evaluation is None else (loaded.evaluation, "evaluation")
    chosen = [rows[index] for index in range(min(ROWS, len(rows)))]
    inputs = [dict(loaded.objective.rows.collate([[row]]).inputs) for row in chosen]
    return inputs, f"{len(chosen)} {noun} recordings of the run"
