"""`objective: sft`: next-token cross entropy on the supervised tokens of causal models."""

from dataclasses import replace

from tunekit.contracts import EncodeOptions, Facts, Objective, Tokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.tokens import TokenLoss
from tunekit.objectives.rows.image_text import IMAGE_TOKENS, ImageTextRows, learned, reading_images
from tunekit.objectives.rows.sequences import SequenceRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.sft import SftSettings


def make(settings: SftSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. Rows are token sequences, with images if the base reads images; the loss is cross entropy on
    supervised tokens. `facts`: whether the rows of a trained adapter have images, and their
    limit."""
    reads_images = tokenizer.images is not None and tokenizer.images.obstacle is None
    encoding = tokenizer, row_fingerprint(settings, tokenizer), options
    limit = facts.get(IMAGE_TOKENS, 0)
    rows = ImageTextRows(*encoding, trained_tokens=limit) if reads_images else SequenceRows(*encoding)
    objective = Objective(settings.method, settings.family, rows, TokenLoss(), text_answering(tokenizer))
    if not reads_images:
        return objective
    return reading_images(objective) if facts.get("images") else replace(objective, learning=learned)
