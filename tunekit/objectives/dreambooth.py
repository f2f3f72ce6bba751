"""`objective: dreambooth`: subject-driven generation. A diffusion model learns the subject of a few images."""

from dataclasses import replace
from functools import partial

from tunekit.contracts import Answering, CompanionSpec, EncodeOptions, Facts, Objective
from tunekit.errors import RecipeError
from tunekit.files.cache_folder import hash_of
from tunekit.model.families.pipeline.parts import PIPELINES
from tunekit.model.families.pipeline.processor import PipelineProcessor
from tunekit.objectives.losses.noise import DiffusionLoss, NoiseSchedule, setting_problems
from tunekit.objectives.rows.pictures import Artist, PictureRows, buckets_of, size_problems, smaller_buckets
from tunekit.recipe.model import ModelSection, PipelineModel
from tunekit.recipe.objectives.dreambooth import DreamboothSettings

# settings that are saved with the adapter, because its use needs them
FACTS = ("resolution", "aspect_ratio_buckets", "train_text_encoder", "prediction_type")
CUT = "a micro-batch whose images have several bucket sizes is split, because the network processes one size at a time"


def make(settings: DreamboothSettings, processor: PipelineProcessor, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are images with prompts; the loss is the error of the predicted noise.
    Raises: RecipeError for settings that do not fit the pipeline; ModelError for an unsupported pipeline."""
    settings = _completed(settings, processor, facts)
    if settings.prediction_type != "auto" and not processor.flows:
        processor = replace(processor, predicts=settings.prediction_type)
    if problems := [*size_problems(settings, processor), *setting_problems(settings, processor.flows)]:
        raise RecipeError.of(problems)
    processor.check()
    buckets, smaller = buckets_of(settings, processor), smaller_buckets(settings, processor)
    decides = (settings.method, settings.instance_prompt, buckets, *smaller)  # everything that a row depends on
    fingerprint = hash_of([*decides, processor.fingerprint])
    stated = {name: getattr(settings, name) for name in FACTS}
    if isinstance(settings.aspect_ratio_buckets, tuple):
        stated["aspect_ratio_buckets"] = [*map(list, buckets)]
    artist = Artist(settings, processor)
    return Objective(
        settings.method,
        settings.family,
        PictureRows(processor, settings.instance_prompt, buckets, fingerprint, smaller, options),
        DiffusionLoss(settings, _schedule(processor)),
        Answering("picture", draw=artist.draw, report_pictures=artist.report_pictures, processor=processor),
        companions=(CompanionSpec("pipeline", "objective", settings),),
        section=partial(_section, settings, processor),
        facts=stated,
        notes=() if len(buckets) == 1 else (CUT,),
        measures_training=settings.measures_training,
    )


def _completed(settings: DreamboothSettings, processor: PipelineProcessor, facts: Facts) -> DreamboothSettings:
    """The settings, with values saved with a trained adapter if there are any, and with a default for a missing
    resolution."""
    stated = {name: facts[name] for name in FACTS if name in facts}
    if isinstance(buckets := stated.get("aspect_ratio_buckets"), list):
        stated["aspect_ratio_buckets"] = tuple((high, wide) for high, wide in buckets)
    resolution = stated.get("resolution", settings.resolution) or processor.resolution
    return settings.model_copy(update={**stated, "resolution": resolution})


def _schedule(processor: PipelineProcessor) -> NoiseSchedule:
    if processor.flows:
        return NoiseSchedule.of_sigmas(*processor.sigmas)
    return NoiseSchedule.of_alphas(processor.prediction, processor.alphas_cumprod)


def _section(
    settings: DreamboothSettings, processor: PipelineProcessor, model: ModelSection, seed: int = 0
) -> ModelSection:
    """The base's model section, with the names of the pipeline's trained parts added."""
    encoders = [name for name in processor.tokenizers if name != "text_encoder_3"]
    parts = (PIPELINES[processor.kind], *(encoders if settings.train_text_encoder else ()))
    return PipelineModel.of(model, family=settings.family, trained=parts, stays=not settings.caches)
