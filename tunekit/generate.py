"""`tunekit generate`: answers to one prompt or to each line of a file, scores of a reward model, or generated
images."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from tunekit.adapters.folder.config import adapter_in
from tunekit.console import Console, visible
from tunekit.contracts import GREEDY, AnswerLimits, EncodeOptions, Objective, Sampling, no_progress
from tunekit.data.encoding.images import png_bytes
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.first import format_maker, open_rows
from tunekit.data.reading.folder import is_media, media_folder, passed_over
from tunekit.data.reading.problems import Problems
from tunekit.data.reading.source import read_source
from tunekit.errors import DataError, InputError
from tunekit.evaluation.choices import choose
from tunekit.evaluation.evaluator import choices_of
from tunekit.evaluation.scores import undisturbed
from tunekit.files.durable import write_bytes
from tunekit.formats.label_pairs import names_pair, read_pair
from tunekit.machine.devices import Devices, make_devices
from tunekit.model.call import seed_for
from tunekit.model.families import make_family
from tunekit.model.text.draws import with_penalties
from tunekit.model.text.generation import check_prompts
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.rows.text import TextRows
from tunekit.recipe.data import Source
from tunekit.talking.answer import Request
from tunekit.talking.conversation import make_speaker
from tunekit.talking.table import answer_table
from tunekit.targets.system_message import trained_system
from tunekit.targets.target import LoadedTarget, family_of, find_target, load_target

TextOrPair = str | tuple[str, str]  # a text, or a pair of texts
TABLES = (".csv", ".tsv", ".json", ".parquet")  # endings of files of prompts with columns, besides .jsonl


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and the folder of the adapter that answers it. None: the target's own adapter answers."""

    prompt: TextOrPair
    adapter: Path | None = None


PROMPT_LINE = 'write {"prompt": "..."}, or for a pair {"sentence1": "...", "sentence2": "..."}'


def generate_verb(
    target: str,
    base: str | None,
    prompt: list[str] | None,
    prompts: str | None,
    overrides: Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    score: str | None = None,
    choices: str | None = None,
    output: str | None = None,
    system: str | None = None,
    penalties: Sequence[str] = (),
) -> None:
    """Generate answers, scores or images. Raises: TunekitError; the command line returns its exit code."""
    if prompt is None and prompts is None and score is None and not sys.stdin.isatty():
        prompts = "-"
    _require_one({"--prompt": prompt, "--prompts": prompts, "--score": score})
    sampling = Sampling(temperature, 1.0 if top_p is None else top_p, top_k or 0, seed or 0)
    sampling = with_penalties(sampling, penalties)
    settings = {"max_new_tokens": max_new_tokens, "choices": choices}
    overrides = [*overrides, *(f"evaluation.{key}={value}" for key, value in settings.items() if value is not None)]
    rows = list(map(PromptRow, prompt or ())) if prompts is None else read_prompts(Path(prompts))
    items, adapters = [row.prompt for row in rows], any(row.adapter is not None for row in rows)
    spec = find_target(target, base, overrides)
    draws = make_family(family_of(spec)).is_pipeline
    sampling_flags = {"--temperature": temperature or None, "--max-new-tokens": max_new_tokens, "--top-p": top_p}
    other_flags = {"--top-k": top_k, "--seed": seed, "--score": score, "--choices": choices, "--system": system}
    for option in penalties:
        other_flags["--penalty min_p" if option.startswith("min_p=") else "--penalty"] = option
    flags = {**sampling_flags, **other_flags, "the key adapter": adapters or None}
    _check_flags(draws, output, [flag for flag, value in flags.items() if value is not None])
    if spec.evaluation.choices is not None and (temperature or max_new_tokens is not None):
        what = "the answer is the most likely one of evaluation.choices, so no tokens are sampled"
        raise InputError(what, "remove --temperature and --max-new-tokens, or add evaluation.choices=null")
    devices = make_devices()
    console = Console(enabled=devices.is_main)
    console.warn(*spec.notes)  # standard output contains only the answers
    with devices:
        loaded = load_target(spec, devices.device)
        if system is None and (usual := trained_system(spec)) is not None:
            console.warn(f"the training rows begin with a system message; to use it, add --system {shlex.quote(usual)}")
        texts = _texts_of(items, loaded)
        if prompts is not None:
            _check_files(console, prompts, reads_texts=draws or loaded.model.base.family.reads_ids)
        if draws:
            _draw(console, loaded, texts, seed or 0, Path(output or "pictures"))
            return
        questions: Sequence[TextOrPair] = items
        if not loaded.model.base.family.reads_ids and prompts is not None:
            questions = [str(media_folder(prompts) / Path(text)) for text in texts]
        alone = partial(answer, loaded, questions, devices=devices, system=system)
        ask = partial(answer_with_adapters, loaded, rows, system=system) if adapters else alone
        answers = ask(sampling) if score is None else []
        scores = [] if score is None else score_file(loaded, Path(score).absolute())
    for scored, value in scores:
        console.json({**scored, "score": value})
    _write_answers(console, rows, answers, as_lines=prompt is None or len(prompt) > 1)


