"""Rows of two texts as one sequence: joined and truncated in the same way as by the tokenizer."""

from collections.abc import Iterable, Sequence

import numpy as np

from tunekit.contracts import Array, Pairing, Row, Tokenizer
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError

NO_TOKEN = "a text of the pair has no token"
KINDS = {False: "one text", True: "a pair of texts"}


class PairIds(list[int]):
    """The ids of two joined texts. `second`: the index at which the second text begins."""

    def __init__(self, ids: Sequence[int] | Array, second: int) -> None:
        super().__init__(int(each) for each in ids)
        self.second = second


def is_pair(row: Row) -> bool:
    """Whether a row has two texts."""
    return len(row.parts.get("second", ())) > 0


def are_pairs(rows: Iterable[Row]) -> bool | None:
    """Whether the rows are pairs of texts; None if there are no rows.
    Raises: DataError if only some rows are pairs, because all rows of a micro-batch must have the same head and token
    types."""
    first: Row | None = None
    for row in rows:
        first = first or row
        if is_pair(row) != is_pair(first):
            file, _, line = row.origin.rpartition(":")
            what, how = other_kind(is_pair(row), f"the first row ({first.origin}) is")
            raise DataError(what, how, file=file, line=int(line))
    return None if first is None else is_pair(first)


def other_kind(pair: bool, others: str) -> tuple[str, str]:
    """What is wrong and how to mend it, for a row that is a pair while `others` are single texts, or the reverse."""
    how = "write both texts in every row, as sentence1 and sentence2, or one text in every row"
    return f"the row is {KINDS[pair]}, but {others} {KINDS[not pair]}", how


def join_texts(tokenizer: Tokenizer, first: str, second: str) -> PairIds:
    """The ids of both texts, joined with the tokenizer's special tokens. Raises: Dropped if a text has no token."""
    texts = [tokenizer.encode(text, special_tokens_in_text=False) for text in (first, second)]
    if not all(texts):
        raise Dropped(NO_TOKEN)
    return _joined(tokenizer.pairing, *texts)


def sized_pair(pairing: Pairing, pair: PairIds, size: int) -> PairIds:
    """The pair with exactly `size` ids. A longer pair is truncated as in transformers' longest_first; in a shorter
    pair, the second text is repeated."""
    first, second = _texts(pairing, pair)
    room = max(size - len(pairing.before) - len(pairing.between) - len(pairing.after), 0)
    sizes = cut_sizes(len(first), len(second), room)
    second = np.resize(second, room - sizes[0]).tolist() if room > sum(sizes) else second[: sizes[1]]
    return PairIds(_joined(pairing, first[: sizes[0]], second)[:size], min(size, pair.second - len(first) + sizes[0]))


def cut_sizes(first: int, second: int, room: int) -> tuple[int, int]:
    """The sizes of two texts after truncation to `room` tokens in total, as in tokenizers' LongestFirst. The longer
    text is cut first, then both texts equally. If `room` is odd, the longer text keeps one more token; if the texts
    have equal sizes, the second text does."""
    if first + second <= room:
        return first, second
    short = min(first, second)
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


def types_of(pairing: Pairing, pair: PairIds) -> Array:
    """The token type of each id, shape (T,); 0 if the tokenizer has no types."""
    if not pairing.types:
        return np.zeros(len(pair), np.int64)
    before, first, between, second, after = pairing.types
    sizes = map(len, _texts(pairing, pair))
    return np.array([*before, *first * next(sizes), *between, *second * next(sizes), *after])


def _joined(pairing: Pairing, first: Sequence[int] | Array, second: Sequence[int] | Array) -> PairIds:
    start = [*pairing.before, *first, *pairing.between]
    return PairIds([*start, *second, *pairing.after], len(start))


def _texts(pairing: Pairing, pair: PairIds) -> tuple[list[int], list[int]]:
    """The ids of both texts."""
    first = pair[len(pairing.before) : pair.second - len(pairing.between)]
    return first, pair[pair.second : len(pair) - len(pairing.after)]
