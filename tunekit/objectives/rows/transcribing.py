"""Generates transcripts and translations of recordings with a speech model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunekit.contracts import AnswerLimits, Model
from tunekit.data.encoding.sounds import pieces
from tunekit.data.reading.sound import opened
from tunekit.errors import DataError, InputError
from tunekit.formats.media import Media
from tunekit.model.loaded_model import as_loaded
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.model.speech.transcribe import transcribe, without_padding
from tunekit.objectives.rows.recordings import Clip


@dataclass(frozen=True)
class Recording:
    """A recording to transcribe or translate. `timestamps`: whether the generated text includes times."""

    media: Media
    language: str | None
    task: str
    timestamps: bool = False


def write_transcripts(
    processor: SpeechProcessor, model: Model, prompts: Sequence[Recording], limits: AnswerLimits
) -> list[str]:
    """The text of each recording, in order. A recording that is longer than the model's input is cut at quiet places,
    and the texts of its parts are joined. Raises: DataError that names the file."""
    clips = [(number, clip) for number, prompt in enumerate(prompts) for clip in _clips(prompt, processor)]
    kinds: dict[tuple[str | None, str, bool], list[int]] = {}
    for place, (number, _) in enumerate(clips):
        prompt = prompts[number]
        kinds.setdefault((prompt.language, prompt.task, prompt.timestamps), []).append(place)
    texts = [""] * len(clips)
    for (language, task, timestamps), places in kinds.items():
        keywords = _keywords(processor, language, task)
        named = language or ("en" if processor.multilingual else None)
        room = processor.longest_answer - len(processor.prefix(named, task, timestamps)) - 1
        together = limits.batch_size if processor.padded else 1
        for start in range(0, len(places), together):
            some = places[start : start + together]
            features = [processor.padded_features(clips[place][1].features(processor).reshape(-1)) for place in some]
            answers = transcribe(
                as_loaded(model.base),
                torch.stack([torch.from_numpy(each) for each in features]),
                keywords,
                timestamps=timestamps,
                max_tokens=min(limits.max_new_tokens, room),
                place=start,
                sampling=limits.sampling,
            )
            for place, ids in zip(some, answers, strict=True):
                texts[place] = processor.text(without_padding(ids, processor.tokenizer.eos_id))
    joined: list[list[str]] = [[] for _ in prompts]
    for (number, _), text in zip(clips, texts, strict=True):
        joined[number].append(text)
    return [" ".join(filter(None, each)) for each in joined]


def _keywords(processor: SpeechProcessor, language: str | None, task: str) -> dict[str, str]:
    """Language and task as keyword arguments for transformers' generate; empty for an English-only model.

    Raises: InputError for a language or task that the model does not know.
    """
    try:
        if processor.multilingual:
            return {"task": task, **({} if language is None else {"language": processor.language_code(language)})}
        processor.prefix(language, task, timestamps=False)
    except DataError as error:
        raise InputError(error.problems[0].what, error.problems[0].how) from None
    return {}


def _clips(prompt: Recording, processor: SpeechProcessor) -> list[Clip]:
    with opened(prompt.media) as sound:
        return [Clip(prompt.media, *piece) for piece in pieces(sound, processor.seconds)]
