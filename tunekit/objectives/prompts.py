"""Rows of prompts: before the model has written its completions to them, and with these.

Comes in: examples with a prompt.  Goes out: rows of its ids, and of what rewards are told of it, as JSON; rows with a
group of completions, in the layout of answers. A group is one row, so that no micro-batch and no split parts it; its
prompt is computed once where documents may begin with tokens of another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import Batch, Gather, Part, Row, RowLayout, Rows, Tokenizer
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, Problem, RecipeError
from tunekit.files.cache_folder import hash_of
from tunekit.machine.placing import placed
from tunekit.objectives.answers import NO_PROMPT, AnswerObjective
from tunekit.objectives.rows import TextEncoder
from tunekit.recipe.bases.sample_settings import SampleSettings

PER_TOKEN = ("old", "reference", "kl")  # what a row may have of each token of its completions
PER_COMPLETION = ("advantages", "weights")
MakeRow = Callable[[NDArray[Any], bytes, str], Row]  # ids, what is told, origin


class PromptEncoder(TextEncoder):
    """A row is the ids of a prompt, and as JSON the prompt and the columns beside it. `unusable`: error or drop."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions, make_row: MakeRow, unusable: str) -> None:
        super().__init__(tokenizer, options)
        self.make_row, self.unusable = make_row, unusable

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped or DataError for one without a prompt, as the recipe asks."""
        if not example.prompt:
            if self.unusable == "drop":
                raise Dropped(NO_PROMPT)
            raise DataError(f"the row has {NO_PROMPT}", "mend it, or write objective.unusable_rows: drop")
        return self.make_row(np.asarray(self._ids(example), np.int32), said_of(example).encode(), origin)

    def prompt(self, example: Any) -> tuple[list[int], str] | None:
        """Ids of the prompt, and the reference answer; None where the row has none."""
        return None if example.answer is None else (self._ids(example), example.answer)

    def _ids(self, example: Any) -> list[int]:
        found = self.renderer.prompt(example.answered("an answer"))
        assert found is not None
        return found[0]


@dataclass(frozen=True)
class Completion:
    """Ids up to the stop token that ended it, if one did, and their text."""

    ids: list[int]
    ended: bool
    text: str


class PromptObjective(AnswerObjective):
    """Rows of prompts, whose completions are answers that come later."""

    measures = False  # whether rows are only measured: one greedy completion each
    template: str | None = None

    def __init__(self, settings: SampleSettings, tokenizer: Tokenizer) -> None:
        count, longest = settings.num_generations, settings.max_completion_length
        self.sides = tuple(map(str, range(count)))
        super().__init__(settings, tokenizer)
        self.settings = settings
        self.layout = RowLayout({"prompt": "<i4", "said": "u1"}, ("prompt",), count, paired=True)
        self.fingerprint = hash_of([settings.method, count, longest, settings.unusable_rows, tokenizer.fingerprint])
        self.notes = (f"each prompt counts as {count} completions of {longest:,} tokens, the most there can be",)

    def informed(self, rows: Sequence[Rows], template: str | None = None) -> PromptObjective:
        """With the template that says where an answer ends."""
        found = copy(self)
        found.template = template
        return found

    def held_out(self) -> PromptObjective:
        """With one greedy completion a prompt."""
        found = copy(self)
        found.measures, found.sides = True, ("0",)
        return found

    def measuring(self, model: Any, rows: Rows, batches: Iterable[Batch], gather: Gather) -> PromptObjective:
        """Rows are measured one by one, with one greedy completion each."""
        return self.held_out()

    def row_encoder(self, options: EncodeOptions) -> PromptEncoder:  # type: ignore[override]
        """Raises: RecipeError for options that mean nothing for prompts."""
        problems = []
        if options.train_on != "assistant":
            what = "the model's own completions are what it learns from"
            problems.append(Problem(what, "write assistant", key="data.train_on"))
        if options.excess_length in ("split", "truncate"):
            what = "a prompt that is cut asks something else"
            problems.append(Problem(what, "write drop or error", key="data.excess_length"))
        if problems:
            raise RecipeError.of(problems)
        return PromptEncoder(self.tokenizer, options, self.prompt_row, self.unusable)

    def prompt_row(self, ids: NDArray[Any], said: bytes, origin: str, number: int = 0) -> Row:
        """A prompt that has no completions yet; its sizes are those with the longest ones."""
        count, longest = self.settings.num_generations, self.settings.max_completion_length
        parts = {"prompt": ids, "said": np.frombuffer(said, np.uint8)}
        return Row(parts, (len(ids) + longest,) * count, count, origin, number)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """What begins like the row and is no longer; prompts of a run are never cut."""
        longest = min(self.settings.max_completion_length, max(stop - start - 1, 0))
        ids = row.parts["prompt"][start : max(stop - longest, start + 1)]
        return self.prompt_row(ids, row.parts["said"].tobytes(), row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, whose prompt with the longest completion is so large."""
        row = next(rows)
        ids = np.resize(row.parts["prompt"], max(size - self.settings.max_completion_length, 1))
        return [self.prompt_row(ids, row.parts["said"].tobytes(), row.origin, row.number)]

    def prefix(self, row: Row) -> int:
        """The prompt, where documents may begin with tokens of another one."""
        if not self.shares:
            return 0
        return len(row.parts["prompt"]) if "prompt" in row.parts else int(row.parts["prompt_size"][0])

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> PromptObjective:
        """As the answers of a pair are."""
        found = copy(self)
        found.apart, found.shares = end_to_end, end_to_end and shares_prefixes
        return found

    def spans(self, row: Row) -> list[Part]:
        """The prompt; nothing of it is trained on. What rewards are told of it stands before it."""
        columns = {name: value for name, value in told_of(row)["columns"].items() if value is not None}
        said = "".join(f", {name}: {value}" for name, value in columns.items())
        ids = row.parts["prompt"]
        return [Part(ids, np.zeros(len(ids), np.bool_), title=f"prompt{said}")]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """As answers are laid out; prompts without completions as if these had their full length."""
        if not any("prompt" in row.parts for row in sequences[0]):
            return super().collate(sequences)
        laid = [[self.answered(row, self.longest(row)) for row in sequence] for sequence in sequences]
        batch = super().collate(laid)
        return replace(batch, targets={}, sequences=tuple(map(tuple, sequences)))

    def longest(self, row: Row) -> list[Completion]:
        ids = np.resize(row.parts["prompt"], self.settings.max_completion_length).tolist()
        return [Completion(ids, True, "")] * len(self.sides)

    def answered(self, row: Row, group: Sequence[Completion]) -> Row:
        """The prompt with its completions, of which those that did not end may be left out of the loss."""
        prompt = row.parts["prompt"]
        sides = []
        for each in group:
            counts = each.ended or not self.settings.mask_truncated_completions
            ids = np.concatenate([prompt, np.asarray(each.ids, np.int32)])
            sides.append((ids, np.append(np.zeros(len(prompt), np.bool_), np.full(len(each.ids), counts))))
        parts: dict[str, Any] = {"prompt_size": np.array([len(prompt)])}
        for side, (ids, trained) in zip(self.sides, sides, strict=True):
            parts |= {side: ids, f"{side}_trained": trained}
        return Row(parts, tuple(len(ids) for ids, _ in sides), len(self.sides), row.origin, row.number)

    def beside_targets(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """(N,) of tokens, (G P,) of completions, each in the order of `targets`; (P, ...) of rows."""
        parts, found = rows[0].parts, dict[str, NDArray[Any]]()
        for name in (name for name in PER_TOKEN if f"{self.sides[0]}_{name}" in parts):
            found[name] = np.concatenate([row.parts[f"{side}_{name}"] for side in self.sides for row in rows])
        for name in (name for name in PER_COMPLETION if name in parts):
            found[name] = np.stack([row.parts[name] for row in rows], axis=1).reshape(-1)
        for name in (name for name in ("share", "rewards", "ended", "lengths") if name in parts):
            found[name] = np.stack([row.parts[name] for row in rows])
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def given(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """What a loss reads beside the log-probabilities, on the device."""
        names = (*PER_TOKEN, *PER_COMPLETION, "share")
        return {name: placed(values, device) for name, values in batch.targets.items() if name in names}


def said_of(example: Any) -> str:
    """The prompt and the columns of an example, which its row keeps for rewards."""
    columns = {"answer": example.answer, **example.columns}
    return json.dumps({"prompt": example.prompt_value, "columns": columns}, default=str, ensure_ascii=False)


def told_of(row: Row) -> dict[str, Any]:
    """The prompt and the columns of a row, as rewards get them."""
    found: dict[str, Any] = json.loads(row.parts["said"].tobytes())
    return found
