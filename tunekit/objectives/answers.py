"""What objectives over answers share: rows of one answer to a prompt or of two, and what the reference says of them.

Comes in: examples with prompt and answers, then a Batch and the model's output.  Goes out: rows; each answer's
log-probability. Where a sequence of a batch holds several rows, or the model keeps documents apart, all answers of each
row lie end to end, each with the prompt before it as a document of its own; where documents may begin with tokens of
another one, what a second answer has in common with the first is computed once. Elsewhere each is a padded line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    ROW_LOSSES,
    Batch,
    Gather,
    Loss,
    ModelOutput,
    Part,
    Row,
    RowLayout,
    Sums,
    Tokenizer,
    Window,
)
from tunekit.data.batching.pad import lay_end_to_end, positions
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, Problem, RecipeError
from tunekit.machine.devices import summing_dtype
from tunekit.machine.placing import placed
from tunekit.objectives.losses.logprobs import log_probabilities
from tunekit.objectives.rows import TextEncoder, TextObjective

NO_PROMPT = "no prompt"
EMPTY_ANSWER = "an empty answer"
EQUAL = "chosen and rejected are the same"
Parts = Mapping[str, NDArray[Any]]
Places = dict[tuple[int, str], NDArray[Any]]  # (T,) of each sequence, by the row's number in the batch and its side


class AnswerEncoder(TextEncoder):
    """A row is a sequence of ids for each answer, with a mark on the answer's own, and what is said beside them."""

    def __init__(self, objective: AnswerObjective, options: EncodeOptions) -> None:
        super().__init__(objective.tokenizer, options)
        self.objective = objective

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped or DataError for one that tells nothing, as the recipe asks."""
        answers = [getattr(example, side) for side in self.objective.sides]
        reasons = {NO_PROMPT: not example.prompt, EMPTY_ANSWER: not all(answers)}
        reasons[EQUAL] = len(answers) > 1 and answers[0] == answers[1]
        for reason in (name for name, found in reasons.items() if found):
            if self.objective.unusable == "drop":
                raise Dropped(reason)
            what = reason if reason == EQUAL else f"the row has {reason}"
            raise DataError(what, f"mend it, or write objective.{self.objective.unusable_key}: drop")
        before = self.notices.copy()
        found = [self.renderer.sequence(example.answered(answer)) for answer in answers]
        if any(((weights > 0) & (weights != 1)).any() for _, weights in found):
            raise DataError(
                "a 'weight' of a message that is neither 0 nor 1: an answer counts as a whole", "write 0 or 1"
            )
        for notice, count in (self.notices - before).items():
            self.notices[notice] -= count - 1  # a row that has it in each of its answers is one row
        sides = [(np.asarray(ids, np.int32), weights > 0) for ids, weights in found]
        beside = {name: [getattr(example, name)] for name in self.objective.beside}
        return self.objective.make_row(sides, beside, origin)

    def prompt(self, example: Any) -> tuple[list[int], str] | None:
        """Ids of the prompt, and its first answer's text."""
        return self.renderer.prompt(example.answered(getattr(example, self.objective.sides[0])))


