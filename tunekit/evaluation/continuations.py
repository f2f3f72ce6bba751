"""Log-probabilities of texts after their contexts. If several texts follow the same context, the context is computed
only once."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from tunekit.contracts import Objective, Progress, no_progress
from tunekit.evaluation.choices import CHUNK_QUESTIONS, answer_sums
from tunekit.machine.devices import Devices
from tunekit.objectives.rows.choices import Answer, Question
from tunekit.tuned.model import TunedModel

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, which is not empty, and ids of its continuation


def continuation_scores(
    model: TunedModel,
    objective: Objective,
    pairs: Sequence[Pair],
    devices: Devices,
    *,
    batch_size: int,
    progress: Progress = no_progress,
) -> list[tuple[float, bool]]:
    """For each pair of context and continuation: the continuation's log-probability, and whether greedy decoding
    generates exactly this continuation.

    A context and all its continuations form one sequence, in which the continuations do not see each other. A forward
    has at most as many positions as `batch_size` copies of the longest pair.
    """
    contexts = defaultdict[tuple[int, ...], list[int]](list)
    for number, (context, end) in enumerate(pairs):
        if end:
            contexts[tuple(context)].append(number)
    by_count = defaultdict[int, list[tuple[tuple[int, ...], list[int]]]](list)
    for context, numbers in contexts.items():
        by_count[len(numbers)].append((context, numbers))
    results = {number: (0.0, True) for number, (_, end) in enumerate(pairs) if not end}
    most = batch_size * max((len(context) + len(end) for context, end in pairs), default=0)
    for group in by_count.values():
        group.sort(key=lambda each: -len(each[0]))
        for start in range(0, len(group), CHUNK_QUESTIONS):
            some = group[start : start + CHUNK_QUESTIONS]
            questions = [_question(context, [pairs[number][1] for number in numbers]) for context, numbers in some]
            progress("continuations scored", len(results), len(pairs))
            sums = answer_sums(model, objective, questions, devices, most=most)
            for (_, numbers), scores, hits in zip(some, sums["scores"], sums["hits"], strict=True):
                lengths = [len(pairs[number][1]) for number in numbers]
                results |= {
                    number: (score, hit == length)
                    for number, score, hit, length in zip(numbers, scores, hits, lengths, strict=True)
                }
    return [results[number] for number in range(len(pairs))]


def _question(context: Sequence[int], continuations: Sequence[Sequence[int]]) -> Question:
    answers = tuple(Answer(tuple(ids), (True,) * len(ids)) for ids in continuations)
    return Question(np.array(context, dtype=np.int64), answers, "a context")
