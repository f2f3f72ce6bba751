"""The base class of losses on the model's own completions. Completions are sampled and scored by reward functions, then
used for training or evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import monotonic
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tunekit.contracts import (
    GREEDY,
    Array,
    Batch,
    Companion,
    CompanionSpec,
    EncodeOptions,
    LossKind,
    ModelOutput,
    Objective,
    Row,
    RunView,
    Sampling,
    StepBatches,
    Sums,
    Tokenizer,
)
from tunekit.errors import RewardError
from tunekit.files.cache_folder import hash_of
from tunekit.model.call import seed_for
from tunekit.objectives.losses.advantages import (
    CLIPPED,
    Rewards,
    length_metrics,
    reward_metrics,
    teaches_nothing,
    weighted_sum,
)
from tunekit.objectives.losses.answers import predicted
from tunekit.objectives.rows.answers import AnswerRows
from tunekit.objectives.rows.prompts import Completion, PromptRows, Sample, completions_of, read_context
from tunekit.objectives.rows.text import text_answering
from tunekit.recipe.bases.sample_settings import REWARDED, SILENT_STEPS, SampleSettings, reward_names
from tunekit.records import Preparation

SHOWN_ROWS, SHOWN_SAMPLES = 2, 4  # rows of a step, and samples of a row, in the report


class Sampler(Companion):
    """The companion that plans the memory for sampling: `sampling_batch_size` completions fit in parallel."""


class Rewarder(Companion):
    """The companion that computes rewards. `silent_steps`: the number of consecutive steps, up to now, in which no
    completion got a reward."""

    silent_steps = 0

    def score(self, completions: Sequence[Completion]) -> Rewards:
        """The rewards (N, F): each of N completions, scored by each of F reward functions. Raises: RewardError for an
        invalid result."""
        raise NotImplementedError

    def no_rewards(self, number: int, completions: Sequence[Completion]) -> RewardError:
        """The error for a function that scores none of the completions. `number`: the function's place in the
        recipe."""
        raise NotImplementedError


@dataclass(frozen=True)
class SampledLoss(LossKind):
    """Turns rewards into advantages, and advantages into a loss, divided by the step's number of completions.
    Subclasses define `loss`.

    `prepare_step` samples the completions with the seed hash(seed, step, row, completion), and computes advantages from
    the rewards of the whole step on all ranks. If several steps reuse samples, they learn from the same completions.

    `measures`: the loss is for evaluation, with one greedy completion of each row.
    """

    settings: SampleSettings
    tokenizer: Tokenizer
    logged: Sequence[str]
    reference: bool
    updates_per_sampling: int
    measures: bool = False
    metrics: Sequence[str] = ("loss", *REWARDED)
    without_reference = "objective.beta: 0, which needs no reference model"

    @classmethod
    def of(cls, settings: SampleSettings, tokenizer: Tokenizer, clipped: Sequence[str] = CLIPPED) -> Self:
        """Make the loss from a recipe's settings. `clipped`: the names under which shares of clipped ratios are
        logged."""
        logged = (*(["kl"] if settings.beta else []), "entropy", *clipped)
        return cls(settings, tokenizer, logged, settings.beta > 0, settings.num_iterations)

    def evaluation_copy(self) -> Self:
        """A copy of the loss for evaluation, with one greedy completion of each prompt."""
        return replace(self, measures=True)

    def advantages(self, local: Rewards, step: Rewards) -> Rewards:
        """The advantages of this rank's completions; NaN where there is no reward. `step`: the rewards of all ranks.
        Shapes: local (P, G), step (A, G) -> (P, G), for P prompts of this rank, A prompts of all ranks, and G
        completions of each."""
        raise NotImplementedError

    def equal_groups(self, step: Rewards) -> NDArray[np.bool_]:
        """Whether each group, shape (A,), has zero advantages, because its rewards are equal or missing."""
        return teaches_nothing(step, axis=1)

    def token_weights(self, counts: Rewards, tokens: float) -> Rewards:
        """The weight in the loss of each token of a completion. Shapes: counts (P, G) -> (P, G).
        `counts`: the number of trained tokens of each completion; `tokens`: the mean of all counts in the step."""
        return np.ones_like(counts)

    def compared(self, run: RunView, step: StepBatches) -> tuple[StepBatches, Sequence[Rewards] | None]:
        """Add the scores of the reference (the model at step 0) to the step's rows. Also return a penalty (P, G) for
        each batch, which is subtracted from the rewards, or None. Called only if the loss has a KL."""
        raise NotImplementedError

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Sample completions of the step's prompts, and add them with all values that the loss needs.

        A simulated or dry-run step does not sample. It uses completions of the maximum length, and calls no rewards.
        Raises: RewardError on every rank if a reward function fails on one rank.
        """
        kind, dry = prompt_rows(run), step.is_dry_run or run.is_simulated
        if not (dry or self.measures) and step.step % self.updates_per_sampling:
            assert earlier is not None  # a run resumes only at a step that samples
            # A calibration may shorten its last step.
            batches = earlier.batches[: len(step.batches)]
            return replace(step, batches=batches, preparation=replace(earlier.preparation, seconds={}))
        rows, start = [row for batch in step.batches for row in batch.rows], monotonic()
        groups = [kind.longest_samples(row) for row in rows] if dry else self.sampled(run, step, rows)
        sampled = monotonic()
        starts_run = step.step == 0 and not self.measures
        scores = self._scored(run, rows, groups, dry=dry, starts_run=starts_run)  # (P, G, F)
        seconds = {"sample": sampled - start, "reward": monotonic() - sampled}
        completed = iter([kind.completed(row, group) for row, group in zip(rows, groups, strict=True)])
        step = replace(step, batches=tuple(kind.with_rows(batch, completed) for batch in step.batches))
        if self.measures:
            return self._measured(run, step, groups, scores)
        if self.updates_per_sampling > 1:
            step = kind.with_tokens(step, "old", run.score(step.batches, self.token_scores, token_counts))
        step, penalties = self.compared(run, step) if self.reference else (step, None)
        step, metrics = self._with_advantages(run, step, groups, scores, penalties)
        samples = self._shown(rows, groups, scores, step)
        return replace(step, preparation=Preparation(metrics, seconds, samples))

    def sampled(self, run: RunView, step: StepBatches, rows: Sequence[Row]) -> list[list[Sample]]:
        """The completions of each row. Random numbers depend only on seed, step, row, completion and token."""
        kind, settings = prompt_rows(run), self.settings
        size = len(kind.answers.sides)
        prompts = [row.parts["prompt"].tolist() for row in rows for _ in range(size)]
        keys = [("sample", step.seed, step.step, row.number, row.occurrence) for row in rows]
        seeds = [seed_for(*key, number) for key in keys for number in range(size)]
        stops = run.model.stop_ids(self.tokenizer, kind.options.template)
        drawn = Sampling(settings.temperature, settings.top_p, settings.top_k)
        completions = run.generate(
            self.tokenizer,
            prompts,
            max_new_tokens=settings.max_completion_length,
            batch_size=run.companion(Sampler).sampling_batch_size,
            stop_ids=stops,
            sampling=GREEDY if self.measures else drawn,
            seeds=None if self.measures else seeds,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        samples = [Sample(ids, ids[-1] in stops, text) for ids, text in zip(completions, texts, strict=True)]
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def _scored(
        self, run: RunView, rows: Sequence[Row], groups: Sequence[Sequence[Sample]], *, dry: bool, starts_run: bool
    ) -> Rewards:
        """The reward of each completion by each reward function, shape (P, G, F). An error on one rank is raised on all
        ranks.
        Raises: RewardError if no completion has a reward in the first step, or in SILENT_STEPS consecutive steps."""
        shape = (len(rows), len(prompt_rows(run).answers.sides), len(self.settings.reward))
        if dry:
            return np.tile(np.arange(shape[1], dtype=np.float64)[:, None], (shape[0], 1, shape[2]))
        completions, error, scores = completions_of(rows, groups), None, np.empty(shape)
        try:
            scores = run.companion(Rewarder).score(completions).reshape(shape)
        except RewardError as problem:
            error = problem
        failed = next((problem for problem in run.gather([error]) if problem is not None), None)
        if failed is not None:
            raise failed
        if not self.measures:
            rewards, silent = run.companion(Rewarder), all(run.gather([bool(np.isnan(scores).all())]))
            rewards.silent_steps = rewards.silent_steps + 1 if silent else 0
            if silent and (starts_run or rewards.silent_steps == SILENT_STEPS):
                raise rewards.no_rewards(0, completions)
        return scores

    def _summed(self, scores: Rewards) -> Rewards:
        """Sums of rewards, weighted by reward function. Shapes: (..., F) -> (...)."""
        return weighted_sum(scores, [source.weight for source in self.settings.reward])

    def _measured(
        self, run: RunView, step: StepBatches, groups: Sequence[Sequence[Sample]], scores: Rewards
    ) -> StepBatches:
        """Add values for evaluation to each row: the reward and the length of its single completion."""
        rewarded = iter(zip(self._summed(scores), groups, strict=True))  # (P, 1) and its completion

        def parts(batch: Batch) -> dict[str, Array]:
            local = [next(rewarded) for _ in batch.rows]
            ended = np.array([[group[0].ended] for _, group in local])
            lengths = np.array([[len(group[0].ids)] for _, group in local])
            return {"rewards": np.stack([rewards for rewards, _ in local]), "ended": ended, "lengths": lengths}

        return run.rows.with_parts(step, [parts(batch) for batch in step.batches])

    def token_scores(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The log-probability of each predicted token at the sampling temperature, shape (N,)."""
        return predicted(output, batch, self.settings.temperature)

    def _with_advantages(
        self,
        run: RunView,
        step: StepBatches,
        groups: Sequence[Sequence[Sample]],
        scores: Rewards,
        penalties: Sequence[Rewards] | None,
    ) -> tuple[StepBatches, dict[str, float]]:
        """Add the advantages and token weights of its completions to each row of the step. Also return the metrics of
        the step."""
        sides = prompt_rows(run).answers.sides
        shape = (-1, len(sides))
        marks = [row.parts[f"{side}_trained"] for batch in step.batches for row in batch.rows for side in sides]
        counts = np.array([trained.sum() for trained in marks], np.float64).reshape(shape)  # (P, G)
        lengths = np.array([len(sample.ids) for group in groups for sample in group], np.int64).reshape(shape)
        ended = np.array([sample.ended for group in groups for sample in group], np.bool_).reshape(shape)
        penalty = np.concatenate([np.empty((0, shape[1])), *(penalties or [np.zeros_like(counts)])])
        local = [values.tolist() for values in (scores, counts, lengths, ended, penalty)]
        gathered = zip(*run.gather(list(zip(*local, strict=True))), strict=True)
        of_ranks = [np.array(values) for values in gathered]  # (A, G)
        tokens = max(of_ranks[1].sum(), 1.0) / of_ranks[1].size
        total = self._summed(of_ranks[0])
        rewards = total - of_ranks[4]
        parts = {
            "advantages": np.nan_to_num(self.advantages(self._summed(scores) - penalty, rewards)),
            "weights": self.token_weights(counts, tokens),
            "share": np.full((len(counts), 1), 1 / tokens),
        }
        starts = np.cumsum([0, *(len(batch.rows) for batch in step.batches)]).tolist()
        cut = [{name: part[a:b].astype(np.float32) for name, part in parts.items()} for a, b in pairwise(starts)]
        equal = self.equal_groups(rewards)
        metrics = reward_metrics(reward_names(self.settings.reward), of_ranks[0], total, equal)
        return run.rows.with_parts(step, cut), metrics | length_metrics(of_ranks[2], of_ranks[3])

    def _shown(
        self, rows: Sequence[Row], groups: Sequence[Sequence[Sample]], scores: Rewards, step: StepBatches
    ) -> list[dict[str, Any]]:
        """The first completions of the step's first rows, for the report."""
        learnt, names = [row for batch in step.batches for row in batch.rows], reward_names(self.settings.reward)
        samples = []
        for at, (row, group) in enumerate(zip(rows[:SHOWN_ROWS], groups, strict=False)):
            prompt = self.tokenizer.decode(row.parts["prompt"].tolist())
            answer = read_context(row)["columns"].get("answer")
            for number, sample in enumerate(group[:SHOWN_SAMPLES]):
                rewards = dict(zip(names, map(_finite, scores[at, number].tolist()), strict=True))
                texts = {"prompt": prompt, "completion": sample.text, "answer": answer, "ended": sample.ended}
                advantage = float(learnt[at].parts["advantages"][number])
                samples.append({**texts, "rewards": rewards, "advantage": advantage})
        return samples

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Sums for evaluation: loss (minus the reward), units, reward, length, and the number of completions without
        a stop token. Rows without a reward are left out."""
        rewards = batch.targets["rewards"][:, 0]  # (P,) float64
        judged = ~rewards.isnan()
        lengths = batch.targets["lengths"][:, 0].double()  # (P,); masked completions too
        columns = {
            "reward": rewards,
            "completions_mean_length": lengths,
            "completions_clipped_ratio": 1.0 - batch.targets["ended"][:, 0].double(),
        }
        sums = {name: values[judged].sum() for name, values in columns.items()}
        return {"loss": 0.0 - sums["reward"], "units": judged.sum().double(), **sums}


def sampled_objective(loss: SampledLoss, options: EncodeOptions) -> Objective:
    """Make the objective: rows are prompts, the loss is `loss`, and companions sample completions and compute
    rewards."""
    settings, tokenizer = loss.settings, loss.tokenizer
    count, longest = settings.num_generations, settings.max_completion_length
    rows = PromptRows(
        tokenizer,
        hash_of([settings.method, count, longest, settings.unusable_rows, tokenizer.fingerprint]),
        options,
        answers=AnswerRows(tokenizer, "", example="prompt", sides=tuple(map(str, range(count)))),
        count=count,
        longest=longest,
        unusable=settings.unusable_rows,
        masks_truncated=settings.mask_truncated_completions,
    )
    return Objective(
        settings.method,
        settings.family,
        rows,
        loss,
        text_answering(tokenizer),
        (
            CompanionSpec("rewards", "objective.reward", settings),
            CompanionSpec("sampling", "objective.sampling", settings),
        ),
        notes=(f"batches are planned for {count} completions of {longest:,} tokens (the maximum) for each prompt",),
    )


def token_counts(batch: Batch) -> list[int]:
    """The number of predicted tokens of each sequence."""
    return batch.targets["counts"].tolist()


def prompt_rows(run: RunView) -> PromptRows:
    """The run's rows, which are prompts."""
    assert isinstance(run.rows, PromptRows)
    return run.rows


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
