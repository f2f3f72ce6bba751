"""What objectives over pairs share: rows of two answers to one prompt, both in one forward, and their scores.

Comes in: PreferenceExamples, then a Batch and the model's output.  Goes out: rows; each answer's log-probability.
Where a sequence of a batch holds several rows, or the model keeps documents apart, both answers of each row lie end to
end, each with the prompt before it as a document of its own. Elsewhere each is a padded line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunekit.contracts import Batch, Gather, Loss, ModelOutput, Part, Row, RowLayout, Sums, Tokenizer, Window
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, Problem, RecipeError
from tunekit.formats.preference import PreferenceExample
from tunekit.model.placing import placed
from tunekit.objectives.logprobs import log_probabilities
from tunekit.objectives.rows import TextEncoder, TextObjective
from tunekit.recipe.pair_settings import REWARDS, PairSettings

SIDES = ("chosen", "rejected")
NO_PROMPT = "no prompt"
ONE_SIDED = "an empty answer"
EQUAL = "chosen and rejected are the same"
PREPARED = ("reference", "share", "matched")  # parts of a row that its step gives it


class PairEncoder(TextEncoder):
    """A row is two sequences of ids, each with a mark on the answer's."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions, unusable: str) -> None:
        super().__init__(tokenizer, options)
        self.unusable = unusable

    def encode(self, example: PreferenceExample, origin: str) -> Row:
        """The row. Raises: Dropped or DataError for a pair that tells nothing, as the recipe asks."""
        reasons = {NO_PROMPT: not example.prompt, ONE_SIDED: not (example.chosen and example.rejected)}
        reasons[EQUAL] = example.chosen == example.rejected
        for reason in (name for name, found in reasons.items() if found):
            if self.unusable == "drop":
                raise Dropped(reason)
            raise DataError(
                f"the pair has {reason}" if reason != EQUAL else reason,
                "mend it, or write objective.unusable_pairs: drop",
            )
        found = [self.renderer.sequence(example.answered(getattr(example, side))) for side in SIDES]
        return make_row([(np.asarray(ids, np.int32), trained.astype(np.bool_)) for ids, trained in found], origin)

    def prompt(self, example: PreferenceExample) -> tuple[list[int], str] | None:
        """Ids of the prompt, and the preferred answer's text."""
        return self.renderer.prompt(example.answered(example.chosen))


