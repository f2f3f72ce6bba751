"""`objective: embed`: embedding models. The loss compares all texts of an optimizer step."""

from pathlib import Path

from tunekit.contracts import Answering, CompanionSpec, EncodeOptions, Facts, Objective
from tunekit.files.cache_folder import hash_of
from tunekit.model.storage.dense_layers import DenseLayer
from tunekit.model.storage.sentence_transformers import EmbeddingProcessor
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.embeddings import EmbedLoss
from tunekit.objectives.rows.texts import TextGroups
from tunekit.recipe.model import HeadlessModel, ModelSection
from tunekit.recipe.objectives.embed import EmbedSettings


def make(settings: EmbedSettings, tokenizer: LoadedTokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. `facts`: the pooling, prompts and maximum length of a base's folder, or those of a trained
    adapter."""
    pooling = facts.get("pooling", ["mean"]) if settings.pooling == "auto" else [settings.pooling]
    normalize = facts.get("normalize", True) if settings.normalize == "auto" else bool(settings.normalize)
    prompts, lengths = facts.get("prompts", {}), facts.get("max_lengths", {})
    sides = {}
    for name in ("query", "document"):
        prompt, length = getattr(settings.prompts, name), getattr(settings.max_lengths, name)
        length = length or lengths.get(name) or facts.get("max_length")
        sides[name] = (prompts.get(name, "") if prompt is None else prompt, length)
    fingerprint = hash_of([row_fingerprint(settings, tokenizer), repr(sides)])
    rows = TextGroups(settings, tokenizer, fingerprint, options, sides["query"], sides["document"])
    saved = {
        "loss": settings.loss,
        "pooling": list(pooling),
        "normalize": normalize,
        "prompts": {name: prompt for name, (prompt, _) in sides.items() if prompt},
        "max_lengths": {name: length for name, (_, length) in sides.items() if length},
    }
    dense = tuple(DenseLayer(Path(path)) for path in facts.get("modules", ()))
    if dense:
        saved["dense"] = [list(layer.facts) for layer in dense]
    modules = {"modules": [str(layer.folder) for layer in dense]}
    return Objective(
        settings.method,
        settings.family,
        rows,
        EmbedLoss(settings, tuple(pooling), normalize, dense),
        Answering("embedding", processor=EmbeddingProcessor(tokenizer, saved | modules)),
        () if settings.guide is None else (CompanionSpec("guide", "objective.guide", settings),),
        section=_section,
        facts=saved,
        notes=_notes(settings, saved),
    )


def _section(model: ModelSection, seed: int) -> ModelSection:
    return HeadlessModel.of(model, family=EmbedSettings.family)


def _notes(settings: EmbedSettings, facts: Facts) -> tuple[str, ...]:
    length = "an embedding has length 1" if facts["normalize"] else "embeddings keep their length"
    notes = [f"pooling: {' and '.join(facts['pooling'])}; {length}"]
    notes += [
        f"dense layer of the base: {size} -> {width} ({activation}); it is kept, and not trained"
        for size, width, activation in facts.get("dense", ())
    ]
    notes += [f"prompt of each {name}: {text!r}" for name, text in facts["prompts"].items()]
    if settings.ranks:
        notes.append(
            "each row is compared with all rows of its step (micro_batch_size x gradient_accumulation_steps); "
            "micro_batch_size alone changes only memory and speed, and ranks add no rows"
        )
    return tuple(notes)
