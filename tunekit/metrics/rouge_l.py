"""ROUGE-L: F1 of the longest common subsequence of words in the answer and the reference."""

import unicodedata

from tunekit.metrics.pairs import MeanOfPairs

DESCRIPTION = "mean F1 of the longest common subsequence of words in answer and reference"
HIGHER_IS_BETTER = True


def _f1(prediction: str, reference: str) -> float:
    """F1 = 2 LCS / (words of answer + words of reference), where LCS is the length of the longest common subsequence; 1
    if neither text has words.

    Words are runs of letters, marks and digits, case-folded and not stemmed. For ASCII text, the words are the same as
    in rouge_score.
    Source: Lin 2004, with beta = 1.
    """
    words, others = _words(prediction), _words(reference)
    total = len(words) + len(others)
    return 2 * _common_subsequence(words, others) / total if total else 1.0


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming row by row: O(len x len) time, O(len) memory."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, 1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def _words(text: str) -> list[str]:
    """The words of a text: runs of letters, marks and numbers."""
    kinds = (character if unicodedata.category(character)[0] in "LMN" else " " for character in text.casefold())
    return "".join(kinds).split()


score = MeanOfPairs(_f1)
