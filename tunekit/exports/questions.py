"""The rows on which an export is compared with torch, and torch's log-probabilities for these rows."""

import gc
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tunekit.arithmetic.merge import TEXTS, logits_of
from tunekit.errors import InputError
from tunekit.exports.format import Questions
from tunekit.machine.memory import available_bytes
from tunekit.model.families import make_family
from tunekit.model.load import make_meta_model
from tunekit.model.storage.windows import sliding_window
from tunekit.model.text.tokenizer import LoadedTokenizer
from tunekit.records import JsonObject, bytes_text
from tunekit.targets.exportable import Exportable
from tunekit.targets.rows import readable_rows
from tunekit.targets.target import TargetSpec, load_target

ROWS, TOKENS = 8, 128  # of a certificate
LONGEST_WINDOW, BEYOND = 1100, 8  # a window that is shorter is measured by a row of so many tokens more
SPARE = 1.5  # needed memory, relative to the float32 weights
MOST_VALUES = 2**26  # log-probabilities of all rows of one model, so that large vocabularies take 256 MiB too


class NotComparable(InputError):
    """The error for a model that cannot be compared token by token on this machine, with any program."""


def row_ids(exportable: Exportable, count: int, tokens: int, *, held_out: bool) -> tuple[list[list[int]], str]:
    """Token ids of at most `count` rows of the run, each cut to `tokens`, and a description of the rows.

    `held_out`: prefer evaluation rows to training rows. If the target has no data, or if its data files are missing,
    fixed texts are used instead of rows.
    Raises: NotComparable for a model that reads no text.
    """
    objective, tokenizer = exportable.objective, exportable.processor.tokenizer
    if not isinstance(tokenizer, LoadedTokenizer):
        raise NotComparable(f"{exportable.family} models do not read text", "leave --certify and --imatrix out")
    loaded, reason = readable_rows(exportable.target, objective)
    if loaded is None:
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [[*start, *tokenizer.encode(text)][:tokens] for text in TEXTS[:count]], f"fixed texts{reason}"
    rows, noun = loaded.train, "training"
    if held_out and loaded.evaluation is not None:
        rows, noun = loaded.evaluation, "evaluation"
    chosen = (rows[index] for index in range(min(count, len(rows))))
    ids = [loaded.objective.rows.text_ids(row)[:tokens].tolist() for row in chosen]
    return ids, f"{len(ids)} {noun} rows of the run"


def make_questions(exportable: Exportable, *, with_base: bool = False, past_window: bool = True) -> Questions:
    """The rows, and torch's float32 log-probabilities of the model with its adapter. `with_base`: also
    compute log-probabilities of the base without the adapter; only one model is in memory at a time. `past_window`:
    make one row longer than a short sliding window.

    Raises: NotComparable for a model that does not predict tokens, or that is too large for the memory.
    """
    target, cpu = exportable.target, torch.device("cpu")
    family = make_family(exportable.family)
    if not (family.answers and family.reads_ids):
        raise NotComparable(f"{family.text} is not compared token by token", "leave --certify out")
    values = sum(parameter.numel() for parameter in make_meta_model(target.model, device=cpu).net.parameters())
    size = int(exportable.config.get("vocab_size") or 1)
    length = _longest_row(exportable.config) if past_window else 0
    free, needed = available_bytes(cpu), int(SPARE * 4 * values) + 3 * 4 * length * size
    if free is not None and free < needed:
        what = f"torch needs {bytes_text(needed)} for the model in float32, and {bytes_text(free)} are free"
        raise NotComparable(what, "leave --certify out, or use a machine with more memory")
    rows, described = row_ids(exportable, ROWS, TOKENS, held_out=True)
    rows = [row for row in rows if len(row) > 1][: max(2, MOST_VALUES // (TOKENS * size))]
    if not rows:
        raise NotComparable("no row has two tokens", "leave --certify out")
    if max(map(len, rows)) < length:
        rows = [*rows[:-1], (rows[-1] * length)[:length]]
    base = _log_probabilities(replace(target, adapter=None), rows) if with_base else None
    return Questions(rows, _log_probabilities(target, rows), base, described)


def full_base_text(exportable: Exportable) -> str:
    """How much the results of an adapter differ on the full base, measured on rows of the run, next to the effect of
    the training; or the reason why this was not measured."""
    target = exportable.target
    full = replace(target, model=target.model.model_copy(update={"quantization": "none"}))
    try:
        questions = make_questions(exportable, with_base=True, past_window=False)
    except NotComparable as error:
        return f"not measured: {error.problems[0].what}"
    assert questions.base is not None
    answers = {"base": questions.base, "trained": questions.expected, "full": _log_probabilities(full, questions.rows)}
    perplexity = {name: _perplexity(questions.rows, values) for name, values in answers.items()}
    pairs = zip(answers["trained"], answers["full"], strict=True)
    different = sum(int((one.argmax(-1) != other.argmax(-1)).sum()) for one, other in pairs)
    share = different / sum(map(len, questions.rows))
    return (
        f"perplexity {perplexity['full']:.4g} instead of {perplexity['trained']:.4g} (without the adapter: "
        f"{perplexity['base']:.4g}), and another most likely token at {share:.1%} of the positions, on "
        f"{questions.described}"
    )


def _perplexity(rows: Sequence[Sequence[int]], answers: Sequence[Tensor]) -> float:
    """The perplexity of the rows for log-probabilities (T, V) of the next token at each position."""
    pairs = zip(rows, answers, strict=True)
    return math.exp(-float(torch.cat([values[range(len(row) - 1), row[1:]] for row, values in pairs]).mean()))


def _longest_row(config: JsonObject) -> int:
    """The length of a row that shows whether a program applies the model's sliding window; 0 without a short window."""
    window = sliding_window(config.get("text_config") or config)
    return 0 if window is None or window >= LONGEST_WINDOW else window + BEYOND


def _log_probabilities(target: TargetSpec, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """For each row, (T, V) float32 log-probabilities of the next token after each of its T tokens."""
    section = target.model.model_copy(update={"dtype": "float32"})
    model = load_target(replace(target, model=section), torch.device("cpu")).model.base
    inputs = [model.family.inputs_of(torch.tensor(row)[None]) for row in rows]
    answers = [logits.log_softmax(-1) for logits in logits_of(model, inputs)]
    del model
    gc.collect()
    return answers