def _check_files(console: Console, prompts: str, *, reads_texts: bool) -> None:
    """Print which files of a folder are passed over. Raises: InputError for files if the model reads texts."""
    is_folder = os.path.isdir(prompts)
    if is_folder:
        console.warn(*filter(None, [passed_over(Path(prompts))]))
    if reads_texts and (is_folder or is_media(prompts)):
        raise InputError(f"{prompts}: the model reads texts, not files", "name a file with one prompt per line")


def _require_one(sources: Mapping[str, object]) -> None:
    """Raises: InputError unless exactly one of these options has a value."""
    options = [option for option, value in sources.items() if value is not None]
    if len(options) != 1:
        what = f"{' and '.join(options)} cannot be used together" if options else "there is no prompt"
        how = "use one of --prompt TEXT, --prompts FILE and --score FILE, or standard input with one prompt per line"
        raise InputError(what, how)


def _write_answers(console: Console, rows: Sequence[PromptRow], answers: Sequence[str], *, as_lines: bool) -> None:
    """Print the answers, as JSON lines or as plain text."""
    for row, reply in zip(rows, answers, strict=True):
        if as_lines:
            adapter = {} if row.adapter is None else {"adapter": str(row.adapter)}
            console.json({"prompt": row.prompt, **adapter, "answer": reply})
        else:
            console.write(f"{visible(reply)}\n")


def _texts_of(prompts: Sequence[TextOrPair], loaded: LoadedTarget) -> list[str]:
    """The prompts, if all of them are single texts. Raises: InputError for pairs of texts if the target does not read
    pairs."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) < len(prompts) and not loaded.objective.rows.reads_pairs:
        what = f"some prompts are pairs of texts, but the target was trained with {loaded.objective.name}"
        raise InputError(what, 'write {"prompt": "..."}')
    return texts


def _check_flags(draws: bool, output: str | None, flags: Sequence[str]) -> None:
    """Raises: InputError for --output or another flag that would have no effect."""
    if not draws and output is not None:
        raise InputError("the target writes no images", "remove --output")
    useless = " and ".join(flag for flag in flags if flag != "--seed")
    if draws and useless:
        raise InputError(f"the target is a pipeline, which draws images; {useless} has no effect", "remove it")
    useless = " and ".join(flag for flag in flags if flag != "--score")
    if "--score" in flags and useless:
        raise InputError(f"--score reads answers and generates none, so {useless} has no effect", "remove it")
    useless = " and ".join(flag for flag in flags if flag in ("--top-p", "--top-k", "--seed", "--penalty min_p"))
    if not draws and useless and "--temperature" not in flags:
        what = f"without --temperature nothing is sampled, so {useless} has no effect"
        raise InputError(what, "add --temperature 1")


def _draw(console: Console, loaded: LoadedTarget, prompts: Sequence[str], seed: int, folder: Path) -> None:
    """Generate an image for each prompt, and save it in the folder under an unused name. The first image uses this
    seed."""
    folder.mkdir(parents=True, exist_ok=True)
    answering = loaded.objective.answering
    draw = None if answering is None else answering.draw
    assert draw is not None  # every pipeline's objective has `draw`
    for number, prompt in enumerate(prompts):
        with undisturbed(loaded.model):
            pixels = draw(loaded.model, [prompt], [seed + number], no_progress)[0]
        names = (folder / f"{seed + number:05d}{f'-{again}' if again else ''}.png" for again in count())
        place = next(path for path in names if not path.exists())
        write_bytes(place, png_bytes(pixels))
        console.json({"prompt": prompt, "picture": str(place), "seed": seed + number})


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts in a file; `-` is standard input.

    - A .jsonl file has one object per line, with `prompt`, `text` or the two texts of a pair. A .csv, .tsv, .json or
      .parquet file has such columns. `adapter` names the folder of an adapter or run, relative to the file.
    - A recording or an image is one prompt. A folder of them has one prompt per file.
    - In any other file, each line is a prompt.

    Raises: DataError with the line.
    """
    if path.is_dir():
        if media := [name for name in sorted(os.listdir(path)) if is_media(name)]:
            return [PromptRow(name) for name in media]
        how = "tunekit reads only files directly in this folder, not in folders inside it"
        raise DataError("it contains no recording and no image", how, file=str(path))
    if str(path) != "-" and not path.exists():
        raise DataError("there is no such file or folder", "check the path of --prompts", file=str(path))
    if is_media(path.name):
        return [PromptRow(path.name)]
    if path.suffix.lower() in TABLES:
        problems = Problems()
        prompts = [_row_of(row.values, path, row.line) for row in read_source(Source(path=str(path)), problems)]
        problems.raise_if_any()
    else:
        prompts = _prompts_in_lines(path)
    if not prompts:
        file = "standard input" if str(path) == "-" else str(path)
        raise DataError("it contains no prompt", "write one prompt per line, or use --prompt TEXT", file=file)
    return prompts


