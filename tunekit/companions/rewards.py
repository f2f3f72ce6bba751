"""What completions are worth: prompts, completions and the columns of their rows go in, a number of each reward for
each completion comes out; NaN where a reward says nothing of one.

A function of the user's is called as TRL calls it; what it gives back is checked before anything is made of it.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunekit.errors import RewardError
from tunekit.files.untrusted import MODEL_FILE, sha256_of
from tunekit.recipe.bases.sample_settings import RewardSource, reward_names

KEPT_BACK = ("prompt", "completion", "completion_ids")  # columns that a function does not get under these names
Scores = NDArray[np.float64]
Score = Callable[[Sequence[Any], Sequence[Any], Mapping[str, Sequence[Any]]], Sequence[Any]]


@dataclass(frozen=True)
class Written:
    """A completion beside its row: the prompt as it was written, a text or messages; the row's columns; the text."""

    prompt: Any
    columns: Mapping[str, Any]
    text: str

    @property
    def completion(self) -> Any:
        """As the prompt is written: a text, or a list of one message."""
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class Rewards:
    """All rewards of a recipe."""

    sources: Sequence[RewardSource]

    @cached_property
    def names(self) -> list[str]:
        """What each is called in what is logged."""
        return reward_names(self.sources)

    @cached_property
    def weights(self) -> Scores:
        """(F,) of each in the sum."""
        return np.array([source.weight for source in self.sources], np.float64)

    @property
    def code(self) -> dict[str, str]:
        """sha256 of each function's file and each model's weights, by the recipe's key. Raises: RewardError."""
        return {
            f"objective.reward.{number}.{source.kind}": sha256(content).hexdigest()
            for number, source in enumerate(self.sources)
            if (content := _content_of(source)) is not None
        }

    @cached_property
    def _functions(self) -> list[Callable[[Sequence[Written], Any], Sequence[Any]]]:
        makers = {"function": _user_function, "regex": _regex, "exact_match": _exact_match, "model": _reward_model}
        return [makers[source.kind](source) for source in self.sources]

    def check(self) -> None:
        """Load every function. Raises: RewardError."""
        assert self._functions

    def score(self, written: Sequence[Written], model: Any) -> Scores:
        """(N, F) of each completion by each reward, which may be silent. Raises: RewardError for a wrong result."""
        found = [self.scored_by(number, written, model, may_be_silent=True) for number in range(len(self.sources))]
        return np.stack(found, axis=1) if written else np.empty((0, len(self.sources)), np.float64)

    def scored_by(self, number: int, written: Sequence[Written], model: Any, *, may_be_silent: bool = False) -> Scores:
        """(N,) of each completion by one reward.

        Raises: RewardError for a wrong result, and where none is judged unless it `may_be_silent`: it may be meant for
            other rows than these.
        """
        name = said(self.sources[number])
        try:
            found = self._functions[number](written, model)
            found = list(found) if isinstance(found, Iterator) else found  # a generator's own errors are its function's
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"{name} raised {_line(error, self.sources[number].code_file)}",
                "mend it; `tunekit reward check` tries it",
            ) from error
        scores = _checked(found, len(written), name)
        if written and not may_be_silent and np.isnan(scores).all():
            raise self.silence(number, written)
        return scores

    def silence(self, number: int, written: Sequence[Written]) -> RewardError:
        """What is wrong where a reward judges none of the completions."""
        name, column = said(self.sources[number]), self.sources[number].exact_match
        if column is not None and all(each.columns.get(column) is None for each in written):
            there = ", ".join(dict.fromkeys(name for each in written for name in each.columns)) or "none"
            return RewardError(f"no row has the column '{column}' of {name}", f"the columns are: {there}")
        return RewardError(
            f"{name} returned None or NaN for each of {len(written):,} completions",
            "None is for single completions that cannot be judged: return numbers for the others",
        )

    def summed(self, scores: Scores) -> Scores:
        """Weighted sums over rewards, those that say nothing left out; NaN where none says anything.

        Shapes: (..., F) -> (...).
        """
        total = np.nansum(scores * self.weights, axis=-1)
        return np.where(np.isnan(scores).all(axis=-1), np.nan, total)


def said(source: RewardSource) -> str:
    """A reward as errors name it."""
    if source.kind == "function":
        return f"{source.code_file}: {source.function_name}"
    return f"the reward {source.kind}: {getattr(source, source.kind)}"


