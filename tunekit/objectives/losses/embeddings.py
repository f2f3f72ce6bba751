"""The loss of embeddings over a whole optimizer step: all rows of the step are compared with each other, however they
are divided into micro-batches and ranks.

Before the step's forward, all texts are embedded without a graph, in the way in which the later forward computes them
(parts, modes and seeds). The loss of the whole step and its gradient with respect to each embedding follow from them.
The later forward computes sum(embedding * gradient), whose gradient is that of the step's loss.
Source: Gao et al. 2021 (gradient cache).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.contracts import Array, Batch, Companion, Loss, LossKind, ModelOutput, Rows, RunView, StepBatches, Sums
from tunekit.machine.placing import to_device
from tunekit.metrics.outputs import ROW_VALUES
from tunekit.metrics.pair_scores import PAIRS
from tunekit.metrics.retrieval import OF_QUERIES
from tunekit.model.storage.dense_layers import DenseLayer
from tunekit.objectives.losses.contrast import RowTexts, embedding_loss
from tunekit.objectives.losses.retrieval import (
    EmbeddedRow,
    Relevance,
    find_relevance,
    search_ranks,
    search_vectors,
    triplets_right,
)
from tunekit.recipe.objectives.embed import LABELLED, RETRIEVAL, SCORED, EmbedSettings

EVALUATED_TOGETHER = 64  # evaluation rows that one loss compares; independent of the recipe's step


class Guide(Companion):
    """The companion of the loss gist: a frozen embedding model."""

    def embed(self, run: RunView, batches: Sequence[Batch]) -> list[Tensor]:
        """The embeddings of each batch's texts, (N, E) on the host, at least in float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class StepTexts:
    """The texts of a step on all ranks, and their embeddings (N, D), if they are known. `starts`: the place of the
    first text of each of this rank's micro-batches."""

    rows: RowTexts
    starts: Sequence[int]
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class EmbedLoss(LossKind):
    """The loss of a step's embeddings. `pooling`: the modes whose vectors are put one after another. `dense`: the
    layers after pooling. `measured`: for each evaluation row, its loss and the values of its metrics; None in training.
    `measured_ranks`: see LossKind."""

    settings: EmbedSettings
    pooling: Sequence[str] = ("mean",)
    normalize: bool = True
    dense: tuple[DenseLayer, ...] = ()
    measured: Mapping[int, Sequence[float]] | None = field(default=None, compare=False)
    measured_ranks: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict, compare=False)

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        if self.is_scored:
            return ("loss", "spearman", "pearson", *(LABELLED if self.settings.reads_labels else ()))
        return ("loss", *OF_QUERIES, *(("triplet_accuracy",) if self.settings.loss == "triplet" else ()))

    @property
    def is_scored(self) -> bool:
        """Whether each row is a pair of texts with a number."""
        return self.settings.loss in SCORED

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return self.measured is None

    def embed(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The embeddings of the batch's texts, (N, D), at least in float32."""
        assert output.hidden is not None
        pooled = pool(output.hidden, batch.targets["lengths"], self.pooling)
        for layer in self.dense:
            pooled = layer(pooled)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def prepare_step(self, run: RunView, step: StepBatches, earlier: StepBatches | None) -> StepBatches:
        """Add three values to each row: the gradients of its embeddings, the step's loss, and its number of rows.
        If the step is computed as one part, it needs only the number of rows. A guide's embeddings are added first."""
        if self.measured is not None:
            return step
        step = self._guided(run, step)
        if not run.is_one_part(step):
            return self._prepare(run, step, None)
        (batch,) = step.batches or (None,)
        if batch is None:  # the part is another rank's
            return step
        again = partial(self._prepare, run, step, StepTexts(text_rows([batch]), [0]))
        alone = run.rows.with_parts(step, [{"rows": np.full((len(batch.rows), 1), len(batch.rows))}])
        return replace(alone, again=again)

    def _guided(self, run: RunView, step: StepBatches) -> StepBatches:
        """The step, with the guide's embeddings of each row's texts if the loss has a guide."""
        if self.settings.guide is None:
            return step
        parts = []
        for batch, vectors in zip(step.batches, run.companion(Guide).embed(run, step.batches), strict=True):
            of_rows = torch.split(vectors, batch.targets["counts"].tolist())
            parts.append({"guide": [vectors.numpy() for vectors in of_rows]})
        return run.rows.with_parts(step, parts)

    def _prepare(self, run: RunView, step: StepBatches, known: StepTexts | None) -> StepBatches:
        """The prepared step. `known`: its texts on all ranks, if only this rank's embeddings are computed again."""
        values = run.score_step(step, self.embed)  # (N, D) of each micro-batch
        texts = gathered(run, step, values, self.settings.guide is not None) if known is None else known
        if texts.embeddings is None:
            embeddings = torch.cat([value.cpu() for value in values])
        else:
            embeddings = texts.embeddings.clone()
            for start, value in zip(texts.starts, values, strict=True):
                embeddings[start : start + len(value)] = value.cpu()
        with torch.enable_grad():
            leaf = embeddings.to(run.model.device).requires_grad_()
            loss = embedding_loss(self.settings, leaf, texts.rows)
            (gradient,) = torch.autograd.grad(loss, leaf)
        gradients, count, parts = gradient.cpu().numpy(), len(texts.rows.counts), list[Mapping[str, Sequence[Array]]]()
        for start, batch in zip(texts.starts, step.batches, strict=True):
            ends = start + np.cumsum(batch.targets["counts"].numpy())
            of_rows = [
                gradients[end - len(row.parts["counts"]) : end] for row, end in zip(batch.rows, ends, strict=True)
            ]
            share, rows = ([np.full(1, value)] * len(of_rows) for value in (loss.detach().cpu().numpy(), count))
            parts.append({"gradient": of_rows, "share": share, "rows": rows})
        again = partial(self._prepare, run, step, replace(texts, embeddings=embeddings))
        return replace(run.rows.with_parts(step, parts), again=again)

    def loss(self, output: ModelOutput, batch: Batch) -> Loss:
        """The batch's share of the step's loss times the step's number of rows; `total` has the shape (1,).

        Its value is the true loss, its gradient that of sum(embedding * gradient).
        Raises: ValueError for a part of a step that was prepared as one part.
        """
        embeddings, rows = self.embed(output, batch), int(batch.targets["rows"][0])
        if "gradient" not in batch.targets:
            if rows != len(batch.rows):
                raise ValueError("a step was split, but not prepared again")
            return Loss(rows * embedding_loss(self.settings, embeddings, text_rows([batch]))[None])
        gradient, share = (to_device(batch.targets[name], embeddings.device) for name in ("gradient", "share"))
        product = rows * (embeddings * gradient.to(embeddings.dtype)).sum()
        return Loss((share.to(embeddings.dtype).sum() + product - product.detach())[None])

    def measuring(self, run: RunView, rows: Rows, batches: Iterable[Batch]) -> EmbedLoss:
        """A copy of the loss with the values of each evaluation row. All rows are embedded once. Rows of one text are
        the documents of evaluation.corpus."""
        measured = self.embedded(run, batches, guided=True)
        corpus = {row.keys[0]: row.texts[0] for row in measured if len(row.keys) == 1}
        asked = [row for row in measured if len(row.keys) > 1]
        numbers, texts, keys, scores, _ = zip(*asked, strict=True)
        losses = self._losses(asked)
        if self.is_scored:
            first, second = torch.stack(texts).double().unbind(1)
            cosines = F.cosine_similarity(first, second, dim=-1).tolist()
            pairs = [(loss, cosine, score) for loss, cosine, [score] in zip(losses, cosines, scores, strict=True)]
            return replace(self, measured=dict(zip(numbers, pairs, strict=True)))
        relevance = find_relevance(keys, corpus)
        ranks = self._ranks(relevance, texts, keys, corpus)
        of_queries = {
            number: [1.0, *(measure(each, cutoff) for measure, cutoff in OF_QUERIES.values())]
            for number, each in zip(relevance.queries, ranks["model"], strict=True)
        }
        no_query = [0.0] * (1 + len(OF_QUERIES))  # the row's anchor is that of an earlier row
        of_rows = [
            (loss, triplets_right(some), len(some) - 2, *of_queries.get(place, no_query))
            for place, (loss, some) in enumerate(zip(losses, texts, strict=True))
        ]
        return replace(self, measured=dict(zip(numbers, of_rows, strict=True)), measured_ranks=ranks)

    def embedded(self, run: RunView, batches: Iterable[Batch], *, guided: bool = False) -> list[EmbeddedRow]:
        """The embedded rows of all ranks, by their numbers. `batches`: this rank's. `guided`: also by the guide, if the
        loss has one."""
        mine = list[EmbeddedRow]()
        for batch in batches:
            counts = batch.targets["counts"].tolist()
            [values] = run.score([batch], self.embed, lambda batch: batch.targets["counts"].tolist())
            guides: Sequence[Tensor | None] = [None] * len(counts)
            if guided and "texts" in batch.rows[0].parts:
                [of_guide] = run.companion(Guide).embed(run, [batch])
                guides = torch.split(of_guide, counts)
            for row, texts, guide in zip(batch.rows, torch.split(values, counts), guides, strict=True):
                scores = tuple(row.parts["scores"].tolist())
                mine.append(EmbeddedRow(row.number, texts, row.parts["keys"].tolist(), scores, guide))
        return sorted(run.gather(mine), key=lambda row: row.number)

    def _ranks(
        self, relevance: Relevance, texts: Sequence[Tensor], keys: Sequence[Sequence[int]], corpus: Mapping[int, Tensor]
    ) -> dict[str, list[list[int]]]:
        """The ranks of relevant documents by the whole embeddings, and by those of each smaller Matryoshka size."""
        queries, documents = search_vectors(relevance, texts, keys, corpus)
        width = queries.shape[1]
        sizes = {f"model at {size}": size for size in self.settings.matryoshka or () if size < width}
        return {
            name: search_ranks(queries[:, :size], documents[:, :size], relevance.relevant)
            for name, size in {"model": width, **sizes}.items()
        }

    def _losses(self, embedded: Sequence[EmbeddedRow]) -> list[float]:
        """The loss of each evaluation row: that of its group of at most EVALUATED_TOGETHER rows. With a ranking loss,
        no text is twice in a group."""
        losses = [0.0] * len(embedded)
        keys = [row.keys if self.settings.ranks else () for row in embedded]
        for group in distinct_groups(keys, EVALUATED_TOGETHER):
            some = [embedded[place] for place in group]
            guides = [row.guide for row in some if row.guide is not None]
            counts, scores = [len(row.texts) for row in some], [row.scores for row in some]
            rows = RowTexts(counts, scores, torch.cat(guides) if guides else None)
            loss = float(embedding_loss(self.settings, torch.cat([row.texts for row in some]), rows))
            for place in group:
                losses[place] = loss
        return losses

    def sums(self, output: ModelOutput, batch: Batch) -> Sums:
        """Sums of the values that `measuring` stored for each row; in a simulation, of zeros."""
        names = (ROW_VALUES, ROW_VALUES) if self.is_scored else RETRIEVAL
        if self.measured is None:
            self.embed(output, batch)
        stored = self.measured or dict.fromkeys((row.number for row in batch.rows), (0.0,) * (1 + len(names)))
        values = torch.tensor([stored[row.number] for row in batch.rows], dtype=torch.float64)  # (R, 1 + C)
        count = torch.tensor(float(len(values)), dtype=torch.float64)
        sums = {"loss": values[:, 0].sum(), "units": count}
        if self.is_scored:
            return {**sums, ROW_VALUES: values[:, 1:], **({PAIRS: count} if self.settings.reads_labels else {})}
        return sums | dict(zip(names, values[:, 1:].sum(dim=0), strict=True))


def distinct_groups(keys: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The indices of rows, in groups of at most `size` rows of which no two have a key in common. Each row is in the
    first group with room after the groups that have its keys."""
    groups, first, following = list[list[int]](), 0, dict[int, int]()  # following: the group after those with the key
    for row, row_keys in enumerate(keys):
        place = max([first, *(following.get(key, 0) for key in row_keys)])
        while place < len(groups) and len(groups[place]) == size:
            place += 1
        if place == len(groups):
            groups.append([])
        groups[place].append(row)
        following |= dict.fromkeys(row_keys, place + 1)
        while first < len(groups) and len(groups[first]) == size:
            first += 1
    return groups


def text_rows(batches: Sequence[Batch]) -> RowTexts:
    """The rows of these batches, without their texts."""
    rows = [row for batch in batches for row in batch.rows]
    counts = [len(row.parts["counts"]) for row in rows]
    guides = [torch.from_numpy(row.parts["guide"]) for row in rows if "guide" in row.parts]
    scores = [tuple(row.parts["scores"].tolist()) for row in rows]
    return RowTexts(counts, scores, torch.cat(guides) if guides else None)


def gathered(run: RunView, step: StepBatches, values: Sequence[Tensor], guided: bool) -> StepTexts:
    """The texts of the step on all ranks, in the order of the step's micro-batches."""
    mine = [text_rows([batch]) for batch in step.batches]
    local = [(index, rows.counts, rows.scores) for index, rows in zip(step.indices, mine, strict=True)]
    parts = sorted(run.gather(local), key=lambda part: part[0])
    starts = [0, *accumulate(sum(counts) for _, counts, _ in parts)]
    places = {index: start for (index, *_), start in zip(parts, starts, strict=False)}
    counts, scores = ([value for part in parts for value in part[place]] for place in (1, 2))
    guide = run.gather_rows(step, [rows.guide for rows in mine if rows.guide is not None]) if guided else None
    rows = RowTexts(counts, scores, guide)
    return StepTexts(rows, [places[index] for index in step.indices], run.gather_rows(step, values))


def pool(hidden: Tensor, lengths: Tensor, modes: Sequence[str]) -> Tensor:
    """The pooled hidden states of each text, at least in float32; the vectors of several modes one after another.

    Shapes: hidden (N, T, D), with padding at the end; lengths (N,) -> (N, D), or (N, modes * D).
    """
    lengths = to_device(lengths, hidden.device)
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    places = torch.arange(hidden.shape[1], device=hidden.device)
    real = (places < lengths[:, None])[..., None]  # (N, T, 1)
    return torch.cat([_pooled(hidden, real, lengths, mode) for mode in modes], dim=-1)


def _pooled(hidden: Tensor, real: Tensor, lengths: Tensor, mode: str) -> Tensor:
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    if mode == "max":
        return hidden.masked_fill(~real, -torch.inf).amax(dim=1)
    weights = real.to(hidden.dtype)
    if mode == "weightedmean":
        weights = weights * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
    total = weights.sum(dim=1)
    return (hidden * weights).sum(dim=1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)