def _prompts_in_lines(path: Path) -> list[PromptRow]:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", "use a UTF-8 text file", file=str(path)) from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    return [_prompt_of(line, path, number) for number, line in numbered]


def _prompt_of(line: str, path: Path, number: int) -> PromptRow:
    if path.suffix != ".jsonl":
        return PromptRow(line)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", PROMPT_LINE, file=str(path), line=number) from error
    return _row_of(value if isinstance(value, dict) else {}, path, number)


def _row_of(row: Mapping[str, Any], path: Path, number: int) -> PromptRow:
    """The prompt in a row and its adapter. Raises: DataError if the row has no such prompt, or its adapter does not
    exist."""
    name, similar = row.get("adapter"), get_close_matches("adapter", row, cutoff=0.85)
    if "adapter" not in row and similar:
        raise DataError(
            f"'{similar[0]}' is not read; did you mean 'adapter'?", "rename it", file=str(path), line=number
        )
    adapter = adapter_in(Path(os.path.abspath(path.parent / name))) if isinstance(name, str) and name else None
    if name not in (None, "") and adapter is None:
        how = "name the folder of an adapter or a run; a relative path starts at the folder of this file"
        raise DataError(f"'adapter': {name!r} contains no adapter", how, file=str(path), line=number)
    return PromptRow(_prompt_in(row, path, number), adapter)


