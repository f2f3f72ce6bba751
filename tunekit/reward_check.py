"""`tunekit reward check`: tests a recipe's reward on good and bad answers before a training run uses it.

It reports a reward that fails, that is slow, or that scores bad answers as high as reference answers.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunekit.adapters.attach import attach_adapter
from tunekit.adapters.folder.read import load_into
from tunekit.companions.base import make_companions
from tunekit.companions.rewards import RewardFunctions, make, name_of
from tunekit.console import Console, visible
from tunekit.contracts import CompanionSpec, StepBatches
from tunekit.data.batching.order import epoch_rows
from tunekit.data.reading.first import format_maker, open_rows
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.data.reading.source import place_of
from tunekit.data.rows import load_rows
from tunekit.errors import DataError, InputError, ModelError, RewardError
from tunekit.evaluation.scores import undisturbed
from tunekit.files.durable import json_result
from tunekit.machine.devices import make_devices
from tunekit.model.load import load_model
from tunekit.model.text.tokenizer import load_tokenizer
from tunekit.objectives.base import make_objective
from tunekit.objectives.losses.advantages import Rewards, mean, spread, teaches_nothing
from tunekit.objectives.losses.samples import SampledLoss
from tunekit.objectives.rows.prompts import Completion, completions_of, context_json
from tunekit.recipe.bases.sample_settings import SampleSettings
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.recipe import Recipe
from tunekit.tuned.model import ModelRun, TunedModel

MOST_ROWS, MOST_READ = 64, 20_000  # rows to test; rows of a source from which they are drawn
LIMIT_SECONDS = 20.0  # the maximum time of one reward for one kind of answers
SLOW_SECONDS = 0.2  # seconds per completion: a step with 64 completions would wait 13 seconds
LONG_WORDS = 200
REFERENCE, SAMPLES, NOTHING = "reference answers", "samples of the model before step 1", "empty answers"
SHUFFLED, COMMON = "the reference answers of other rows", "one answer for all rows"
BURIED, LISTED = "the reference answer among other answers", "a list of all answers"
PROMPT, PROMPTS = "the prompt as the answer", "the prompt five times"
LONG = f"{LONG_WORDS} words from other answers"
WORTHLESS = (BURIED, LISTED, PROMPT, PROMPTS, LONG)  # bad answers, for which a good reward is low
OTHERS, MOST_LISTED = 6, 100  # number of answers around the reference; maximum of different answers in LISTED
TOO_MUCH = 0.5  # share of the difference between reference and empty answers


@dataclass(frozen=True)
class AnswerTest:
    """Answers of one kind, and their rewards. `scores`: (N, F), for N answers and F reward functions. `errors`: the
    errors that reward functions raised."""

    name: str
    completions: Sequence[Completion]
    scores: Rewards
    total: Rewards  # (N,)
    seconds: Sequence[float]
    errors: Sequence[str]


def reward_check_verb(loaded: LoadedRecipe, samples: int, json_file: str | None) -> int:
    """Test the reward. Returns 2 if there are findings, else 0. Raises: TunekitError if the reward cannot be tested."""
    refuse_to_replace("--json", json_file, loaded)
    recipe, console, write_result = loaded.recipe, Console(json_file=json_file), json_result(json_file)
    console.info(*loaded.rewrites)
    settings = recipe.objective
    if not isinstance(settings, SampleSettings):
        raise InputError(f"objective {settings.method} has no reward", "name a recipe with objective: grpo or rloo")
    rewards, size = make(CompanionSpec("rewards", "objective.reward", settings)), settings.num_generations
    device = make_devices().device
    rewards.load(device)
    rewards.limit_seconds = LIMIT_SECONDS
    encode = _encoder(recipe) if rewards.reads_ids else None
    kinds = known_answers(_chosen(recipe, console), encode)
    if samples:
        kinds[SAMPLES] = _sampled(recipe, max(1, round(samples / size)), device)
    answer_tests = [_answer_test(rewards, name, completions) for name, completions in kinds.items()]
    findings, notes = judged(rewards, answer_tests, size)
    _show(console, rewards, answer_tests, size)
    console.info("", *notes)
    console.warn(*findings)
    if not findings and REFERENCE in kinds:
        console.info("no problem was found: reference answers score higher than empty and constant ones")
    elif not findings:
        console.info(
            "the reward returned valid numbers; no row has a reference answer, so it was not tested on good answers"
        )
    write_result(
        {
            "answers": [_values(rewards, answer_test) for answer_test in answer_tests],
            "findings": findings,
            "notes": notes,
        }
    )
    return 2 if findings else 0


def _chosen(recipe: Recipe, console: Console) -> list[dict[str, Any]]:
    """The prompts and columns of some training rows, which are selected by the run's seed. No tokenizer is loaded."""
    contexts, problems = list[dict[str, Any]](), Problems()
    for source in recipe.data.train:
        rows, _, format_name, _ = open_rows(source, recipe.objective.example, problems)
        make_example = format_maker(format_name)
        for raw in islice(rows, MOST_READ):
            try:
                example: Any = make_example(raw.values)
            except DataError as error:
                problems.add_error(*place_of(source.path, raw.line), error)
                continue
            file, line = place_of(source.path, raw.line)
            origin = {"origin": f"{file}:{line}"}
            contexts += [json.loads(context_json(example)) | origin] if example.prompt else []
    problems.raise_if_any()
    if not contexts:
        raise DataError("no row has a prompt", "see the rows with: tunekit preview RECIPE", key="data.train")
    draw = random.Random(recipe.training.seed)
    chosen = draw.sample(contexts, min(MOST_ROWS, len(contexts)))
    console.info(
        f"testing the reward on {len(chosen):,} of {len(contexts):,} rows, with good and bad answers for each row"
    )
    return chosen


