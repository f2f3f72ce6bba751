"""`tunekit generate`: answers to one prompt or to each line of a file, scores of a reward model, embeddings, or
generated images."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from tunekit.console import Console, visible
from tunekit.contracts import GREEDY, AnswerLimits, EncodeOptions, Objective, Row, Sampling, no_progress
from tunekit.data.encoding.images import png_bytes
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.first import format_maker, open_rows
from tunekit.data.reading.folder import is_media, media_folder, passed_over
from tunekit.data.reading.problems import Problems
from tunekit.errors import DataError, InputError
from tunekit.evaluation.choices import choose
from tunekit.evaluation.evaluator import choices_of
from tunekit.evaluation.scores import undisturbed
from tunekit.files.durable import write_bytes
from tunekit.formats.reranking import RerankingExample
from tunekit.machine.devices import Devices, make_devices
from tunekit.model.call import seed_for
from tunekit.model.families import Family, make_family
from tunekit.model.text.draws import with_penalties
from tunekit.model.text.generation import check_prompts
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.rows.text import TextRows
from tunekit.recipe.data import Source
from tunekit.talking.answer import Request
from tunekit.talking.conversation import make_speaker
from tunekit.talking.embedder import SIDES, check_output, floats, make_embedder, write_vectors
from tunekit.talking.prompts import PromptRow, TextOrPair, read_prompts
from tunekit.talking.reranking import Reranker, is_reranker, make_reranker
from tunekit.talking.table import answer_table
from tunekit.targets.system_message import trained_system
from tunekit.targets.target import LoadedTarget, TargetSpec, family_of, find_target, load_target


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
    """Generate answers, scores, embeddings or images. Raises: TunekitError; the command line returns its exit code."""
    if prompt is None and prompts is None and score is None and not sys.stdin.isatty():
        prompts = "-"
    _require_one({"--prompt": prompt, "--prompts": prompts, "--score": score})
    sampling = with_penalties(Sampling(temperature, 1.0 if top_p is None else top_p, top_k or 0, seed or 0), penalties)
    settings = {"max_new_tokens": max_new_tokens, "choices": choices}
    overrides = [*overrides, *(f"evaluation.{key}={value}" for key, value in settings.items() if value is not None)]
    rows = list(map(PromptRow, prompt or ())) if prompts is None else read_prompts(Path(prompts))
    items, adapters = [row.prompt for row in rows], any(row.adapter is not None for row in rows)
    spec = find_target(target, base, overrides)
    family = make_family(family_of(spec))
    flags: dict[str, object] = {"--temperature": temperature or None, "--max-new-tokens": max_new_tokens}
    flags |= {"--top-p": top_p, "--top-k": top_k, "--seed": seed, "--score": score, "--choices": choices}
    flags |= {"--system": system, "the key adapter": adapters or None}
    flags |= {f"--penalty{' min_p' * option.startswith('min_p=')}": option for option in penalties}
    flags |= {f"the key {row.side}": row.side for row in rows if row.side and not family.headless}
    _check_flags(family, spec, output, [flag for flag, value in flags.items() if value is not None])
    devices = make_devices()
    console = Console(enabled=devices.is_main)
    console.warn(*spec.notes)  # standard output contains only the answers
    with devices:
        loaded = load_target(spec, devices.device)
        if system is None and (usual := trained_system(spec)) is not None:
            console.warn(f"the training rows begin with a system message; to use it, add --system {shlex.quote(usual)}")
        texts = _texts_of(items, loaded)
        if prompts is not None:
            _check_files(console, prompts, reads_texts=family.is_pipeline or family.reads_ids)
        if family.headless:
            _embed(console, loaded, texts, [row.side or SIDES[0] for row in rows], output)
            return
        if family.is_pipeline:
            _draw(console, loaded, texts, seed or 0, Path(output or "pictures"))
            return
        questions: Sequence[TextOrPair] = items
        if not family.reads_ids and prompts is not None:
            questions = [str(media_folder(prompts) / Path(text)) for text in texts]
        alone = partial(answer, loaded, questions, devices=devices, system=system)
        ask = partial(answer_with_adapters, loaded, rows, system=system) if adapters else alone
        answers = ask(sampling) if score is None else []
        scores = [] if score is None else _scored(loaded, Path(score).absolute())
    for scored, value in scores:
        console.json({**scored, "scores" if isinstance(value, list) else "score": value})
    _write_answers(console, rows, answers, as_lines=prompt is None or len(prompt) > 1)


def _scored(loaded: LoadedTarget, path: Path) -> Sequence[tuple[dict[str, Any], float | list[float]]]:
    """The rows of the file with their scores."""
    if is_reranker(loaded):
        return score_documents(make_reranker(loaded, loaded.target.evaluation.batch_size), path)
    return score_file(loaded, path)


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


def _check_flags(family: Family, spec: TargetSpec, output: str | None, flags: Sequence[str]) -> None:
    """Raises: InputError for --output or another flag that would have no effect."""
    draws = family.is_pipeline
    if family.headless and output is not None:
        check_output(Path(output))
    elif not draws and output is not None:
        raise InputError("the target writes no images and no embeddings", "remove --output")
    if family.headless and flags:
        raise InputError(f"the target embeds texts, so {' and '.join(flags)} has no effect", "remove it")
    if sides := [flag for flag in flags if flag in map("the key {}".format, SIDES)]:
        raise InputError(f"only embedding models read {sides[0]}", 'write {"prompt": "..."}')
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
    if spec.evaluation.choices is not None and {"--temperature", "--max-new-tokens"} & {*flags}:
        what = "the answer is the most likely one of evaluation.choices, so no tokens are sampled"
        raise InputError(what, "remove --temperature and --max-new-tokens, or add evaluation.choices=null")


def _embed(
    console: Console, loaded: LoadedTarget, texts: Sequence[str], sides: Sequence[str], output: str | None
) -> None:
    """Embed each text, as a query or a document, and print JSON lines or write a file."""
    embedder = make_embedder(loaded, loaded.target.evaluation.batch_size)
    rows = [embedder.encode(text, side) for text, side in zip(texts, sides, strict=True)]
    console.warn(*(f"{count} {notice}" for notice, count in embedder.rows.notices.items()))
    vectors = embedder.embed(rows)
    if output is None:
        for text, vector in zip(texts, vectors, strict=True):
            console.json({"prompt": text, "embedding": floats(vector)})
    else:
        write_vectors(Path(output), texts, vectors)
        console.info(f"{output}: {len(vectors):,} embeddings of {vectors.shape[1]:,} numbers")


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


@torch.no_grad()
def score_documents(reranker: Reranker, path: Path) -> list[tuple[dict[str, Any], float | list[float]]]:
    """The rows of the file, each with the probability that its document is relevant, or with a list of them.

    Raises: DataError with all wrong rows.
    """
    problems, encoded, counted = Problems(), list[Row](), list[tuple[dict[str, Any], int]]()
    rows, _, format_name, _ = open_rows(Source(path=str(path)), reranker.rows.example, problems)
    make_example = format_maker(format_name)
    for raw in rows:
        try:
            example = make_example(raw.values)
            assert isinstance(example, RerankingExample)
            encoded += [reranker.encode(example.query, document) for document in example.documents]
            counted.append((raw.values, len(example.documents)))
        except DataError as error:
            problems.add_error(str(path), raw.line, error)
    problems.raise_if_any()
    scores = iter(floats(reranker.probabilities(encoded)))
    each = [(values, list(islice(scores, count))) for values, count in counted]
    return [(values, some[0] if len(some) == 1 else some) for values, some in each]


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
        scores = is_reranker(loaded) or (answering is not None and answering.score is not None)
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
