"""`objective: distill`: the student model learns to imitate the next-token distributions of a teacher model."""

from tunekit.contracts import CompanionSpec, EncodeOptions, Facts, Objective, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.objectives.losses.divergence import DivergenceLoss
from tunekit.objectives.rows.sequences import SequenceRows
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.objectives.distill import DistillSettings


def make(settings: DistillSettings, tokenizer: Tokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective: rows are token sequences, the loss is a divergence, and the teacher is a companion model. The
    rows do not depend on the teacher."""
    rows = SequenceRows(tokenizer, hash_of([settings.method, tokenizer.fingerprint]), options)
    teacher = CompanionSpec("teacher", "objective.teacher", settings)
    loss, answering = DivergenceLoss(settings), text_answering(tokenizer)
    return Objective(settings.method, settings.family, rows, loss, answering, (teacher,))