def _checked(found: Any, count: int, name: str) -> Scores:
    """(N,) numbers. Raises: RewardError where they are none, or of another number."""
    how = "return a list with a number, or None, for each completion"
    if found is None:
        raise RewardError(f"{name} returned None", how)
    try:
        values = list(found) if not isinstance(found, Mapping | Set | str | bytes) else None
    except TypeError:
        values = None
    if values is None:
        raise RewardError(f"{name} returned {_shown(found)}, which is no list", how)
    if len(values) != count:
        raise RewardError(f"{name} returned {len(values):,} rewards for {count:,} completions", how)
    return np.array([_number(value, name) for value in values], np.float64)


def _number(value: Any, name: str) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        number = None
    if number is None or math.isinf(number):
        raise RewardError(f"{name} returned {_shown(value)} for a completion", "return a finite number, or None")
    return number


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _line(error: BaseException, code_file: Path) -> str:
    """An error in a line, with where in the user's file it came from."""
    words = " ".join(str(error).split())[:200]
    trace, place = error.__traceback__, ""
    while trace is not None:
        mine = trace.tb_frame.f_code.co_filename == str(code_file)
        place = f" (line {trace.tb_lineno})" if mine else place
        trace = trace.tb_next
    return f"{type(error).__name__}: {words}{place}" if words else f"{type(error).__name__}{place}"


def _content_of(source: RewardSource) -> bytes | None:
    """What decides its rewards beside the recipe: a file's bytes, or the hashes of a model's weights."""
    if source.kind == "function":
        return _code_of(source)
    if source.model is None:
        return None
    places = [Path(source.model) / name for name in ("", "adapter", "model")]
    files = [file for place in places for file in sorted(place.glob("*.safetensors"))]
    return "".join(sha256_of(file, MODEL_FILE) for file in files).encode()


def _code_of(source: RewardSource) -> bytes:
    try:
        return source.code_file.read_bytes()
    except OSError as error:
        what = f"the file cannot be read: {error.strerror or error}"
        raise RewardError(what, "name FILE.py:NAME", file=str(source.code_file), key="objective.reward") from None


def _user_function(source: RewardSource) -> Callable[[Sequence[Written], Any], Sequence[Any]]:
    """A function of a file, given what its signature takes."""
    function = _loaded(source)
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    taken = {each.name for each in parameters}

    def call(written: Sequence[Written], model: Any) -> Sequence[Any]:
        columns = {name: None for each in written for name in each.columns if name not in KEPT_BACK}
        given: dict[str, Any] = {
            **{name: [each.columns.get(name) for each in written] for name in columns},
            "prompts": [each.prompt for each in written],
            "completions": [each.completion for each in written],
        }
        found: Sequence[Any] = function(**{name: value for name, value in given.items() if takes_all or name in taken})
        return found

    return call


def _loaded(source: RewardSource) -> Callable[..., Any]:
    """The function, its file run as a module; what lies beside the file can be imported meanwhile."""
    code, file, name = _code_of(source), source.code_file, source.function_name
    module_name = f"tunekit_reward_{sha256(code).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where classes of the file look for their own module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise RewardError(f"cannot be run: {_line(error, file)}", "mend it", file=str(file)) from error
    finally:
        sys.path.remove(str(file.parent))
    function = getattr(module, name, None)
    if not callable(function):
        there = [each for each, value in vars(module).items() if inspect.isfunction(value) and not each.startswith("_")]
        raise RewardError(f"has no function {name}", f"it has: {', '.join(there) or 'none'}", file=str(file))
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"{name} is an async function", "write a plain one", file=str(file))
    return function  # type: ignore[no-any-return]


def _regex(source: RewardSource) -> Callable[[Sequence[Written], Any], Sequence[Any]]:
    pattern = re.compile(str(source.regex))
    return lambda written, model: [float(pattern.search(each.text) is not None) for each in written]


def _exact_match(source: RewardSource) -> Callable[[Sequence[Written], Any], Sequence[Any]]:
    """Against a column; None where the row has nothing in it."""
    pattern = None if source.extract is None else re.compile(source.extract)
    column = str(source.exact_match)

    def reward(each: Written) -> float | None:
        wanted, text = each.columns.get(column), each.text
        if wanted is None:
            return None
        if pattern is not None:
            found = pattern.search(text)
            text = "" if found is None else str(found.group(min(pattern.groups, 1)) or "")
        return float(text.strip() == str(wanted).strip())

    return lambda written, model: [reward(each) for each in written]


def _reward_model(source: RewardSource) -> Callable[[Sequence[Written], Any], Sequence[Any]]:
    folder = str(source.model)

    def call(written: Sequence[Written], model: Any) -> Sequence[Any]:
        found: Sequence[Any] = model.scorers[folder](written)
        return found

    return call