def known_answers(
    contexts: Sequence[dict[str, Any]], encode: Callable[[str], list[int]] | None = None
) -> dict[str, list[Completion]]:
    """Completions for the test, by kind: reference answers and several kinds of bad answers. Some bad answers fool a
    reward that only searches the completion for the answer or for its words. `encode`: a function from text to ids,
    needed if a reward reads ids."""
    with_answer = [each for each in contexts if isinstance(each["columns"].get("answer"), str | int)]
    answers = [str(each["columns"]["answer"]) for each in with_answer]
    common = Counter(answers).most_common(1)[0][0] if answers else "yes"
    words = " ".join(answers or ["word"]).split() or ["word"]
    long = " ".join((words * LONG_WORDS)[:LONG_WORDS])
    rows, kinds = with_answer or contexts, dict[str, Sequence[str]]()
    if answers:
        kinds[REFERENCE] = answers
        kinds[SHUFFLED] = [
            next((text for text in answers[at + 1 :] + answers[:at] if text != answer), answer)
            for at, answer in enumerate(answers)
        ]
    distinct = list(dict.fromkeys(answers))
    if len(distinct) > 1:
        kinds[BURIED] = [_among_others(answer, distinct) for answer in answers]
    if 1 < len(distinct) <= MOST_LISTED:
        kinds[LISTED] = [", ".join(distinct)] * len(rows)
    kinds[NOTHING] = [""] * len(rows)
    kinds[f"{COMMON}: {visible(common)[:40]!r}"] = [common] * len(rows)
    kinds[PROMPT] = [_text_of(each["prompt"]) for each in rows]
    kinds[PROMPTS] = ["\n".join([text] * 5) for text in kinds[PROMPT]]
    kinds[LONG] = [long] * len(rows)
    return {
        name: [
            Completion(**context, text=text, ids=None if encode is None else encode(text))
            for context, text in zip(rows, texts, strict=True)
        ]
        for name, texts in kinds.items()
    }