class AnswerObjective(TextObjective):
    """loss = sum over rows of what a subclass makes of them; divided by the step's number of rows.

    What depends on other rows is prepared for the window of all ranks: micro-batches and splits change nothing.
    """

    packable = True
    sides: Sequence[str] = ()
    beside: Mapping[str, str] = {}  # one value of a row, by the name of an example's field: its dtype
    unusable_key = "unusable_rows"  # of the settings: what an unusable row leads to
    prompts = False  # whether the first answers' prompts are predicted too
    apart = shares = False

    def __init__(self, settings: Any, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.keeps = bool(getattr(settings, "precompute_ref_log_probs", False))
        self.unusable, self.beta = getattr(settings, self.unusable_key), float(getattr(settings, "beta", 1.0))
        parts = {name: kind for side in self.sides for name, kind in ((side, "<i4"), (f"{side}_trained", "?"))}
        self.layout = RowLayout({**parts, **self.beside}, tuple(self.sides), len(self.sides), len(self.sides) > 1)

    def compared(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Sums]:
        """(P,) loss of each row, and sums of what is logged."""
        raise NotImplementedError

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> AnswerObjective:
        """With all answers of a row in one line, for a model that keeps documents apart; or in a line each.

        `shares_prefixes`: with what a second answer has in common with the first computed once.
        """
        found = copy(self)
        found.apart, found.shares = end_to_end, end_to_end and shares_prefixes and len(self.sides) > 1
        return found

    def shared(self, row: Row) -> int:
        """How many tokens of the later sequences are computed with the first one."""
        return self.prefix(row) * (len(self.sides) - 1)

    def prefix(self, row: Row) -> int:
        """With how many tokens both sequences begin, so that they are computed once; each has one more at least."""
        if not self.shares:
            return 0
        sequences = [row.parts[side] for side in self.sides]
        least = min(map(len, sequences)) - 1
        one, other = (ids[:least] for ids in sequences)
        return int(np.argmin(np.append(one == other, False)))

    def row_encoder(self, options: EncodeOptions) -> AnswerEncoder:
        """Raises: RecipeError for options that mean nothing for answers."""
        problems = []
        if options.train_on != "assistant":
            problems.append(Problem("the answers are what is compared", "write assistant", key="data.train_on"))
        if options.excess_length == "split":
            what = "a later piece of an answer has no prompt before it"
            problems.append(Problem(what, "write drop, truncate or error", key="data.excess_length"))
        if problems:
            raise RecipeError.of(problems)
        return AnswerEncoder(self, options)

    def make_row(
        self, sides: Sequence[tuple[Any, Any]], beside: Mapping[str, Any], origin: str, number: int = 0
    ) -> Row:
        """A row of sequences, (T,) ids and marks each; the loss counts one row, of which no answer is empty."""
        parts: dict[str, Any] = {}
        for side, (ids, trained) in zip(self.sides, sides, strict=True):
            parts |= {side: ids, f"{side}_trained": trained}
        parts |= {name: np.asarray(beside[name], kind) for name, kind in self.beside.items()}
        usable = all(trained[1:].any() for _, trained in sides)
        return Row(parts, tuple(len(ids) for ids, _ in sides), int(usable), origin, number)

    def marked(self, row: Row) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Ids and marks of each answer."""
        return [(row.parts[side], row.parts[f"{side}_trained"]) for side in self.sides]

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """Tokens start .. stop-1 of every sequence."""
        sides = [(ids[start:stop], trained[start:stop]) for ids, trained in self.marked(row)]
        return self.make_row(sides, row.parts, row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, whose sequences are all so long and all answer, and have as little as can be in common."""
        row = next(rows)
        laid = [ids[::way] for (ids, _), way in zip(self.marked(row), (1, -1), strict=False)]  # and against their order
        sides = [(np.resize(ids, size), np.ones(size, np.bool_)) for ids in laid]
        return [self.make_row(sides, row.parts, row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """What else the rows hold is a target under its name, (P, ...).

        Shapes: input_ids, position_ids (B, T), or (S P, T) where each of the S answers of P rows is a line.
        """
        rows = [row for sequence in sequences for row in sequence]
        if self.apart or len(rows) > len(sequences):
            firsts = np.cumsum([0, *map(len, sequences)]).tolist()
            lines = [
                [(first + place, side) for place in range(len(sequence)) for side in self.sides]
                for first, sequence in zip(firsts, sequences, strict=False)
            ]
        else:
            lines = [[(number, side)] for side in self.sides for number in range(len(rows))]
        shared = [self.prefix(row) for row in rows]
        skipped = [[shared[number] if side != self.sides[0] else 0 for number, side in line] for line in lines]
        arrays = [
            [rows[number].parts[side][skip:] for (number, side), skip in zip(*each, strict=True)]
            for each in zip(lines, skipped, strict=True)
        ]
        ids = lay_end_to_end(arrays, self.tokenizer.pad_id)  # (B, T)
        places: Places = {}
        for line, (documents, skips) in enumerate(zip(lines, skipped, strict=True)):
            start = line * ids.shape[1]
            for (number, side), skip, array in zip(documents, skips, arrays[line], strict=True):
                first = places[number, self.sides[0]][:skip] if skip else np.empty(0, np.int64)
                places[number, side] = np.concatenate([first, np.arange(start, start + len(array))])
                start += len(array)
        targets = {**self.targets(rows, places, ids), **self.beside_targets(rows)}
        counted = positions([list(map(len, line)) for line in arrays], skipped)
        return Batch({"input_ids": ids, "position_ids": counted}, targets, tuple(map(tuple, sequences)))

    def beside_targets(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What the rows hold beside their sequences, (P, ...) each."""
        marked = {name for side in self.sides for name in (side, f"{side}_trained")}
        names = [name for name in rows[0].parts if name not in marked]
        return {name: torch.from_numpy(np.stack([row.parts[name] for row in rows])) for name in names}

    def targets(self, rows: Sequence[Row], places: Places, ids: Tensor) -> dict[str, Tensor]:
        """`counts`: how many predicted tokens each first answer has, then each second one (then each prompt); `index`
        and `ids`: those tokens, in this order.

        Shapes: ids (B, T) -> index, ids (N,); counts (S P,).
        `places`: of each sequence's tokens in the flattened ids.
        """
        groups = [(number, side, True) for side in self.sides for number in range(len(rows))]
        groups += [(number, self.sides[0], False) for number in range(len(rows))] if self.prompts else []
        index, targets = list[NDArray[Any]](), list[NDArray[Any]]()
        for number, side, trained in groups:
            chosen = np.flatnonzero(rows[number].parts[f"{side}_trained"][1:] == trained)
            index.append(places[number, side][chosen])
            targets.append(rows[number].parts[side][1:][chosen])
        found = {"index": np.concatenate(index), "ids": np.concatenate(targets).astype(np.int64)}  # (N,) each
        counts = torch.tensor(list(map(len, index)))
        return {**{name: torch.from_numpy(values) for name, values in found.items()}, "counts": counts}

    def remade(self, batch: Batch, rows: Iterator[Row]) -> Batch:
        """The batch with other rows in the places of its own."""
        return self.collate([[next(rows) for _ in sequence] for sequence in batch.sequences])

    def with_parts(self, batch: Batch, parts: Parts) -> Batch:
        """The batch whose rows have what was prepared for them. Shapes: each part (P, ...)."""
        rows = (
            replace(row, parts={**row.parts, **{name: values[number] for name, values in parts.items()}})
            for number, row in enumerate(batch.rows)
        )
        return self.remade(batch, rows)

    def with_all(self, window: Window, parts: Sequence[Parts]) -> Window:
        """The window whose batches have what was prepared for each."""
        batches = zip(window.batches, parts, strict=True)
        return replace(window, batches=tuple(self.with_parts(*pair) if pair[1] else pair[0] for pair in batches))

    def by_row(self, scores: Tensor) -> NDArray[Any]:
        """Scores as a part of each row. Shapes: (S P,) -> (P, S)."""
        found: NDArray[Any] = scores.numpy().reshape(len(self.sides), -1).T
        return found

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each row with the reference's scores of its answers."""
        if self.reference == "none":
            return window
        found = self.referenced(model, window.batches)
        return self.with_all(window, [{"reference": self.by_row(scores)} for scores in found])

    def referenced(self, model: Any, batches: Sequence[Batch], beside: Sequence[Batch] = ()) -> list[Tensor]:
        """(S P,) the reference's scores of each batch, then of those `beside`, which are of this step alone.

        Where they are kept, each row is scored once and by itself: what it gets does not depend on when that is.
        """
        if not self.keeps:
            return model.scored([*batches, *beside], self.scored, bypassed=True)  # type: ignore[no-any-return]
        known: dict[bytes, Tensor] = model.reference_scores
        keys = [[self._key(row) for row in batch.rows] for batch in batches]
        rows = zip(chain.from_iterable(keys), chain.from_iterable(batch.rows for batch in batches), strict=True)
        new = {key: self.collate([[row]]) for key, row in rows if key not in known}
        found = model.scored([*new.values(), *beside], self.scored, bypassed=True) if new or beside else []
        known |= dict(zip(new, found, strict=False))
        return [torch.stack([known[key] for key in each], dim=1).flatten() for each in keys] + found[len(new) :]

    def _key(self, row: Row) -> bytes:
        """What its scores depend on."""
        return blake2b(b"".join(part.tobytes() for each in self.marked(row) for part in each), digest_size=16).digest()

    def spans(self, row: Row) -> list[Part]:
        """Every sequence, under what is said of it; the first token of each is never predicted."""
        said = "".join(f", {name}: {row.parts[name][0]}" for name in self.beside)
        sides = zip(self.sides, self.marked(row), strict=True)
        return [Part(ids, np.append(False, trained[1:]), title=side + said) for side, (ids, trained) in sides]

    def weights(self, counts: Tensor) -> Tensor | None:
        """(N,) of tokens in the scores of their answers; None: 1 each. Shapes: counts (S P,)."""
        return None

    def scored(self, output: ModelOutput, batch: Batch) -> Tensor:
        """(S P,) score of each first answer, then of each second one."""
        return self.summed(self.log_probabilities(output, batch), batch)

    def log_probabilities(self, output: ModelOutput, batch: Batch) -> Tensor:
        """(N,) of every predicted token."""
        return log_probabilities(output, batch.targets["index"], batch.targets["ids"])

    def summed(self, found: Tensor, batch: Batch) -> Tensor:
        """Shapes: found (N,) -> (S P,)."""
        counts = batch.targets["counts"][: len(self.sides) * len(batch.rows)]
        found = found[: int(counts.sum())]
        weights = self.weights(counts)
        found = found if weights is None else found * placed(weights, found.device)
        return by_sequence(found, counts)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """Shapes: output.hidden (B, T, D) -> total (1,)."""
        losses, measured = self.compared(output, batch)
        return Loss(losses.sum()[None], metrics=measured)

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """loss, units and what is logged, over rows."""
        losses, measured = self.compared(output, batch)
        wide = losses.to(summing_dtype(losses.device))
        return {"loss": wide.sum(), ROW_LOSSES: wide, "units": self.units(batch)[0], **measured}


def by_sequence(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive stretches, each in a fixed order on every device.

    Shapes: values (N,), counts (S,) -> (S,).
    """
    return torch.stack([part.sum() for part in torch.split(values, counts.tolist())])
