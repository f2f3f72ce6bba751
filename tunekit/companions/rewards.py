"""The rewards of a recipe: functions, regular expressions, columns and reward models that score completions.

A user's function is called as in TRL, and its result is checked. A reward of NaN means that the completion has no
reward.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from tunekit.companions.reward_code import UserFunction, code_content, error_line
from tunekit.companions.reward_model import load_scorer, reward_model_content, weight_bytes
from tunekit.console import visible
from tunekit.contracts import CompanionSpec, PlanContext, Rows, RunView
from tunekit.errors import Problem, RewardError
from tunekit.files.patterns import Match, compile_expression
from tunekit.machine.signals import TimeUp, time_limit
from tunekit.objectives.losses.advantages import Rewards, weighted_sum
from tunekit.objectives.losses.samples import Rewarder
from tunekit.objectives.rows.prompts import Completion, read_context
from tunekit.recipe.bases.sample_settings import RewardSource, SampleSettings, reward_names

TRAINING_SECONDS = 120.0  # limit of one call, if the recipe sets none
SHORTEST = 1e-3  # minimum time for a search, in seconds
RewardFunction = Callable[[Sequence[Completion]], Sequence[Any]]
MatchSearch = Callable[[Sequence[Completion]], Iterable[Match | None]]


class RewardFunctions(Rewarder):
    """All rewards of a recipe, in the recipe's order."""

    def __init__(self, spec: CompanionSpec) -> None:
        super().__init__(spec)
        assert isinstance(spec.settings, SampleSettings)
        self.sources: Sequence[RewardSource] = spec.settings.reward
        self.names = reward_names(self.sources)  # names in logs
        self.limit_seconds = TRAINING_SECONDS  # for rewards without a limit in the recipe
        self._functions: list[RewardFunction] = []

    def examine(self, planned: PlanContext) -> list[Problem]:
        """Find the size of the reward models' weights. Returns problems for columns that rewards need and no row has,
        unless rows are streamed."""
        models = [source for source in self.sources if source.model is not None]
        self.weight_bytes, problems = sum(weight_bytes(source, planned.device) for source in models), list[Problem]()
        for number, source in enumerate(self.sources):
            column = source.exact_match
            if column is None or planned.streams or any(_have(rows, column) for rows in planned.rows):
                continue
            columns = read_context(planned.rows[0][0])["columns"]
            names = ", ".join(name for name, value in columns.items() if value is not None)
            key = f"{self.key}.{number}.exact_match"
            how = f"the first row has: {names or 'none'}"
            problems.append(Problem(f"no row has the column '{column}'", how, key=key))
        return problems

    def fingerprint(self) -> Mapping[str, str]:
        """The sha256 of each function's code and of each reward model's files. Raises: RewardError."""
        return {
            f"{self.key}.{number}.{source.kind}": sha256(content).hexdigest()
            for number, source in enumerate(self.sources)
            if (content := _content_of(source)) is not None
        }

    def load(self, device: torch.device) -> None:
        """Load every function and every reward model. Raises: RewardError; RecipeError for a folder that contains no
        reward model."""
        self._functions = [self._function(number, device) for number in range(len(self.sources))]

    def begin(self, run: RunView, rows: Sequence[Rows]) -> Mapping[str, str]:
        """The sha256 of modules that each reward function's file loaded from its folder without an import statement."""
        return {
            f"{self.key}.{number}.function": sha256(content).hexdigest()
            for number, function in enumerate(self._functions)
            if isinstance(function, UserFunction) and (content := function.unnamed_modules())
        }

    @property
    def reads_ids(self) -> bool:
        """Whether a loaded function takes completion_ids."""
        functions = [function for function in self._functions if isinstance(function, UserFunction)]
        return any(function.takes_all or "completion_ids" in function.parameters for function in functions)

    def _function(self, number: int, device: torch.device) -> RewardFunction:
        source = self.sources[number]
        if source.model is not None:
            return load_scorer(source, f"{self.key}.{number}.model", device)
        if source.regex is not None:
            search = self._search(number, "regex", source.regex)
            return lambda completions: [float(match is not None) for match in search(completions)]
        if source.exact_match is None:
            return UserFunction(source)
        extracted = None if source.extract is None else self._search(number, "extract", source.extract)
        return partial(_exact_match, source.exact_match, extracted)

    def _search(self, number: int, name: str, text: str) -> MatchSearch:
        """A function that finds the first match of a regular expression in each completion, within a limit of processor
        time.

        Raises: RewardError for an expression that is too large or too slow; if too slow, the error names the row.
        """
        try:
            pattern = compile_expression(text)
        except ValueError as error:
            raise RewardError(str(error), "write a simpler expression", key=f"{self.key}.{number}.{name}") from None

        def search(completions: Sequence[Completion]) -> Iterator[Match | None]:
            end = time.process_time() + self.limit(number)
            for completion in completions:
                try:
                    yield pattern.search(completion.text, timeout=max(end - time.process_time(), SHORTEST))
                except TimeoutError:
                    raise self._late(number, [completion]) from None

        return search

    def limit(self, number: int) -> float:
        """The time limit in seconds of one call of a reward."""
        return self.sources[number].limit_seconds or self.limit_seconds

    def _call(self, number: int, completions: Sequence[Completion]) -> Any:
        """Call a reward. Raises: RewardError if the function takes too long; the error names the row."""
        if self.sources[number].kind != "function":
            return self._functions[number](completions)
        try:
            with time_limit(self.limit(number)):
                return self._functions[number](completions)
        except TimeUp:
            raise self._late(number, self._hanging(number, completions)) from None

    def _hanging(self, number: int, completions: Sequence[Completion]) -> Sequence[Completion]:
        """The first completion for which the function alone is too slow. All completions, if no such completion is
        found within the time limit."""
        limit, start = self.limit(number), time.monotonic()
        for completion in completions:
            try:
                with time_limit(limit / 4), suppress(Exception, SystemExit):
                    self._functions[number]([completion])
            except TimeUp:
                return [completion]
            if time.monotonic() - start > limit:
                break
        return completions

    def _late(self, number: int, completions: Sequence[Completion]) -> RewardError:
        first = completions[0]
        row = first.origin or f"the prompt {visible(str(first.prompt))[:80]!r}"
        which = f"a completion of {row}" if len(completions) == 1 else f"{len(completions)} completions from {row} on"
        what = f"{name_of(self.sources[number])} took more than {self.limit(number):g} s for {which}"
        return RewardError(what, f"make the reward faster, or raise {self.key}.{number}.limit_seconds")

    def score(self, completions: Sequence[Completion]) -> Rewards:
        """The rewards (N, F): each of N completions, scored by each of F reward functions. Raises: RewardError for an
        invalid result."""
        columns = [self.scored_by(number, completions, may_be_silent=True) for number in range(len(self.sources))]
        return np.stack(columns, axis=1) if completions else np.empty((0, len(self.sources)), np.float64)

    def scored_by(self, number: int, completions: Sequence[Completion], *, may_be_silent: bool = False) -> Rewards:
        """The rewards of all completions by one function, shape (N,).

        Raises: RewardError for an invalid result, or if every reward is None or NaN. With `may_be_silent` the second
        case is allowed, because the function may score only other rows.
        """
        name = name_of(self.sources[number])
        try:
            result = self._call(number, completions)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{name} raised {error_line(error, self.sources[number].code_file)}"
            raise RewardError(what, "correct the reward, then test it with `tunekit reward check`") from error
        rewards = _check_rewards(result, len(completions), name)
        if completions and not may_be_silent and np.isnan(rewards).all():
            raise self.no_rewards(number, completions)
        return rewards

    def weighted(self, scores: Rewards) -> Rewards:
        """The sums of rewards, weighted by function. Shapes: (..., F) -> (...)."""
        return weighted_sum(scores, [source.weight for source in self.sources])

    def no_rewards(self, number: int, completions: Sequence[Completion]) -> RewardError:
        """The error for a function that scores none of the completions."""
        name, column = name_of(self.sources[number]), self.sources[number].exact_match
        if column is not None and all(completion.columns.get(column) is None for completion in completions):
            names = (
                ", ".join(dict.fromkeys(name for completion in completions for name in completion.columns)) or "none"
            )
            return RewardError(
                f"no row has the column '{column}' that is needed by {name}", f"the columns are: {names}"
            )
        steps = f" in each of the last {self.silent_steps} steps" if self.silent_steps > 1 else ""
        return RewardError(
            f"{name} returned None or NaN for all {len(completions):,} completions{steps}",
            "return None only for completions that the function cannot judge, and numbers for all others",
        )


