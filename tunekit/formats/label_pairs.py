"""`format: label_pairs`: two texts and the label of the pair, `{"sentence1": ..., "sentence2": ..., "label": ...}`.

The columns may have other usual names, such as premise and hypothesis.
"""

from tunekit.errors import DataError
from tunekit.formats import labels
from tunekit.formats.fields import Fields, read_text
from tunekit.formats.labels import LabelExample, read_label

NAMES = (
    *(("premise", "hypothesis"), ("question1", "question2"), ("text", "text_pair"), ("text1", "text2")),
    *(("text_a", "text_b"), ("sentence_a", "sentence_b"), ("sentence_A", "sentence_B")),
)
TEXTS = ("sentence1", "sentence2")
WEAKER_TEXTS = ("question", "sentence")  # QNLI's names: used only if a row has both, and no other name of a text
ALIASES = {name: field for pair in NAMES for name, field in zip(pair, TEXTS, strict=True)}
ALIASES |= labels.ALIASES | dict.fromkeys(labels.PAIR_LABELS, "label")
DESCRIPTION = (
    "sentence1 and sentence2 (or premise and hypothesis, question1 and question2, text and text_pair, text1 and text2, "
    "text_a and text_b, sentence_a and sentence_b, question and sentence): two texts; label (or labels, category, "
    "intent, gold_label, is_duplicate, score): the label of the pair"
)
FIELDS = (*TEXTS, "label")
REQUIRED = FIELDS
EXAMPLE = "label"


def make_example(row: Fields) -> LabelExample:
    """The two texts and their label. Raises: DataError if a text is missing or empty."""
    first, second = read_pair(row)
    return LabelExample(first, read_label(row, labels.PAIR_LABELS), second)


def names_pair(row: Fields) -> bool:
    """Whether a row has two texts."""
    aliases = aliases_of(row)
    return {aliases.get(name, name) for name in row} >= set(TEXTS)


def aliases_of(row: Fields) -> dict[str, str]:
    """Alternative names of columns that this row may use: name -> field."""
    weaker = dict(zip(WEAKER_TEXTS, TEXTS, strict=True))
    others = any(name in TEXTS or ALIASES.get(name) in TEXTS for name in row)
    return ALIASES if others or not row.keys() >= weaker.keys() else ALIASES | weaker


def read_pair(row: Fields) -> tuple[str, str]:
    """The two texts of a row. Raises: DataError if a text is missing or empty, or if two columns could be that text."""
    first, second = (_read_side(row, name) for name in TEXTS)
    return first, second


def _read_side(row: Fields, field: str) -> str:
    aliases = aliases_of(row)
    named = [field] if field in row else [name for name in row if aliases.get(name) == field]
    if len(named) > 1:
        what = f"the columns '{named[0]}' and '{named[1]}' could both be {field}"
        raise DataError(what, f"map the right column under data.train[].columns, for example {{{named[0]}: {field}}}")
    name = named[0] if named else field
    text = read_text(row, name)
    if not text.strip():
        raise DataError(f"'{name}' is empty, and a pair needs two texts", "write the text, or leave the row out")
    return text