def _among_others(answer: str, distinct: Sequence[str]) -> str:
    """A text with several answers, one per line. The given answer is on a middle line."""
    others = [text for text in distinct[: OTHERS + 1] if text != answer][:OTHERS]
    others *= 2 if len(others) == 1 else 1  # so that neither the first nor the last line is the given answer
    middle = len(others) // 2
    return "\n".join([*others[:middle], answer, *others[middle:]])


def _encoder(recipe: Recipe) -> Callable[[str], list[int]] | None:
    """A function that converts text to ids and appends the end token, as the model does. None if the model's files are
    missing."""
    try:
        tokenizer = load_tokenizer(recipe.model)
    except ModelError:
        return None
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return lambda text: [*tokenizer.encode(text), *end]


def _text_of(prompt: str | list[dict[str, Any]]) -> str:
    """The prompt as text; for messages, the content of the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


def _sampled(recipe: Recipe, count: int, device: torch.device) -> list[Completion]:
    """The model's completions before training. Each of the first `count` rows gets a group of completions, as in a
    training step."""
    seed = recipe.training.seed
    objective = make_objective(recipe.objective, load_tokenizer(recipe.model))
    rows = load_rows(recipe.data, objective, seed=seed)
    order = epoch_rows(rows.draws, seed=seed, epoch=0, shuffle=recipe.data.shuffle)[:count]
    chosen = [rows.train[int(index)] for index in order]
    base = load_model(objective.section(recipe.model, 0), device=device)
    sampling = make_companions([spec for spec in rows.objective.companions if spec.kind == "sampling"])
    model, adapter = TunedModel(base, None, companions=sampling), getattr(recipe.adapter, "init_from", None)
    if adapter is not None:
        head = base.family.head_name(base.net)
        model.adapter = attach_adapter(base.net, recipe.adapter, seed=seed, head_name=head, device=device)
        load_into(model.adapter, Path(adapter), base_fingerprint=base.fingerprint)
    loss = rows.objective.loss
    assert isinstance(loss, SampledLoss)
    with undisturbed(model):
        groups = loss.sampled(ModelRun(model, rows.objective.rows), StepBatches(0, 0.0, (), (), seed), chosen)
    return completions_of(chosen, groups)


def _answer_test(rewards: RewardFunctions, name: str, completions: Sequence[Completion]) -> AnswerTest:
    columns, seconds, errors = list[Rewards](), list[float](), list[str]()
    for number in range(len(rewards.sources)):
        start = time.monotonic()
        try:
            columns.append(rewards.scored_by(number, completions))
        except RewardError as error:
            columns.append(np.full(len(completions), np.nan))
            errors.append("; ".join(filter(None, (error.problems[0].what, error.problems[0].how))))
        seconds.append(time.monotonic() - start)
    scores = np.stack(columns, axis=1)
    return AnswerTest(name, completions, scores, rewards.weighted(scores), seconds, errors)


def judged(rewards: RewardFunctions, answer_tests: Sequence[AnswerTest], size: int) -> tuple[list[str], list[str]]:
    """The findings and the notes about the reward. `size`: the number of samples in a group."""
    places = dict[str, list[str]]()
    for each in answer_tests:
        for error in each.errors:
            places.setdefault(error, []).append(each.name)
    findings = [
        f"{error} ({names[0]}{f', and {len(names) - 1} more kinds of answers' if names[1:] else ''})"
        for error, names in places.items()
    ]
    by_name = {each.name: each for each in answer_tests}
    reference = by_name.get(REFERENCE)
    notes = [] if reference else ["no row has a reference answer, so the reward was not compared with good answers"]
    failed = {each.name for each in answer_tests if each.errors}
    best = np.nan if reference is None or reference.errors else float(mean(reference.total))
    empty = float(mean(by_name[NOTHING].total)) if NOTHING in by_name else np.nan
    constant = max((float(mean(each.total)) for each in answer_tests if each.name.startswith(COMMON)), default=np.nan)
    much = empty + TOO_MUCH * (best - empty) if empty < best else best
    for each in answer_tests:
        other = float(mean(each.total))
        # with two labels, half of the rows have the common answer
        chance = -np.inf if each.name in (PROMPT, PROMPTS) else constant
        fools = each.name in WORTHLESS and other >= much and other > chance
        if (other >= best or fools) and each.name not in {REFERENCE, SAMPLES, *failed}:  # False if a number is NaN
            text = f"{each.name}: a mean reward of {other:.4g}; {REFERENCE}: {best:.4g}"
            (notes if each.name == SHUFFLED else findings).append(text)
    notes += _constant(rewards, answer_tests) if reference is not None else ()
    for each in answer_tests:
        for source, seconds in zip(rewards.sources, each.seconds, strict=True):
            slow = seconds / max(len(each.completions), 1)
            if slow > SLOW_SECONDS and not any("took more than" in error for error in each.errors):
                findings.append(f"{name_of(source)} takes {slow:.2g} s per completion ({each.name})")
    absent = sum(int(np.isnan(each.total).sum()) for each in answer_tests if each.name not in failed)
    if absent:
        notes.append(f"{absent:,} completions got no reward (None or NaN)")
    sampled = by_name.get(SAMPLES)
    if sampled is not None and not sampled.errors:
        equal = float(teaches_nothing(sampled.total.reshape(-1, size), axis=1).mean())
        notes.append(
            f"{equal:.0%} of the groups of samples have equal rewards or no rewards; training learns nothing from them"
        )
        if reference is not None and mean(sampled.total) >= mean(reference.total):
            notes.append(
                f"{SAMPLES} have rewards as high as {REFERENCE}: there is little to learn, or the model "
                "fools the reward"
            )
    return findings, notes


def _constant(rewards: RewardFunctions, answer_tests: Sequence[AnswerTest]) -> Iterator[str]:
    """Notes about reward functions that return the same number for all answers. The sum of several rewards would hide
    such a function."""
    sources = rewards.sources
    for number, source in enumerate(sources if len(sources) > 1 else ()):
        scores = np.concatenate([each.scores[:, number] for each in answer_tests])  # (N,)
        if np.isfinite(scores).all() and np.ptp(scores) == 0:
            yield (
                f"{name_of(source)} returns {scores[0]:.4g} for all answers, even for {REFERENCE}: check how it reads "
                "completions (if the prompt is a list of messages, the completion is a list of messages too)"
            )


def _values(rewards: RewardFunctions, each: AnswerTest) -> dict[str, Any]:
    """The content of the --json file about one kind of answers. Numbers that are not finite are left out."""
    names = rewards.names
    numbers = {"mean": float(mean(each.total)), "std": float(spread(each.total))}
    numbers |= {f"mean_{name}": float(mean(each.scores[:, at])) for at, name in enumerate(names)}
    finite = {name: value for name, value in numbers.items() if np.isfinite(value)}
    counts = {"completions": len(each.completions), "not_judged": int(np.isnan(each.total).sum())}
    seconds = {name: round(value, 4) for name, value in zip(names, each.seconds, strict=True)}
    return {"answers": each.name, **counts, **finite, "seconds": seconds, "errors": list(each.errors)}


def _show(console: Console, rewards: RewardFunctions, answer_tests: Sequence[AnswerTest], size: int) -> None:
    names = rewards.names
    several = names if len(names) > 1 else []
    lines = []
    for each in answer_tests:
        values = _values(rewards, each)
        numbers = [values.get(name) for name in ("mean", "std", *(f"mean_{name}" for name in several))]
        shown = ["-" if number is None else f"{number:.4g}" for number in numbers]
        lines.append([each.name, len(each.completions), *shown, values["not_judged"], f"{sum(each.seconds):.3g}"])
    console.table(["answers", "completions", "reward", "std", *several, "no reward", "seconds"], lines)
    sampled = next((each for each in answer_tests if each.name == SAMPLES), None)
    if sampled is not None:
        console.info("\nthe first samples:")
        for completion, total in list(zip(sampled.completions, sampled.total.tolist(), strict=True))[:size]:
            console.info(f"  {total:.4g}  {visible(completion.text)[:100]!r}")