def _have(rows: Rows, column: str) -> bool:
    return any(read_context(rows[number])["columns"].get(column) is not None for number in range(len(rows)))


def name_of(source: RewardSource) -> str:
    """The reward's name in errors."""
    if source.kind == "function":
        return f"{source.code_file}: {source.function_name}"
    return f"the reward {source.kind}: {getattr(source, source.kind)}"


def _check_rewards(result: Any, count: int, name: str) -> Rewards:
    """The rewards as an array (N,). Raises: RewardError if the result is not a list with one number per completion."""
    how = "return a list with a number, or None, for each completion"
    if result is None:
        raise RewardError(f"{name} returned None", how)
    try:
        values = list(result) if not isinstance(result, Mapping | Set | str | bytes) else None
    except TypeError:
        values = None
    if values is None:
        raise RewardError(f"{name} returned {_printable(result)}, which is not a list", how)
    if len(values) != count:
        raise RewardError(f"{name} returned {len(values):,} rewards for {count:,} completions", how)
    return np.array([_number(value, name) for value in values], np.float64)


def _number(value: Any, name: str) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor with several numbers
        number = None
    if number is None or math.isinf(number):
        raise RewardError(f"{name} returned {_printable(value)} for a completion", "return a finite number, or None")
    return number


def _printable(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _content_of(source: RewardSource) -> bytes | None:
    """The content that a reward depends on besides the recipe: the function's code, or the reward model's files."""
    if source.kind == "function":
        return code_content(source)
    return None if source.model is None else reward_model_content(source)


def _exact_match(column: str, extracted: MatchSearch | None, completions: Sequence[Completion]) -> list[float | None]:
    """For each completion: 1 if its text equals the row's value in a column, else 0; None if the row has no value
    there."""
    comparable = [completion for completion in completions if completion.columns.get(column) is not None]
    texts = [completion.text for completion in comparable]
    if extracted is not None:
        texts = [
            "" if match is None else str(match.group(min(match.re.groups, 1)) or "") for match in extracted(comparable)
        ]
    equal = iter(
        [
            text.strip() == str(completion.columns[column]).strip()
            for text, completion in zip(texts, comparable, strict=True)
        ]
    )
    return [None if completion.columns.get(column) is None else float(next(equal)) for completion in completions]


make = RewardFunctions  # companions.base calls it with a CompanionSpec
