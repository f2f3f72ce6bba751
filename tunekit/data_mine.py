"""`tunekit data mine`: adds hard negatives to training rows of queries and documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from tunekit.console import Console
from tunekit.console.progress import CountProgress
from tunekit.contracts import Batch, RowKind, Rows
from tunekit.data.batching.steps import evaluation_batches
from tunekit.data.encoding.sources import EncodedSource, load_sources, read_examples
from tunekit.data.encoding.store import ChosenRows
from tunekit.data.looking.rows_file import RowsToWrite, refuse_rows_file, rows_text, training_rows, write_rows_file
from tunekit.data.reading.first import format_maker
from tunekit.data.reading.replaced import refuse_to_replace
from tunekit.data.rows import RowSet, load_rows
from tunekit.errors import InputError
from tunekit.evaluation.mining import QueryNegatives, mine_negatives, rescored_negatives
from tunekit.evaluation.retrieval import example_texts
from tunekit.files.durable import json_result, try_to_write
from tunekit.files.untrusted import printable
from tunekit.machine.devices import make_devices
from tunekit.objectives.losses.embeddings import EmbedLoss
from tunekit.objectives.losses.retrieval import EmbeddedRow, Relevance, find_relevance, search_vectors
from tunekit.objectives.rows.texts import text_key
from tunekit.recipe.data import Source
from tunekit.recipe.load import load_recipe
from tunekit.recipe.recipe import Recipe
from tunekit.talking.reranking import Reranker, make_reranker
from tunekit.targets.export import refuse_code
from tunekit.targets.target import LoadedTarget, TargetSpec, find_target, load_target
from tunekit.tuned.model import ModelRun

RESCORED = 4  # documents that a reranker scores for each new negative
LISTED = "negatives"  # the field with a list of negatives
MINED = ("multiple_negatives_ranking", "gist", "triplet")  # losses whose rows can have more negatives
SHOWN_ROWS, SHOWN_CHARACTERS = 4, 60


@dataclass(frozen=True)
class Mining:
    """The negatives of all queries. `keys`: the hashes of each row's texts. `texts`: the text of each hash.
    `excluded`: for each query, the documents that are its own text or already its negatives."""

    keys: Sequence[Sequence[int]]
    texts: Mapping[int, str]
    relevance: Relevance
    excluded: Sequence[Sequence[int]]
    negatives: Sequence[QueryNegatives]
    measure: str = "cosine"  # the meaning of the scores of documents

    @property
    def documents(self) -> list[str]:
        """The text of each document, by its place."""
        return [self.texts[key] for key in self.relevance.documents]

    def of_rows(self) -> list[list[str]]:
        """The texts of the new negatives of each row."""
        anchors, documents = [self.keys[number][0] for number in self.relevance.queries], self.documents
        of_anchor = dict(zip(anchors, self.negatives, strict=True))
        return [[documents[place] for place in of_anchor[anchor].places] for anchor, *_ in self.keys]

    def report(self) -> dict[str, Any]:
        """The numbers of rows by their new negatives, of documents that are left out, and the mean cosines."""
        counts = Counter(map(len, self.of_rows()))
        best = [each for each in self.negatives if each.scores]
        return {
            "rows": len(self.keys),
            "queries": len(self.relevance.queries),
            "documents": len(self.relevance.documents),
            "rows_by_new_negatives": {str(number): counts[number] for number in sorted(counts, reverse=True)},
            "left_out": {
                "positives": sum(map(len, self.relevance.relevant)),
                "known": sum(map(len, self.excluded)),
                "too_similar": sum(len(each.left_out) for each in self.negatives),
            },
            f"mean_{self.measure}": {
                "positive": fmean(each.positive for each in self.negatives),
                "first_negative": fmean(each.scores[0] for each in best) if best else None,
            },
        }


def data_mine_verb(
    target: str,
    output: str,
    json_file: str | None,
    overrides: Sequence[str],
    *,
    negatives: int,
    margin: float,
    reranker: str | None = None,
    corpus: str | None = None,
    allow_code: bool = False,
) -> None:
    """Add at most `negatives` negatives to each training row, and write the rows to `output`. `reranker`: a target that
    scores the documents that the search finds, so that its scores decide. `corpus`: a file with further documents.

    Raises: InputError if the target has no training rows of queries and documents, or the file cannot be written.
    """
    spec = find_target(target, None, overrides, allow_code=allow_code)
    recipe = _recipe_to_mine(target, spec)
    if spec.run is not None and not allow_code:
        refuse_code(spec.run, recipe.model_dump(serialize_as_any=True))
    loaded_recipe = load_recipe(Path(target) if spec.run is None else spec.run / "recipe.yaml")
    refuse_to_replace("--json", json_file, loaded_recipe)
    refuse_rows_file("--output", output, loaded_recipe, None)
    try_to_write(Path(output))  # before hours of work
    scorer = None if reranker is None else find_target(reranker, None, [], allow_code=allow_code)
    write_result, console, devices = json_result(json_file), Console(json_file=json_file), make_devices()
    console.info(*spec.notes, *(() if scorer is None else scorer.notes))
    with devices:
        console.info(f"loading {spec.model.name_or_path} ...")
        loaded = load_target(spec, devices.device)
        rows = load_rows(recipe.data, loaded.objective, seed=spec.seed)
        if rows.streams:
            what = "the training rows are streamed, so their documents cannot be searched"
            raise InputError(what, "use files that fit into memory", key="data.train")
        console.info(*rows.notes)
        parts = list(training_rows(rows, recipe.data.train))
        rows_text("--output", output, _with_negatives(parts, [[]] * len(rows.train)))
        further = None if corpus is None else _load_corpus(corpus, rows)
        mine = partial(_mine, loaded, rows, parts, console, corpus=further)
        if scorer is None:
            mining = mine(negatives=negatives, margin=margin)
        else:
            console.info(f"loading {scorer.model.name_or_path} ...")
            scores = make_reranker(load_target(scorer, devices.device), scorer.evaluation.batch_size)
            mining = mine(negatives=RESCORED * negatives, margin=None)
            mining = _rescored(mining, scores, console, negatives=negatives, margin=margin)
    use, *notes = write_rows_file("--output", output, _with_negatives(parts, mining.of_rows()))
    _print(console, mining, margin)
    console.info(f"{output}: {len(rows.train):,} rows; {use}", *notes)
    if isinstance(recipe.data.eval, float):
        console.info(f"the evaluation rows that data.eval split off are not in {output}; name a file in data.eval")
    write_result({"file": output, "margin": margin, **mining.report()})


def _recipe_to_mine(target: str, spec: TargetSpec) -> Recipe:
    """The target's recipe. Raises: InputError if it names no training rows to which negatives can be added."""
    if spec.recipe is None:
        raise InputError(f"{target} has no recipe, so it names no training rows", "name a recipe or a run")
    loss = getattr(spec.recipe.objective, "loss", None)
    if loss not in MINED:
        used = spec.recipe.objective.method if loss is None else f"the loss {loss}"
        what = f"negatives are added to rows of queries and documents, but the recipe trains with {used}"
        raise InputError(what, f"use the objective embed with the loss {' or '.join(MINED)}", key="objective")
    return spec.recipe


