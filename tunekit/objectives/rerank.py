"""`objective: rerank`: rerankers (cross-encoders). Rows are queries with documents; the loss reads a score of each."""

from functools import partial

from tunekit.contracts import Answering, EncodeOptions, Facts, Labels, Objective
from tunekit.files.cache_folder import hash_of
from tunekit.model.storage.sentence_transformers import RerankerProcessor
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.rerank import RerankLoss
from tunekit.objectives.rows.candidates import CandidateRows
from tunekit.objectives.rows.labels import headed_section
from tunekit.recipe.objectives.rerank import RerankSettings

LABEL = "LABEL_0"  # transformers' name for the one score of a head


def make(settings: RerankSettings, tokenizer: LoadedTokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. `facts`: values saved with a trained adapter, or facts of the base. They contain the labels
    of the head, if there is one."""
    head = facts.get("labels") or facts.get("head", ())
    labels = tuple(head) if len(head) == 1 else (LABEL,)
    fingerprint = hash_of([row_fingerprint(settings, tokenizer), repr(tokenizer.pairing)])
    saved = {"loss": settings.loss, "labels": list(labels)}
    return Objective(
        settings.method,
        settings.family,
        CandidateRows(settings, tokenizer, fingerprint, options),
        RerankLoss(settings),
        Answering("relevance", processor=RerankerProcessor(tokenizer, saved)),
        section=partial(headed_section, settings.family, Labels(labels, tuple(head), tokenizer.pad_id), None),
        facts=saved,
    )
