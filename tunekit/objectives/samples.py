"""What objectives over the model's own samples share: steps of completions with their rewards.

Comes in: windows of prompts.  Goes out: windows in which each prompt has its group of completions with an advantage
each; sums of what they were worth where nothing is learnt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    AT_STEP_0,
    GREEDY,
    Batch,
    Gather,
    ModelOutput,
    Row,
    Sampling,
    Sums,
    Tokenizer,
    Window,
)
from tunekit.errors import RewardError
from tunekit.model.call import seed_for
from tunekit.model.text.generation import find_stop_ids
from tunekit.objectives.losses.logprobs import at_temperature, log_probabilities
from tunekit.objectives.prompts import Completion, PromptObjective, told_of
from tunekit.objectives.rewards import Rewards, Scores, Written
from tunekit.objectives.worth import length_metrics, reward_metrics, spread
from tunekit.recipe.bases.sample_settings import REWARDED, SampleSettings
from tunekit.records import Preparation

SHOWN_ROWS, SHOWN_SAMPLES = 2, 4  # of a step, in the report


class SampleObjective(PromptObjective):
    """loss = sum over completions of what a subclass makes of their tokens; divided by how many the step has.

    Completions are drawn in `prepare`, from hash(seed, step, row, completion); their advantages are made of the rewards
    of the whole step, over all ranks. Where steps repeat, those after the first learn from the same completions.
    """

    metrics: Sequence[str] = ("loss", *REWARDED)

    def __init__(self, settings: SampleSettings, tokenizer: Tokenizer) -> None:
        super().__init__(settings, tokenizer)
        self.rewards, self.repeats = Rewards(settings.reward), settings.num_iterations
        self.reference = AT_STEP_0 if settings.beta else "none"
        self._kept: Window | None = None  # that the steps after it repeat

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

    def prepare(self, model: Any, window: Window, gather: Gather = list) -> Window:
        """Each prompt with its completions, and what the loss needs of them.

        Nothing is sampled without values, nor in a step that is only tried: there completions have their full length,
        and no reward is asked.
        Raises: RewardError on every rank where one of them had a reward without a sensible result.
        """
        made_up = window.step < 0 or _is_empty(model)
        if not (made_up or self.measures) and window.step % self.repeats:
            return self._repeated(window)
        rows, began = [row for batch in window.batches for row in batch.rows], monotonic()
        groups = [self.longest(row) for row in rows] if made_up else self.sampled(model, window, rows)
        sampled = monotonic()
        begins = window.step == 0 and not self.measures
        scores = self._scored(model, rows, groups, gather, made_up, begins)  # (P, G, F)
        seconds = {"sample": sampled - began, "reward": monotonic() - sampled}
        answered = iter([self.answered(row, group) for row, group in zip(rows, groups, strict=True)])
        window = replace(window, batches=tuple(self.remade(batch, answered) for batch in window.batches))
        if self.measures:
            return self._measured(window, groups, scores)
        if self.repeats > 1:
            window = self.with_tokens(window, "old", model.scored(window.batches, self.of_tokens))
        window, penalties = self.penalised(model, window)
        window, told = self._with_advantages(window, groups, scores, penalties, gather)
        samples = self._shown(rows, groups, scores, window)
        self._kept = None if made_up else replace(window, preparation=Preparation(told, {}, samples))
        return replace(window, preparation=Preparation(told, seconds, samples))

    def _repeated(self, window: Window) -> Window:
        """The completions of the step before again. A run is resumed only where new ones are sampled."""
        kept = self._kept
        assert kept is not None
        return replace(window, batches=kept.batches, preparation=kept.preparation)

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
        self,
        model: Any,
        rows: Sequence[Row],
        groups: Sequence[Sequence[Completion]],
        gather: Gather,
        made_up: bool,
        begins: bool,
    ) -> Scores:
        """(P, G, F) of each completion by each reward. An error of one rank is raised on all.

        A later step may have only rows that nothing can be said of; where a run begins so, its rewards are wrong.
        """
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
        if begins and all(gather([bool(np.isnan(scores).all())])):
            raise self.rewards.silence(0, written)
        return scores

    def _measured(self, window: Window, groups: Sequence[Sequence[Completion]], scores: Scores) -> Window:
        """Each row with the reward of its one completion."""
        found = iter(zip(self.rewards.summed(scores), groups, strict=True))  # (P, 1) and its completion

        def parts(batch: Batch) -> dict[str, NDArray[Any]]:
            mine = [next(found) for _ in batch.rows]
            ended = np.array([[group[0].ended] for _, group in mine])
            lengths = np.array([[len(group[0].ids)] for _, group in mine])
            return {"rewards": np.stack([rewards for rewards, _ in mine]), "ended": ended, "lengths": lengths}

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
        groups: Sequence[Sequence[Completion]],
        scores: Scores,
        penalties: Sequence[Scores] | None,
        gather: Gather,
    ) -> tuple[Window, dict[str, float]]:
        """Each row with its completions' advantages and what their tokens count; and what is logged of the step."""
        shape = (-1, len(self.sides))
        marks = [row.parts[f"{side}_trained"] for batch in window.batches for row in batch.rows for side in self.sides]
        counts = np.array([each.sum() for each in marks], np.float64).reshape(shape)  # (P, G)
        lengths = np.array([len(each.ids) for group in groups for each in group], np.int64).reshape(shape)
        ended = np.array([each.ended for group in groups for each in group], np.bool_).reshape(shape)
        penalty = np.concatenate([np.empty((0, shape[1])), *(penalties or [np.zeros_like(counts)])])
        mine = [each.tolist() for each in (scores, counts, lengths, ended, penalty)]
        step = [np.array(each) for each in zip(*gather(list(zip(*mine, strict=True))), strict=True)]  # (A, G) each
        tokens = max(step[1].sum(), 1.0) / step[1].size
        worth = self.rewards.summed(step[0]) - step[4]
        parts = {
            "advantages": np.nan_to_num(self.advantages(self.rewards.summed(scores) - penalty, worth)),
            "weights": self.token_weights(counts, tokens),
            "share": np.full((len(counts), 1), 1 / tokens),
        }
        starts = np.cumsum([0, *(len(batch.rows) for batch in window.batches)]).tolist()
        cut = [{name: part[a:b].astype(np.float32) for name, part in parts.items()} for a, b in pairwise(starts)]
        told = reward_metrics(self.rewards, step[0], self.zero_spread(worth)) | length_metrics(step[2], step[3])
        return self.with_all(window, cut), told

    def _shown(
        self, rows: Sequence[Row], groups: Sequence[Sequence[Completion]], scores: Scores, window: Window
    ) -> list[dict[str, Any]]:
        """The first completions of the first rows, as a report shows them."""
        learnt = [row for batch in window.batches for row in batch.rows]
        found = []
        for at, (row, group) in enumerate(zip(rows[:SHOWN_ROWS], groups, strict=False)):
            prompt, answer = self.tokenizer.decode(row.parts["prompt"].tolist()), told_of(row)["columns"].get("answer")
            for number, each in enumerate(group[:SHOWN_SAMPLES]):
                worth = dict(zip(self.rewards.names, map(_finite, scores[at, number].tolist()), strict=True))
                said = {"prompt": prompt, "completion": each.text, "answer": answer, "ended": each.ended}
                advantage = float(learnt[at].parts["advantages"][number])
                found.append({**said, "rewards": worth, "advantage": advantage})
        return found

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Of rows that are measured: loss (the reward, turned around), units, reward, lengths and how many did not end;
        rows whose completion cannot be judged are left out."""
        rewards = batch.targets["rewards"][:, 0]  # (P,) float64
        judged = ~rewards.isnan()
        lengths = batch.targets["lengths"][:, 0].double()  # (P,); of those that are masked, too
        found = {
            "reward": rewards,
            "completions_mean_length": lengths,
            "completions_clipped_ratio": 1.0 - batch.targets["ended"][:, 0].double(),
        }
        sums = {name: values[judged].sum() for name, values in found.items()}
        return {"loss": 0.0 - sums["reward"], "units": judged.sum().double(), **sums}


def _is_empty(model: Any) -> bool:
    """Whether a model has no values, so that it only stands for one."""
    return getattr(getattr(model, "device", None), "type", "") == "meta"


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
