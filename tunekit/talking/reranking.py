"""Scores documents for queries with a reranker, and reads and answers requests of clients."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunekit.basics import JsonObject
from tunekit.contracts import Row
from tunekit.errors import DataError, InputError
from tunekit.model.storage.sentence_transformers import DEFAULT_LENGTH
from tunekit.model.text.vocabulary import check_vocabulary
from tunekit.objectives.losses.rerank import RerankLoss
from tunekit.objectives.rows.candidates import CandidateRows
from tunekit.talking.adapters import Adapters
from tunekit.talking.embedder import floats
from tunekit.talking.embedding_desk import TurnDesk
from tunekit.talking.protocol import (
    MAX_INPUTS,
    ProtocolError,
    body_fields,
    check_texts,
    is_list,
    model_name,
    of_kind,
    whole_number,
)
from tunekit.targets.target import LoadedTarget
from tunekit.tuned.model import ModelRun


@dataclass(frozen=True)
class Reranker:
    """Scores pairs of a query and a document with a loaded target, `batch_size` pairs at a time."""

    loaded: LoadedTarget
    rows: CandidateRows
    loss: RerankLoss
    batch_size: int

    def encode(self, query: str, document: str) -> Row:
        """The row of a pair, cut to the positions of the base. Raises: DataError for an empty text."""
        base = self.loaded.model.base
        facts = base.text
        assert facts is not None  # the family reads texts
        row = self.rows.pair_row(query, document, (base.positions or DEFAULT_LENGTH) - self.loaded.model.virtual_tokens)
        check_vocabulary(self.loaded.tokenizer, facts.vocabulary_size, int(row.parts["ids"].max()))
        return row

    def probabilities(self, rows: Sequence[Row], before_batch: Callable[[], None] = lambda: None) -> Tensor:
        """sigmoid(score) of each row's pair, (N,) on the host: how probable it is that the document is relevant. Pairs
        of similar length are computed together."""
        run, scores = ModelRun(self.loaded.model, self.rows), list[Tensor]()
        order = sorted(range(len(rows)), key=lambda place: rows[place].sizes)
        for start in range(0, len(order), self.batch_size):
            before_batch()
            batch = self.rows.collate([[rows[place]] for place in order[start : start + self.batch_size]])
            scores += run.score([batch], self.loss.scores)
        return torch.cat(scores)[torch.tensor(order).argsort()].sigmoid()


def is_reranker(loaded: LoadedTarget) -> bool:
    """Whether the target scores documents for queries."""
    return isinstance(loaded.objective.rows, CandidateRows)


def make_reranker(loaded: LoadedTarget, batch_size: int) -> Reranker:
    """Make a reranker. Raises: InputError if the target does not score documents."""
    objective = loaded.objective
    if not isinstance(objective.rows, CandidateRows) or not isinstance(objective.loss, RerankLoss):
        what = f"the target was trained with {objective.name}, so it does not score documents"
        raise InputError(what, "name a reranker")
    return Reranker(loaded, objective.rows, objective.loss, batch_size)


@dataclass(frozen=True)
class RerankQuestion:
    """Pairs of a query and a document to score. `top`: how many documents to return, the best first; None: the scores
    in the order of the pairs. `returns_documents`: whether the response repeats the documents."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    top: int | None = None
    returns_documents: bool = False


def read_rerank_body(body: bytes, adapters: Adapters) -> RerankQuestion:
    """Read a request body for the order of documents. Raises: ProtocolError with the name of the invalid field."""
    value = body_fields(body, "rerank")
    listed = value.get("documents")
    texts = [each.get("text") if isinstance(each, dict) else each for each in listed] if is_list(listed) else []
    documents = check_texts(texts, "documents", "a list of texts")
    [query] = check_texts([value.get("query")], "query", "a text")
    top = len(documents) if value.get("top_n") is None else whole_number(value, "top_n", 1, 1, MAX_INPUTS)
    name, returns = model_name(value.get("model"), adapters), of_kind(value, "return_documents", bool, False)
    return RerankQuestion(name, tuple((query, text) for text in documents), top, bool(returns))


def read_score_body(body: bytes, adapters: Adapters) -> RerankQuestion:
    """Read a request body for the scores of pairs: a text with each of several texts, or lists of the same length.
    Raises: ProtocolError with the name of the invalid field."""
    value = body_fields(body, "score")
    first, second = (
        check_texts(texts if is_list(texts) else [texts], name, "a text or a list of texts")
        for name, texts in ((name, value.get(name)) for name in ("text_1", "text_2"))
    )
    first = first * len(second) if len(first) == 1 else first
    if len(first) != len(second):
        what = f"'text_1' has {len(first)} texts and 'text_2' has {len(second)}"
        raise ProtocolError(400, what, "text_2", "invalid_value")
    return RerankQuestion(model_name(value.get("model"), adapters), tuple(zip(first, second, strict=True)))


class RerankDesk(TurnDesk[RerankQuestion]):
    """Answers requests for the order or the scores of documents."""

    def __init__(self, reranker: Reranker, name: str) -> None:
        super().__init__(reranker.loaded, name)
        self.reranker = reranker

    def _response(self, question: RerankQuestion) -> bytes:
        rows = [self._encode(*pair) for pair in question.pairs]
        with self.adapters.using(question.name):
            scores = self.reranker.probabilities(rows, self.check_open)
        tokens = sum(row.sizes[0] for row in rows)
        common: JsonObject = {"model": question.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        if question.top is None:
            data = [{"index": place, "object": "score", "score": score} for place, score in enumerate(floats(scores))]
            return json.dumps({"object": "list", "created": int(time.time()), "data": data, **common}).encode()
        order = scores.sort(descending=True, stable=True).indices[: question.top].tolist()
        results = []
        for place, score in zip(order, floats(scores[order]), strict=True):
            document = {"document": {"text": question.pairs[place][1]}} if question.returns_documents else {}
            results.append({"index": place, "relevance_score": score, **document})
        return json.dumps({"results": results, **common}).encode()

    def _encode(self, query: str, document: str) -> Row:
        try:
            return self.reranker.encode(query, document)
        except DataError as error:
            raise ProtocolError(400, str(error), "documents", "invalid_value") from None
