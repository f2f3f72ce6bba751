"""`objective: rerank`: rerankers (cross-encoders). Rows are queries with documents; the loss reads a score of each.

An encoder reads both texts as a pair. A causal language model reads a question, and its score starts as the logit of
yes minus the logit of no: its head is the difference of two rows of the output projection.
"""

from functools import partial

from tunekit.contracts import Answering, EncodeOptions, Facts, Labels, Objective, Tokenizer
from tunekit.files.cache_folder import hash_of
from tunekit.model.storage.sentence_transformers import RerankerProcessor
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.objectives.base import row_fingerprint
from tunekit.objectives.losses.rerank import RerankLoss
from tunekit.objectives.rows.candidates import CandidateRows
from tunekit.objectives.rows.labels import headed_section
from tunekit.objectives.rows.text import put_around
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.rerank import RerankSettings

LABEL = "LABEL_0"  # transformers' name for the one score of a head
QUESTION = (
    "Does the document answer the query? Answer only yes or no.\n\nQuery: {query}\n\nDocument: {document}"  # of a user
)
PLAIN = "Query: {query}\nDocument: {document}\nDoes the document answer the query, yes or no? Answer:"


def make(settings: RerankSettings, tokenizer: LoadedTokenizer, facts: Facts, options: EncodeOptions) -> Objective:
    """Make the objective. `facts`: values saved with a trained adapter, or facts of the base. They contain the labels
    of the head, if there is one, and the template."""
    head = facts.get("labels") or facts.get("head", ())
    labels = tuple(head) if len(head) == 1 else (LABEL,)
    template = settings.template or facts.get("template") or (_question(tokenizer) if facts.get("answers") else None)
    if template:
        before = "".join(map(tokenizer.token_text, put_around(tokenizer)[0]))
        template = template if template.startswith(before) else before + template
    answers = answer_ids(tokenizer, template) if template and facts.get("answers") else ()
    fingerprint = hash_of([row_fingerprint(settings, tokenizer), repr(tokenizer.pairing), repr(template)])
    saved = {"loss": settings.loss, "labels": list(labels)} | ({"template": template} if template else {})
    of_head = Labels(labels, tuple(head), tokenizer.pad_id)
    return Objective(
        settings.method,
        settings.family,
        CandidateRows(settings, tokenizer, fingerprint, options, template),
        RerankLoss(settings),
        Answering("relevance", processor=RerankerProcessor(tokenizer, saved)),
        section=partial(_section, of_head, answers),
        facts=saved,
        notes=(f"the base reads {template!r}",) if template else (),
    )


def answer_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """The first different ids of the answers yes and no after the template."""
    blank = "" if template[-1:].isspace() else " "
    both = zip(*(tokenizer.encode(f"{blank}{answer}") for answer in ("yes", "no")), strict=False)
    return next((pair for pair in both if pair[0] != pair[1]), ())


def _question(tokenizer: Tokenizer) -> str:
    """The question as the tokenizer's chat template renders it."""
    if tokenizer.chat_template is None:
        return PLAIN
    return tokenizer.render([{"role": "user", "content": QUESTION}], add_generation_prompt=True)


def _section(labels: Labels, answers: tuple[int, ...], model: ModelSection, seed: int) -> ModelSection:
    headed = headed_section(RerankSettings.family, labels, None, model, seed)
    return headed.model_copy(update={"head_rows": answers})