def _mine(
    loaded: LoadedTarget,
    rows: RowSet,
    parts: Sequence[RowsToWrite],
    console: Console,
    *,
    negatives: int,
    margin: float | None,
    corpus: EncodedSource | None,
) -> Mining:
    """Embed all texts once, and find the negatives of each query among the documents of the rows and of the corpus."""
    loss, kind, progress = rows.objective.loss, rows.objective.rows, CountProgress(console)
    assert isinstance(loss, EmbedLoss)  # of the losses MINED
    size = loaded.target.evaluation.batch_size

    def embedded(rows: Rows, kind: RowKind, what: str) -> list[EmbeddedRow]:
        def counted() -> Iterator[Batch]:
            done = 0
            for batch in evaluation_batches(rows, kind, batch_size=size):
                yield batch
                done += len(batch.rows)
                progress(what, done, len(rows))

        return loss.embedded(ModelRun(loaded.model, kind), counted())

    of_rows, further, vectors = embedded(rows.train, kind, "rows embedded"), dict[int, str](), dict[int, Tensor]()
    keys = [row.keys for row in of_rows]
    if corpus is not None:
        assert kind.documents is not None  # see _load_corpus
        documents_read = embedded(ChosenRows([corpus.all_rows]), kind.documents, "documents embedded")
        vectors = {key: vector for row in of_rows for key, vector in zip(row.keys[1:], row.texts[1:], strict=True)}
        vectors |= {row.keys[0]: row.texts[0] for row in documents_read}
        numbers = set(corpus.store.records["number"].tolist())
        examples = (example for _, example in read_examples(corpus.source, kind.documents.example, numbers))
        further = {text_key(text): text for example in examples for text in example_texts(example)}
    relevance = find_relevance(keys, vectors)
    queries, documents = search_vectors(relevance, [row.texts for row in of_rows], keys, vectors)
    known: dict[int, set[int]] = {}
    for anchor, _, *others in keys:
        known.setdefault(anchor, {anchor}).update(others)
    excluded = [
        sorted(relevance.documents[key] for key in known[keys[number][0]] if key in relevance.documents)
        for number in relevance.queries
    ]
    makers = ((format_maker(part.format, part.source.path), row) for part in parts for row in part.rows)
    texts = dict(zip(chain(*keys), chain(*(example_texts(make(row)) for make, row in makers)), strict=True))
    mined = mine_negatives(queries, documents, relevance.relevant, excluded, count=negatives, margin=margin)
    return Mining(keys, further | texts, relevance, excluded, list(mined))


