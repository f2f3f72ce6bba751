"""What objectives over the model's own samples share: rows of prompts, and steps of completions with their rewards.

Comes in: examples with a prompt, then windows of them.  Goes out: rows; windows in which each prompt has its group of
completions with an advantage each; sums of what they were worth where nothing is learnt.
A group is one row, so that no micro-batch and no split parts it; its prompt is computed once where documents may begin
with tokens of another one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    Batch,
    Gather,
    ModelOutput,
    Part,
    Preparation,
    Row,
    RowLayout,
    Rows,
    Sampling,
    Sums,
    Tokenizer,
    Window,
)
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, Problem, RecipeError, RewardError
from tunekit.files.cache_folder import hash_of
from tunekit.model.call import seed_for
from tunekit.model.text.generation import find_stop_ids
from tunekit.objectives.answers import NO_PROMPT, AnswerObjective
from tunekit.objectives.logprobs import at_temperature, log_probabilities
from tunekit.objectives.rewards import Rewards, Scores, Written
from tunekit.objectives.rows import TextEncoder
from tunekit.recipe.sample_settings import REWARDED, SampleSettings

PER_TOKEN = ("old", "reference", "kl")  # what a row may have of each token of its completions
SHOWN_ROWS, SHOWN_SAMPLES = 2, 4  # of a step, in the report


@dataclass(frozen=True)
class Completion:
    """Ids up to the stop token that ended it, if one did, and their text."""

    ids: list[int]
    ended: bool
    text: str


class PromptEncoder(TextEncoder):
    """A row is the ids of a prompt, and as JSON what rewards are told of it."""

    def __init__(self, objective: SampleObjective, options: EncodeOptions) -> None:
        super().__init__(objective.tokenizer, options)
        self.objective = objective

    def encode(self, example: Any, origin: str) -> Row:
        """The row. Raises: Dropped or DataError for one without a prompt, as the recipe asks."""
        if not example.prompt:
            if self.objective.unusable == "drop":
                raise Dropped(NO_PROMPT)
            raise DataError(f"the row has {NO_PROMPT}", "mend it, or write objective.unusable_rows: drop")
        columns = {"answer": example.answer, **example.columns}
        said = json.dumps({"prompt": example.prompt_value, "columns": columns}, default=str, ensure_ascii=False)
        return self.objective.prompt_row(np.asarray(self._ids(example), np.int32), said.encode(), origin)

    def prompt(self, example: Any) -> tuple[list[int], str] | None:
        """Ids of the prompt, and the reference answer; None where the row has none."""
        return None if example.answer is None else (self._ids(example), example.answer)

    def _ids(self, example: Any) -> list[int]:
        found = self.renderer.prompt(example.answered("an answer"))
        assert found is not None
        return found[0]


class SampleObjective(AnswerObjective):
    """loss = sum over completions of what a subclass makes of their tokens; divided by the step's number of completions.

    Completions are drawn in `prepare`, from hash(seed, step, row, completion); their advantages are made of the rewards
    of the whole step, over all ranks.
    """

    metrics: Sequence[str] = ("loss", *REWARDED)
    measures = False  # whether rows are only measured: one greedy completion each
    template: str | None = None

    def __init__(self, settings: SampleSettings, tokenizer: Tokenizer) -> None:
        count, longest = settings.num_generations, settings.max_completion_length
        self.sides = tuple(map(str, range(count)))
        super().__init__(settings, tokenizer)
        self.settings, self.rewards = settings, Rewards(settings.reward)
        self.reference = "policy at step 0" if settings.beta else "none"
        self.layout = RowLayout({"prompt": "<i4", "said": "u1"}, ("prompt",), count, paired=True)
        self.fingerprint = hash_of([settings.method, count, longest, settings.unusable_rows, tokenizer.fingerprint])
        self.notes = (f"each prompt counts as {count} completions of {longest:,} tokens, the most there can be",)

    @property
    def code(self) -> Mapping[str, str]:  # type: ignore[override]
        """Of the files of reward functions. Raises: RewardError where one cannot be read."""
        return self.rewards.code

    def advantages(self, own: Scores, every: Scores) -> Scores:
        """Of this rank's completions, by their rewards and by those of the step; NaN where there is no reward.

        Shapes: own (P, G), every (A, G) -> (P, G).
        """
        raise NotImplementedError

    def zero_spread(self, every: Scores) -> NDArray[np.bool_]:
        """(A,) which groups teach nothing, since their rewards are equal."""
        return np.isclose(spread(every, axis=1), 0.0)

    def token_weights(self, counts: Scores, tokens: float) -> Scores:
        """What each token of a completion counts in the sum over completions. Shapes: counts (P, G) -> (P, G).

        `tokens`: of a completion of the step, on average.
        """
        raise NotImplementedError

    # Rows.

    def informed(self, rows: Sequence[Rows], template: str | None = None) -> SampleObjective:
        """With the template that says where an answer ends."""
        found = copy(self)
        found.template = template
        return found

    def held_out(self) -> SampleObjective:
        """With one greedy completion a prompt."""
        found = copy(self)
        found.measures, found.sides = True, ("0",)
        return found

    def measuring(self, model: Any, rows: Rows, batches: Iterable[Batch], gather: Gather) -> SampleObjective:
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
        return PromptEncoder(self, options)

    def prompt_row(self, ids: NDArray[Any], said: bytes, origin: str, number: int = 0) -> Row:
        """A prompt that has no completions yet; its sizes are those with the longest ones."""
        count, longest = self.settings.num_generations, self.settings.max_completion_length
        parts = {"prompt": ids, "said": np.frombuffer(said, np.uint8)}
        return Row(parts, (len(ids) + longest,) * count, count, origin, number)

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """What begins like the row and is no longer; prompts of a run are never cut."""
        longest = min(self.settings.max_completion_length, max(stop - start - 1, 0))
        ids = row.parts["prompt"][start : max(stop - longest, start + 1)]
        return replace(self.prompt_row(ids, row.parts["said"].tobytes(), row.origin, row.number))

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """One row, whose prompt with the longest completion is so large."""
        row = next(rows)
        ids = np.resize(row.parts["prompt"], max(size - self.settings.max_completion_length, 1))
        return [self.prompt_row(ids, row.parts["said"].tobytes(), row.origin, row.number)]

    def prefix(self, row: Row) -> int:
        """The prompt, where documents may begin with tokens of another one."""
        return int(self._prompt_size(row)) if self.shares else 0

    def laid_out(self, end_to_end: bool, shares_prefixes: bool = False) -> SampleObjective:
        """As the answers of a pair are."""
        found = copy(self)
        found.apart, found.shares = end_to_end, end_to_end and shares_prefixes
        return found

    def _prompt_size(self, row: Row) -> int:
        if "prompt" in row.parts:
            return len(row.parts["prompt"])
        return int(row.parts["prompt_size"][0])

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
        laid = [[self._answered(row, self._longest(row)) for row in sequence] for sequence in sequences]
        batch = super().collate(laid)
        return replace(batch, targets={}, sequences=tuple(map(tuple, sequences)))

    def _longest(self, row: Row) -> list[Completion]:
        ids = np.resize(row.parts["prompt"], self.settings.max_completion_length).tolist()
        return [Completion(ids, True, "")] * len(self.sides)

    def _answered(self, row: Row, group: Sequence[Completion]) -> Row:
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
        """(G P,) of each first completion, then of each second one; (N,) of their tokens; (P, ...) of rows."""
        found: dict[str, Tensor] = {}
        for name in (name for name in PER_TOKEN if f"{self.sides[0]}_{name}" in rows[0].parts):
            found[name] = torch.from_numpy(
                np.concatenate([row.parts[f"{side}_{name}"] for side in self.sides for row in rows])
            )
        for name in ("advantages", "weights"):
            if name in rows[0].parts:
                found[name] = torch.from_numpy(np.stack([row.parts[name] for row in rows]).T.reshape(-1).copy())
        for name in ("share", "rewards", "ended"):
            if name in rows[0].parts:
                found[name] = torch.from_numpy(np.stack([row.parts[name] for row in rows]))
        return found

    # A step.

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each prompt with its completions, and what the loss needs of them.

        Nothing is sampled without values, nor in a step that is only tried: there completions have their full length,
        and no reward is asked.
        Raises: RewardError on every rank where one of them had a reward without a sensible result.
        """
        rows, made_up = [row for batch in window.batches for row in batch.rows], window.step < 0 or _is_empty(model)
        began = monotonic()
        groups = [self._longest(row) for row in rows] if made_up else self.sampled(model, window, rows)
        sampled = monotonic()
        scores = self._scored(model, rows, groups, gather, made_up)  # (P, G, F)
        rewarded = monotonic()
        answered = iter([self._answered(row, group) for row, group in zip(rows, groups, strict=True)])
        window = replace(window, batches=tuple(self.remade(batch, answered) for batch in window.batches))
        seconds = {"sample": sampled - began, "reward": rewarded - sampled}
        if self.measures:
            return self._measured(window, groups, scores)
        window, penalties = self.penalised(model, window)
        return self._with_advantages(window, rows, groups, scores, penalties, gather, seconds)

    def sampled(self, model: Any, window: Window, rows: Sequence[Row]) -> list[list[Completion]]:
        """The completions of each row; what is drawn depends on seed, step, row, completion and token alone."""
        settings, seen, seeds, prompts = self.settings, Counter[int](), list[int](), list[list[int]]()
        for row in rows:
            place = seen[row.number]  # a row may come twice in a step
            seen[row.number] += 1
            prompts += [row.parts["prompt"].tolist()] * len(self.sides)
            seeds += [
                seed_for("sample", window.seed, window.step, row.number, place, number)
                for number in range(len(self.sides))
            ]
        stops = find_stop_ids(model.base, self.tokenizer, self.template)
        drawn = Sampling(settings.temperature, settings.top_p, settings.top_k)
        found = model.generate(
            self.tokenizer,
            prompts,
            max_new_tokens=settings.max_completion_length,
            batch_size=settings.sampling_batch_size,
            stop_ids=stops,
            sampling=GREEDY if self.measures else drawn,
            seeds=None if self.measures else seeds,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
        every = [Completion(ids, ids[-1] in stops, text) for ids, text in zip(found, texts, strict=True)]
        size = len(self.sides)
        return [every[start : start + size] for start in range(0, len(every), size)]

    def _scored(
        self, model: Any, rows: Sequence[Row], groups: Sequence[Sequence[Completion]], gather: Gather, made_up: bool
    ) -> Scores:
        """(P, G, F) of each completion by each reward. An error of one rank is raised on all."""
        shape = (len(rows), len(self.sides), len(self.rewards.sources))
        if made_up:
            return np.tile(np.arange(shape[1], dtype=np.float64)[:, None], (shape[0], 1, shape[2]))
        told = [told_of(row) for row in rows]
        written = [
            Written(each["prompt"], each["columns"], completion.text)
            for each, group in zip(told, groups, strict=True)
            for completion in group
        ]
        error, scores = None, np.empty(shape)
        try:
            scores = self.rewards.score(written, model).reshape(shape)
        except RewardError as problem:
            error = problem
        failed = next((each for each in gather([error]) if each is not None), None)
        if failed is not None:
            raise failed
        return scores

    def _measured(self, window: Window, groups: Sequence[Sequence[Completion]], scores: Scores) -> Window:
        """Each row with the reward of its one completion."""
        found = iter(zip(self.rewards.summed(scores), groups, strict=True))  # (P, 1) and its completion

        def parts(batch: Batch) -> dict[str, NDArray[Any]]:
            mine = [next(found) for _ in batch.rows]
            ended = np.array([[group[0].ended] for _, group in mine])
            return {"rewards": np.stack([rewards for rewards, _ in mine]), "ended": ended}

        return self.with_all(window, [parts(batch) for batch in window.batches])

    def penalised(self, model: Any, window: Window) -> tuple[Window, Sequence[Scores] | None]:
        """Each completion's tokens with the reference's log-probabilities, where the loss compares with them; and what
        is taken off each completion's reward before it is compared with others, (P, G) of each batch; None: nothing."""
        if self.reference == "none":
            return window, None
        found = model.scored(window.batches, self.of_tokens, bypassed=True)
        return self.with_tokens(window, "reference", found), None

    def with_tokens(self, window: Window, name: str, found: Sequence[Tensor]) -> Window:
        """The window whose rows have a number of each predicted token. Shapes: found (N,) of each batch."""
        batches = []
        for batch, values in zip(window.batches, found, strict=True):
            parts = torch.split(values.float(), batch.targets["counts"].tolist())
            rows, count = [], len(batch.rows)
            for number, row in enumerate(batch.rows):
                mine = {f"{side}_{name}": parts[at * count + number].numpy() for at, side in enumerate(self.sides)}
                rows.append(replace(row, parts={**row.parts, **mine}))
            batches.append(self.remade(batch, iter(rows)))
        return replace(window, batches=tuple(batches))

    def of_tokens(self, output: ModelOutput, batch: Batch) -> Tensor:
        """(N,) log-probability of each predicted token, at the temperature of sampling."""
        return self.log_probabilities(output, batch)

    def log_probabilities(self, output: ModelOutput, batch: Batch, entropies: Tensor | None = None) -> Tensor:
        """(N,) of every predicted token; `entropies` (N,): filled with those of the distributions."""
        tempered = at_temperature(output, self.settings.temperature)
        return log_probabilities(tempered, batch.targets["index"], batch.targets["ids"], entropies)

    def _with_advantages(
        self,
        window: Window,
        rows: Sequence[Row],
        groups: Sequence[Sequence[Completion]],
        scores: Scores,
        penalties: Sequence[Scores] | None,
        gather: Gather,
        seconds: Mapping[str, float],
    ) -> Window:
        """Each row with the advantages of its completions and what their tokens count; the window with what is logged."""
        trained = [row.parts[f"{side}_trained"] for batch in window.batches for row in batch.rows for side in self.sides]
        counts = np.array([marks.sum() for marks in trained], np.float64).reshape(-1, len(self.sides))  # (P, G)
        lengths = np.array([[len(each.ids) for each in group] for group in groups]).reshape(counts.shape)
        ended = np.array([[each.ended for each in group] for group in groups], np.bool_).reshape(counts.shape)
        penalty = np.zeros(counts.shape) if penalties is None else np.concatenate([*penalties, np.empty((0, counts.shape[1]))])
        mine = zip(scores.tolist(), counts.tolist(), lengths.tolist(), ended.tolist(), penalty.tolist(), strict=True)
        every = [np.array(each) for each in zip(*gather(list(mine)), strict=True)]
        all_scores, all_counts, all_lengths, all_ended, all_penalties = every
        tokens = max(all_counts.sum(), 1.0) / all_counts.size
        own, step = self.rewards.summed(scores) - penalty, self.rewards.summed(all_scores) - all_penalties
        parts = {
            "advantages": np.nan_to_num(self.advantages(own, step), nan=0.0).astype(np.float32),
            "weights": self.token_weights(counts, tokens).astype(np.float32),
            "share": np.full((len(rows), 1), 1 / tokens, np.float32),
        }
        told = reward_metrics(self.rewards, all_scores, self.zero_spread(step)) | length_metrics(all_lengths, all_ended)
        samples = self._shown(rows, groups, scores, parts["advantages"])
        starts = np.cumsum([0, *(len(batch.rows) for batch in window.batches)]).tolist()
        cut = [{name: part[start:stop] for name, part in parts.items()} for start, stop in zip(starts, starts[1:], strict=False)]
        return replace(self.with_all(window, cut), preparation=Preparation(told, seconds, samples))

    def _shown(
        self, rows: Sequence[Row], groups: Sequence[Sequence[Completion]], scores: Scores, advantages: Scores
    ) -> list[dict[str, Any]]:
        """The first completions of the first rows, as a report shows them."""
        found = []
        for at, (row, group) in enumerate(zip(rows[:SHOWN_ROWS], groups, strict=False)):
            prompt = self.tokenizer.decode(row.parts["prompt"].tolist()) if hasattr(self.tokenizer, "decode") else ""
            for number, each in enumerate(group[:SHOWN_SAMPLES]):
                worth = dict(zip(self.rewards.names, map(_finite, scores[at, number].tolist()), strict=True))
                beside = {"answer": told_of(row)["columns"].get("answer"), "ended": each.ended, "rewards": worth}
                advantage = float(advantages[at, number])
                found.append({"prompt": prompt, "completion": each.text, **beside, "advantage": advantage})
        return found

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Of rows that are measured: loss (the reward, turned around), units, reward, lengths and how many did not end;
        rows whose completion cannot be judged are left out."""
        rewards = batch.targets["rewards"][:, 0]  # (P,) float64
        judged = ~rewards.isnan()
        lengths = batch.targets["counts"].double()  # (P,)
        found = {
            "reward": rewards,
            "completions_mean_length": lengths,
            "completions_clipped_ratio": 1.0 - batch.targets["ended"][:, 0].double(),
        }
        sums = {name: values[judged].sum() for name, values in found.items()}
        return {"loss": 0.0 - sums["reward"], "units": judged.sum().double(), **sums}


def told_of(row: Row) -> dict[str, Any]:
    """The prompt and the columns of a row, as rewards get them."""
    found: dict[str, Any] = json.loads(row.parts["said"].tobytes())
    return found


def _is_empty(model: Any) -> bool:
    """Whether a model has no values, so that it only stands for one."""
    return getattr(getattr(model, "device", None), "type", "") == "meta"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def spread(values: Scores, axis: int | None = None) -> Scores:
    """Standard deviation (n - 1) of what is not NaN; NaN of fewer than two numbers."""
    count = np.sum(~np.isnan(values), axis=axis)
    mean = np.nansum(values, axis=axis, keepdims=True) / np.maximum(np.sum(~np.isnan(values), axis=axis, keepdims=True), 1)
    squares = np.nansum((values - mean) ** 2, axis=axis)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def mean(values: Scores, axis: int | None = None) -> Scores:
    """Of what is not NaN; NaN of nothing."""
    count = np.sum(~np.isnan(values), axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def reward_metrics(rewards: Rewards, scores: Scores, equal: NDArray[np.bool_]) -> dict[str, float]:
    """Mean and spread of the reward, and of each of which it is the sum; the share of groups whose rewards are equal.

    Shapes: scores (A, G, F), equal (A,).
    """
    found = {"reward": rewards.summed(scores)}
    numbers = {name: function(found["reward"]) for name, function in (("reward", mean), ("reward_std", spread))}
    numbers["frac_reward_zero_std"] = equal.mean()
    for at, name in enumerate(rewards.names):
        numbers |= {f"rewards_{name}_mean": mean(scores[..., at]), f"rewards_{name}_std": spread(scores[..., at])}
    return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def length_metrics(lengths: NDArray[Any], ended: NDArray[np.bool_]) -> dict[str, float]:
    """Tokens of the step's completions, and the share of them that did not end. Shapes: (A, G) each."""
    complete = lengths[ended]
    return {
        "completions_mean_length": float(lengths.mean()),
        "completions_min_length": float(lengths.min()),
        "completions_max_length": float(lengths.max()),
        "completions_clipped_ratio": float(1 - ended.mean()),
        "completions_mean_terminated_length": float(complete.mean()) if len(complete) else 0.0,
    }