def make_row(sides: Sequence[tuple[Any, Any]], origin: str, number: int = 0) -> Row:
    """A row of two sequences, (T,) ids and marks each; the loss counts one pair, of which neither answer is empty."""
    parts: dict[str, Any] = {}
    for side, (ids, trained) in zip(SIDES, sides, strict=True):
        parts |= {side: ids, f"{side}_trained": trained}
    usable = all(trained[1:].any() for _, trained in sides)
    return Row(parts, tuple(len(ids) for ids, _ in sides), int(usable), origin, number)


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answers of P pairs, summed over their tokens (or their means), and the reference's, 0
    where there is none; `tokens`: how many each answer has. `likelihood`: what is added for the chosen answers' own
    sake. `matched`: of the reference's preferences, the one that each pair is compared with (aot). All (P,).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    likelihood: Tensor
    matched: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """(P,) log of policy over reference."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """(P,) log of policy over reference."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """(P,) by how much more than the reference the policy prefers the chosen answer."""
        return self.chosen_ratio - self.rejected_ratio


class PairObjective(TextObjective):
    """loss = sum over pairs of what a subclass makes of their Scores; divided by the step's number of pairs.

    Every score is of one pair, and what depends on others (a mean over the step's tokens) is prepared for the window of
    all ranks: micro-batches and splits change nothing.
    """

    packable = True
    metrics: Sequence[str] = ("loss", *REWARDS)
    logged: Sequence[str] = REWARDS
    layout = RowLayout(
        {"chosen": "<i4", "chosen_trained": "?", "rejected": "<i4", "rejected_trained": "?"}, SIDES, 2, True
    )
    averages = False  # whether an answer's score is the mean over its tokens
    likelihood = 0.0  # weight of the mean loss of the chosen answers' tokens
    prompts = False  # whether the chosen answers' prompts are among those tokens
    apart = False

    def __init__(self, settings: PairSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.unusable, self.beta = settings.unusable_pairs, float(getattr(settings, "beta", 1.0))

    def losses(self, scores: Scores) -> Tensor:
        """(P,) of each pair, without its likelihood."""
        raise NotImplementedError

    def laid_out(self, end_to_end: bool) -> PairObjective:
        """With both answers of a row in one line, for a model that keeps documents apart; or in a line each."""
        found = copy(self)
        found.apart = end_to_end
        return found

    def row_encoder(self, options: EncodeOptions) -> PairEncoder:
        """Raises: RecipeError for options that mean nothing for pairs."""
        problems = []
        if options.train_on != "assistant":
            problems.append(Problem("the answers are what is compared", "write assistant", key="data.train_on"))
        if options.excess_length == "split":
            what = "a later piece of an answer has no prompt before it"
            problems.append(Problem(what, "write drop, truncate or error", key="data.excess_length"))
        if problems:
            raise RecipeError.of(problems)
        return PairEncoder(self.tokenizer, options, self.unusable)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Tokens start .. stop-1 of both sequences."""
        sides = [(row.parts[side][start:stop], row.parts[f"{side}_trained"][start:stop]) for side in SIDES]
        return make_row(sides, row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, whose sequences are both so long and all answer."""
        row = next(rows)
        sides = [(np.resize(row.parts[side], size), np.ones(size, np.bool_)) for side in SIDES]
        return [make_row(sides, row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """`counts`: how many predicted tokens each chosen answer has, then each rejected one (then each prompt);
        `index` and `ids`: those tokens, in this order.

        Shapes: input_ids, position_ids (B, T), or (2 B, T) where each answer is a line; index, ids (N,); counts (2 P,).
        """
        rows = [row for sequence in sequences for row in sequence]
        if self.apart or len(rows) > len(sequences):
            firsts = np.cumsum([0, *map(len, sequences)]).tolist()
            lines = [
                [(first + place, side) for place in range(len(sequence)) for side in SIDES]
                for first, sequence in zip(firsts, sequences, strict=False)
            ]
        else:
            lines = [[(number, side)] for side in SIDES for number in range(len(rows))]
        arrays = [[rows[number].parts[side] for number, side in line] for line in lines]
        ids = lay_end_to_end(arrays, self.tokenizer.pad_id)  # (B, T)
        sizes = [list(map(len, line)) for line in arrays]
        starts = {
            document: line * ids.shape[1] + start
            for line, documents in enumerate(lines)
            for document, start in zip(documents, np.cumsum([0, *sizes[line]]).tolist(), strict=False)
        }
        groups = [(number, side, True) for side in SIDES for number in range(len(rows))]
        groups += [(number, "chosen", False) for number in range(len(rows))] if self.prompts else []
        places = [
            starts[number, side] + np.flatnonzero(rows[number].parts[f"{side}_trained"][1:] == trained)
            for number, side, trained in groups
        ]
        index = torch.from_numpy(np.concatenate(places))  # (N,)
        targets = {"index": index, "ids": ids.flatten()[index + 1], "counts": torch.tensor(list(map(len, places)))}
        for name in (name for name in PREPARED if name in rows[0].parts):
            targets[name] = torch.from_numpy(np.stack([row.parts[name] for row in rows]))  # (P, ...)
        return Batch({"input_ids": ids, "position_ids": positions(sizes)}, targets, tuple(map(tuple, sequences)))

    def with_parts(self, batch: Batch, parts: Mapping[str, NDArray[Any]]) -> Batch:
        """The batch whose rows have what was prepared for them. Shapes: each part (P, ...)."""
        rows = (
            replace(row, parts={**row.parts, **{name: values[number] for name, values in parts.items()}})
            for number, row in enumerate(batch.rows)
        )
        return self.collate([[next(rows) for _ in sequence] for sequence in batch.sequences])

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each row with the reference's scores of its answers, and the weight of a token among all of the step."""
        prepared: list[dict[str, NDArray[Any]]] = [{} for _ in window.batches]
        if self.reference != "none":
            for parts, found in zip(prepared, model.scored(window.batches, self.scored, bypassed=True), strict=True):
                parts["reference"] = found.numpy().reshape(2, -1).T  # (P, 2)
        if self.likelihood:
            tokens = sum(gather([int(self._likely(batch).sum()) for batch in window.batches]))
            share = sum(gather([len(batch.rows) for batch in window.batches])) / max(tokens, 1)
            for parts, batch in zip(prepared, window.batches, strict=True):
                parts["share"] = np.full(len(batch.rows), share, np.float32)
        batches = zip(window.batches, prepared, strict=True)
        return replace(window, batches=tuple(self.with_parts(*pair) if pair[1] else pair[0] for pair in batches))

    def _likely(self, batch: Batch) -> Tensor:
        """How many tokens of each chosen answer (and of its prompt) are learnt for their own sake."""
        counts = batch.targets["counts"].view(-1, len(batch.rows))  # (2 or 3, P)
        return counts[[0, 2]] if self.prompts else counts[:1]

    def spans(self, row: Row) -> list[Part]:
        """Both sequences; the first token of each is never predicted."""
        marks = {side: np.append(False, row.parts[f"{side}_trained"][1:]) for side in SIDES}
        return [Part(row.parts[side], marks[side], title=side) for side in SIDES]

    def weights(self, counts: Tensor) -> Tensor | None:
        """(N,) of tokens in the scores of their answers; None: 1 each. Shapes: counts (2 P,)."""
        return None

    def scored(self, output: ModelOutput, batch: Batch) -> Tensor:
        """(2 P,) score of each chosen answer, then of each rejected one."""
        return self._summed(self._log_probabilities(output, batch), batch)

    def _log_probabilities(self, output: ModelOutput, batch: Batch) -> Tensor:
        return log_probabilities(output, batch.targets["index"], batch.targets["ids"])

    def _summed(self, found: Tensor, batch: Batch) -> Tensor:
        """Shapes: found (N,) -> (2 P,)."""
        counts = batch.targets["counts"][: 2 * len(batch.rows)]
        found = found[: int(counts.sum())]
        weights = self.weights(counts)
        found = found if weights is None else found * placed(weights, found.device)
        return _by_sequence(found, counts)

    def scores(self, output: ModelOutput, batch: Batch) -> Scores:
        """What the loss is made of."""
        found = self._log_probabilities(output, batch)  # (N,)
        both, counts = self._summed(found, batch).view(2, -1), batch.targets["counts"]
        tokens = placed(counts.float(), found.device).view(-1, both.shape[1])[:2]
        given = {name: placed(batch.targets[name], found.device) for name in PREPARED if name in batch.targets}
        reference = given["reference"].T if "reference" in given else torch.zeros_like(both)
        likelihood = torch.zeros_like(both[0])
        if self.likelihood:
            every = _by_sequence(found, counts).view(-1, both.shape[1])  # (2 or 3, P)
            likelihood = -self.likelihood * given["share"] * (every[0] + (every[2] if self.prompts else 0.0))
        both = both / tokens if self.averages else both
        matched = given.get("matched", likelihood)
        return Scores(both[0], both[1], tokens[0], tokens[1], reference[0], reference[1], likelihood, matched)

    def measured(self, scores: Scores) -> Sums:
        """Sums over pairs of what is logged; rewards are beta times the log of policy over reference."""
        chosen, rejected = (self.beta * ratio.detach() for ratio in (scores.chosen_ratio, scores.rejected_ratio))
        found = (
            chosen,
            rejected,
            chosen - rejected,
            chosen > rejected,
            scores.chosen.detach(),
            scores.rejected.detach(),
        )
        return {name: values.sum(dtype=torch.float64) for name, values in zip(REWARDS, found, strict=True)}

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        scores = self.scores(output, batch)
        return Loss((self.losses(scores) + scores.likelihood).sum()[None], metrics=self.measured(scores))

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, units and what is logged, over pairs."""
        scores = self.scores(output, batch)
        total = (self.losses(scores) + scores.likelihood).sum(dtype=torch.float64)
        return {"loss": total, "units": self.units(batch)[0], **self.measured(scores)}


def smoothed(logits: Tensor, share: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), where a share e of the preferences is flipped."""
    return -logsigmoid(logits) * (1 - share) - logsigmoid(-logits) * share


def _by_sequence(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive stretches, each in a fixed order on every device.

    Shapes: values (N,), counts (S,) -> (S,).
    """
    return torch.stack([part.sum() for part in torch.split(values, counts.tolist())])