def _load_corpus(path: str, rows: RowSet) -> EncodedSource:
    """The documents of a file, as rows of one text."""
    kind = rows.objective.rows.documents
    assert kind is not None  # of the losses MINED
    [source] = load_sources([Source(path=path)], kind, None)
    return source


def _rescored(mining: Mining, reranker: Reranker, console: Console, *, negatives: int, margin: float) -> Mining:
    """The mining with the negatives that the reranker prefers among those of the search."""
    progress, documents, queries = CountProgress(console), mining.documents, mining.relevance.queries

    def score(number: int, places: Sequence[int]) -> list[float]:
        query = mining.texts[mining.keys[queries[number]][0]]
        probabilities = reranker.probabilities([reranker.encode(query, documents[place]) for place in places])
        progress("queries scored by the reranker", number + 1, len(queries))
        return probabilities.tolist()

    relevant = mining.relevance.relevant
    found = rescored_negatives(mining.negatives, relevant, score, count=negatives, margin=margin)
    return replace(mining, negatives=list(found), measure="probability")


def _with_negatives(parts: Sequence[RowsToWrite], negatives: Sequence[Sequence[str]]) -> list[RowsToWrite]:
    """The rows of all sources, with more negatives. `negatives`: of each row, in the order of the sources."""
    more = iter(negatives)
    return [
        replace(part, rows=[{**row, LISTED: [*(row.get(LISTED) or ()), *next(more)]} for row in part.rows])
        for part in parts
    ]


def _print(console: Console, mining: Mining, margin: float) -> None:
    """Print how many rows have new negatives, which documents were left out and why, and some of those."""
    report = mining.report()
    measure = mining.measure
    left_out, means = report["left_out"], report[f"mean_{measure}"]
    lines: list[list[object]] = [
        ["queries", report["queries"]],
        ["documents", report["documents"]],
        *([f"rows with {number} new negatives", rows] for number, rows in report["rows_by_new_negatives"].items()),
        ["left out: positives of the query", left_out["positives"]],
        ["left out: the query's own text, or already its negatives", left_out["known"]],
        [f"left out: {measure} over p - |p| x {margin:g} (p: of the positive)", left_out["too_similar"]],
        [f"mean {measure} of positives", means["positive"]],
        [f"mean {measure} of first negatives", means["first_negative"]],
    ]
    console.table(["", "number"], lines)
    documents, queries = mining.documents, zip(mining.relevance.queries, mining.negatives, strict=True)
    similar = [
        [_short(mining.texts[mining.keys[number][0]]), _short(documents[each.left_out[0]])]
        for number, each in queries
        if each.left_out
    ]
    if similar:
        console.info(f"{len(similar):,} queries have a document that is too similar; it may be a positive:")
        console.table(["query", "document"], similar[:SHOWN_ROWS])


def _short(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."