def _prompt_in(row: Mapping[str, Any], path: Path, number: int) -> TextOrPair:
    """The prompt in a row. Raises: DataError if it has none."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    if names_pair(row):
        try:
            return read_pair(row)
        except DataError as error:
            raise DataError(error.problems[0].what, PROMPT_LINE, file=str(path), line=number) from None
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise DataError("has no text under 'prompt' or 'text'", PROMPT_LINE, file=str(path), line=number)


@torch.no_grad()
def score_file(loaded: LoadedTarget, path: Path) -> list[tuple[dict[str, Any], float]]:
    """The rows of the file, each with its score. A row is a prompt with its answer, or a conversation.

    Raises: InputError if the target is not a reward model; DataError with all wrong rows.
    """
    objective, model = loaded.objective, loaded.model
    kind = objective.rows.with_options(EncodeOptions(template=loaded.target.chat_template))
    answering = objective.answering
    if answering is None or answering.score is None or not isinstance(kind, TextRows):
        raise InputError(f"the target was trained with {objective.name}, so it gives no scores", "name a reward model")
    assert model.base.text is not None  # it reads text
    problems, sequences, values = Problems(), list[list[int]](), list[dict[str, Any]]()
    rows, _, format_name, _ = open_rows(Source(path=str(path)), "text", problems)
    make_example = format_maker(format_name)
    for raw in rows:
        try:
            sequences.append(kind.renderer.sequence(make_example(raw.values))[0])
            values.append(raw.values)
        except Dropped as reason:
            problems.add(str(path), raw.line, str(reason), "write an answer, or remove the row")
        except DataError as error:
            problems.add_error(str(path), raw.line, error)
    problems.raise_if_any()
    check_vocabulary(loaded.tokenizer, model.base.text.vocabulary_size, max(map(max, sequences)))
    check_prompts(sequences, model.base.family.learned_positions(model.base.net), model.virtual_tokens)
    with undisturbed(model):
        return list(zip(values, answering.score(model, sequences, loaded.target.evaluation.batch_size), strict=True))


@torch.no_grad()
def answer(
    loaded: LoadedTarget,
    texts: Sequence[TextOrPair],
    sampling: Sampling = GREEDY,
    devices: Devices | None = None,
    system: str | None = None,
) -> list[str]:
    """The model's answer to each text, which is formatted like the training rows, after an optional system message.
    With evaluation.choices, the answer is the most likely choice."""
    settings, model, data = loaded.target.evaluation, loaded.model, loaded.target.data
    objective = _objective_of(loaded, system)
    choices = choices_of(settings, objective, data)
    if choices is not None:
        asked = [text for text in texts if isinstance(text, str)]
        return choose(model, objective, choices, asked, settings.batch_size, devices or make_devices(), system)
    answering = objective.answering
    if answering is None or answering.write is None:
        scores = answering is not None and answering.score is not None
        how = "score answers with --score FILE" if scores else "name a different target"
        raise InputError(f"the target was trained with {objective.name}, which does not generate answers", how)
    prompts = _questions(loaded, objective, texts, system)
    with undisturbed(model):
        limits = AnswerLimits(settings.max_new_tokens, settings.batch_size, loaded.target.chat_template, sampling)
        return answering.write(model, prompts, limits)


@torch.no_grad()
def answer_with_adapters(
    loaded: LoadedTarget, rows: Sequence[PromptRow], sampling: Sampling = GREEDY, system: str | None = None
) -> list[str]:
    """The answer to each prompt, computed with the prompt's adapter; the target is the base of all adapters. Each
    answer is the same as if its adapter alone were loaded.

    Raises: InputError if the target does not generate texts, or chooses answers from a list.
    """
    settings, objective = loaded.target.evaluation, _objective_of(loaded, system)
    answering, base = objective.answering, loaded.model.base
    is_text = answering is not None and answering.kind == "text" and base.family.reads_ids
    if not is_text or settings.choices is not None:
        what = "some rows name an adapter, but the target does not generate texts"
        raise InputError(what, "name a base that generates texts, and no evaluation.choices")
    speaker = make_speaker(loaded, needs_template=False)
    speaker.positions = base.family.learned_positions(base.net)  # as for a single adapter
    requests = [
        Request(
            max_new_tokens=settings.max_new_tokens,
            sampling=replace(sampling, seed=seed_for("generate", sampling.seed, number)),
            prompt=prompt,
        )
        for number, prompt in enumerate(_questions(loaded, objective, [row.prompt for row in rows], system))
    ]
    prepared = [speaker.prepare(request) for request in requests]
    with undisturbed(loaded.model):
        return answer_table(speaker, prepared, [row.adapter for row in rows], settings.batch_size)


def _objective_of(loaded: LoadedTarget, system: str | None) -> Objective:
    """The target's objective, which encodes prompts by the rules of the target's data section. Raises: InputError for a
    system message if the target does not read it."""
    data = loaded.target.data
    length, excess = (0, "drop") if data is None else (data.max_length, data.excess_length)
    options = EncodeOptions(template=loaded.target.chat_template, max_length=length, excess_length=excess)
    objective = loaded.objective.with_options(options)
    rows = objective.rows
    if system is not None and not (isinstance(rows, TextRows) and rows.renderer.has_template):
        raise InputError("the target reads no conversations, so --system has no effect", "remove it")
    return objective


def _questions(
    loaded: LoadedTarget, objective: Objective, texts: Sequence[TextOrPair], system: str | None
) -> list[Any]:
    """The prompt made from each text, formatted like the training rows, after an optional system message."""
    rows, base = objective.rows, loaded.model.base
    ask = partial(rows.question, system=system) if isinstance(rows, TextRows) else rows.question
    prompts = [ask(text) if isinstance(text, str) else rows.question_of_pair(*text) for text in texts]
    if base.family.reads_ids and base.text is not None:
        largest = max((max(ids, default=0) for ids in prompts), default=0)
        check_vocabulary(loaded.tokenizer, base.text.vocabulary_size, largest)
    return prompts
