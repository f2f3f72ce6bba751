"""Compares another program's log-probabilities with torch's."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunekit.errors import NumericsError
from tunekit.exports.format import Difference, Exported, Questions
from tunekit.exports.programs.answer import IdRows, NextTokens

SHOWN = 5  # tokens in a warning
DIFFERENT_EXPORT = "do not use the exported file; choose a different --type or --to"


def difference(rows: Sequence[Sequence[int]], expected: Sequence[Tensor], answers: Sequence[NextTokens]) -> Difference:
    """Compare a program's log-probabilities p with torch's log-probabilities q, over all tokens of all rows.

    largest = max |p - q|, mean = mean |p - q|, over all log-probabilities that the program gives.
    perplexity = exp(-mean p(x[t + 1])), torch_perplexity = exp(-mean q(x[t + 1])), over all t except the
    last of each row.
    greedy_differences counts the t with argmax p != argmax q.
    Shapes: expected[i] (T, V) float32.    Units: p, q and their differences in nats.
    Raises: NumericsError if the program's vocabulary has a different size, or if values are not finite.
    """
    distances, following, torch_following, changed = [], [], [], 0
    for row, wanted, answer in zip(rows, expected, answers, strict=True):
        values = torch.from_numpy(answer.values).float()  # (T, K) or (T, V)
        if answer.tokens is None:
            _check_shape(values, wanted)
            compared, greedy = wanted, values.argmax(-1)
        else:
            tokens = torch.from_numpy(answer.tokens)  # (T, K)
            compared, greedy = wanted.gather(-1, tokens), tokens[:, 0]
        distances.append((values - compared).abs().double())
        following.append(torch.from_numpy(answer.following).double())  # (T - 1,)
        torch_following.append(wanted[torch.arange(len(row) - 1), torch.tensor(row[1:])].double())
        changed += int((greedy != wanted.argmax(-1)).sum())
    count = sum(distance.numel() for distance in distances)
    largest = float(torch.stack([distance.max() for distance in distances]).max())  # NaN if one of them is NaN
    if not (math.isfinite(largest) and all(bool(each.isfinite().all()) for each in following)):
        raise NumericsError("the program computes log-probabilities that are not finite", DIFFERENT_EXPORT)
    return Difference(
        largest=largest,
        mean=sum(float(distance.sum()) for distance in distances) / count,
        perplexity=_perplexity(following),
        torch_perplexity=_perplexity(torch_following),
        greedy_differences=changed,
        tokens=sum(map(len, rows)),
    )


def compare_parts(
    written: Exported,
    base: Path,
    compared: Questions,
    answers: Callable[[Path, IdRows, Path | None], list[NextTokens]],
    name: str = "merged",
) -> dict[str, Difference]:
    """The differences between the program and torch. A whole model gives one entry, `name`. An adapter gives
    two entries: the base, and base + adapter.

    `answers`: returns the program's answers for a model, rows, and an adapter or None.
    """
    rows = compared.rows
    if written.what != "adapter":
        return {name: difference(rows, compared.expected, answers(written.path, rows, None))}
    assert compared.base is not None
    return {
        "base": difference(rows, compared.base, answers(base, rows, None)),
        "base + adapter": difference(rows, compared.expected, answers(base, rows, written.path)),
    }


def difference_of_tokens(texts: Sequence[str], expected: IdRows, computed: IdRows) -> str:
    """A description of the texts for which the tokenizer and a program give different ids; empty if there are none."""
    wrong = [each for each in zip(texts, expected, computed, strict=True) if list(each[1]) != list(each[2])]
    if not wrong:
        return ""
    text, wanted, ids = wrong[0]
    at = next(
        (at for at, pair in enumerate(zip(wanted, ids, strict=False)) if pair[0] != pair[1]),
        min(map(len, wrong[0][1:])),
    )
    shown = f"{list(ids[at : at + SHOWN])} and not {list(wanted[at : at + SHOWN])} from token {at} on"
    return f"the program reads {len(wrong)} of {len(texts)} texts as other tokens; {text[:40]!r} becomes {shown}"


def _perplexity(log_probabilities: Sequence[Tensor]) -> float:
    return math.exp(-float(torch.cat(list(log_probabilities)).mean()))


def _check_shape(values: Tensor, wanted: Tensor) -> None:
    if values.shape != wanted.shape:
        what = f"the program's vocabulary has {values.shape[-1]} tokens, and torch's has {wanted.shape[-1]}"
        raise NumericsError(what, DIFFERENT_EXPORT)
