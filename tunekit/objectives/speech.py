"""`objective: speech`: speech recognition (Whisper, Moonshine), cross entropy on the transcripts of recordings."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tunekit.contracts import Answering, EncodeOptions, Facts, Objective
from tunekit.errors import DataError, RecipeError
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.tokens import TokenLoss, own_positions
from tunekit.objectives.rows.transcribing import write_transcripts
from tunekit.objectives.rows.transcripts import TranscriptRows
from tunekit.recipe.objectives.speech import SpeechSettings


def make(settings: SpeechSettings, processor: SpeechProcessor, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are recordings with transcripts; the loss is cross entropy. `facts`: saved settings of a
    trained adapter.

    Raises: RecipeError for a language that the model does not know.
    """
    settings = _checked(settings, processor, facts)
    fingerprint = row_fingerprint(settings, processor)
    return Objective(
        settings.method,
        settings.family,
        TranscriptRows(settings, processor, fingerprint, options, draws=settings.apply_spec_augment),
        TokenLoss(own_positions),
        Answering(
            "text",
            write=partial(write_transcripts, processor),
            generation=_generation(settings, processor),
            normalize=partial(_normalized, processor),
        ),
        facts=settings.model_dump(include={"language", "task", "timestamps"}),
    )


def _checked(settings: SpeechSettings, processor: SpeechProcessor, facts: Facts) -> SpeechSettings:
    settings = settings.model_copy(update={key: facts[key] for key in SpeechSettings.model_fields if key in facts})
    if settings.language is None and processor.multilingual:  # a merged model states its language and task
        own = {key: processor.generation.get(key) for key in ("language", "task")}
        settings = settings.model_copy(update={key: value for key, value in own.items() if value is not None})
    try:
        if settings.language is not None or not processor.multilingual:
            processor.prefix(settings.language, settings.task, settings.timestamps)
    except DataError as error:
        raise RecipeError(error.problems[0].what, error.problems[0].how, key="objective.language") from None
    if settings.apply_spec_augment and not processor.padded:
        what = "masks frequencies and frames, but this model's input is samples"
        raise RecipeError(what, "remove the key, or choose a Whisper model", key="objective.apply_spec_augment")
    return settings


def _generation(settings: SpeechSettings, processor: SpeechProcessor) -> Mapping[str, Any]:
    """Generation settings to save in a merged model, so that its answers start with the trained language and task."""
    if not processor.padded:
        return {}
    if not processor.multilingual or settings.language is None:
        return {"forced_decoder_ids": None}
    code = processor.language_code(settings.language)
    return {"forced_decoder_ids": None, "language": code, "task": settings.task}


def _normalized(processor: SpeechProcessor, text: str) -> str:
    """The text after the model's own normaliser, which makes spellings uniform."""
    return str(processor.normalize(text)).strip()
