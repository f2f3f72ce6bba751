"""Losses of embeddings. Each is a function of the embeddings of all texts of a step, and has the formula and the
defaults of sentence-transformers 6.2.

Letters: R rows, N texts, M documents (all texts but the anchors), D dimensions; s the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunekit.recipe.objectives.embed import MARGINS, TEMPERATURES, EmbedSettings

BLOCK = 256  # rows whose similarities are computed together; the backward pass computes them again


@dataclass(frozen=True)
class RowTexts:
    """The texts of R rows, row after row: an anchor, its positive (or the other text of a pair), and any negatives.
    `counts`: the number of texts of each row; `scores`: the numbers of each row, without its texts; `guide`: the
    guide's embedding of each text, (N, E), if the loss has a guide."""

    counts: Sequence[int]
    scores: Sequence[Sequence[float]] = ()
    guide: Tensor | None = field(default=None, compare=False)

    @cached_property
    def anchors(self) -> Tensor:
        """The index of each row's anchor, (R,)."""
        counts = torch.tensor(self.counts)
        return counts.cumsum(0) - counts

    @cached_property
    def owners(self) -> Tensor:
        """The row of each text, (N,)."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

    @cached_property
    def negatives(self) -> Tensor:
        """The indices of all negatives, (N - 2 R,)."""
        others = torch.ones(len(self.owners), dtype=torch.bool)
        others[self.anchors] = others[self.anchors + 1] = False
        return others.nonzero()[:, 0]

    def numbers(self, like: Tensor) -> Tensor:
        """All numbers of all rows in order, with the dtype and the device of `like`."""
        return torch.tensor([number for row in self.scores for number in row], dtype=like.dtype, device=like.device)


def embedding_loss(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """The loss of a step, (): the mean over rows, or the sum that the loss defines. With `matryoshka`, the weighted sum
    of the losses of shortened embeddings of length 1.

    Shapes: embeddings (N, D), in the order of the rows' texts.
    """
    loss = LOSSES[settings.loss]
    if settings.matryoshka is None:
        return loss(settings, embeddings, rows)
    parts = [
        weight * loss(settings, F.normalize(embeddings[:, :size], dim=-1), rows)
        for size, weight in sorted(settings.matryoshka.items(), reverse=True)
    ]
    return torch.stack(parts).sum()


def multiple_negatives_ranking(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean over rows of logsumexp_j(s cos(q_i, d_j)) - s cos(q_i, p_i). The documents d are the positives and the
    negatives of all rows.

    `directions` adds comparisons to the logsumexp: query_to_query (other anchors), doc_to_query (the positive with all
    anchors), doc_to_doc (the positive with the documents of other rows). `hardness` adds strength * cos, without a
    gradient, to the logits of some negatives.    Source: van den Oord et al. 2018; Lan et al. 2025, eq. 5.
    """
    anchors, negatives = rows.anchors, rows.negatives
    places = torch.cat([anchors + 1, negatives])
    queries = F.normalize(embeddings[anchors.to(embeddings.device)], dim=-1)  # (R, D)
    documents = F.normalize(embeddings[places.to(embeddings.device)], dim=-1)  # (M, D)
    owners = rows.owners[places].to(embeddings.device)  # (M,)
    return _in_blocks(_ranking_block, settings, queries, documents, owners)


def _in_blocks(block: Callable[..., Tensor], settings: EmbedSettings, queries: Tensor, *further: Tensor) -> Tensor:
    """The mean of the losses of all rows, (). `block(settings, queries, *further, start)` returns the losses of at most
    BLOCK rows, from `start` on."""
    starts = range(0, len(queries), BLOCK)
    blocks = [
        checkpoint(block, settings, queries, *further, start, use_reentrant=False)
        if len(starts) > 1 and queries.requires_grad
        else block(settings, queries, *further, start)
        for start in starts
    ]
    return torch.cat(blocks).mean()


def _ranking_block(settings: EmbedSettings, queries: Tensor, documents: Tensor, owners: Tensor, start: int) -> Tensor:
    """The losses of the rows from `start` on, at most BLOCK, (B,)."""
    count, scale = len(queries), settings.scale or 20.0
    mine = torch.arange(start, min(start + BLOCK, count), device=queries.device)  # (B,)
    same_row = owners[None] == mine[:, None]  # (B, M) documents of the same row
    cosines = queries[mine] @ documents.T  # (B, M)
    logits = [cosines * scale + _penalty(settings, cosines, same_row, count)]
    positives = logits[0].gather(1, mine[:, None])[:, 0]  # (B,)
    for direction in settings.directions:
        if direction == "query_to_query":
            same = mine[:, None] == torch.arange(count, device=queries.device)  # (B, R)
            logits.append((scale * queries[mine] @ queries.T).masked_fill(same, -torch.inf))
        elif direction == "doc_to_query":
            logits.append(scale * documents[mine] @ queries.T)
        elif direction == "doc_to_doc":
            logits.append((scale * documents[mine] @ documents.T).masked_fill(same_row, -torch.inf))
    if settings.partition == "joint":
        return torch.cat(logits, dim=1).logsumexp(dim=1) - positives
    return torch.stack([each.logsumexp(dim=1) for each in logits]).mean(dim=0) - positives


def _penalty(settings: EmbedSettings, cosines: Tensor, same_row: Tensor, count: int) -> Tensor | float:
    """The hardness term of each logit, (B, M), without a gradient; 0 for documents that `mode` does not weight."""
    if settings.hardness is None:
        return 0.0
    negative = torch.arange(cosines.shape[1], device=same_row.device)[None] >= count  # (1, M), else a positive
    weighted = {
        "in_batch_negatives": ~same_row,
        "hard_negatives": same_row & negative,
        "all_negatives": ~same_row | negative,
    }[settings.hardness.mode]
    return settings.hardness.strength * cosines.detach() * weighted


def gist(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean over rows of logsumexp_j(c_j / T) - c_p / T, for the cosines c_j of the anchor with all documents and all
    other anchors, and of the positive p with all other positives. Each of these pairs is left out if the guide's cosine
    is above that of the row's anchor and positive, less the margin.    Source: Solatorio 2024."""
    assert rows.guide is not None
    places = torch.cat([rows.anchors + 1, rows.negatives])
    texts = (embeddings, rows.guide.to(embeddings.device))
    units = [F.normalize(each[at.to(each.device)], dim=-1) for each in texts for at in (rows.anchors, places)]
    return _in_blocks(_gist_block, settings, *units)


def _gist_block(
    settings: EmbedSettings,
    queries: Tensor,
    documents: Tensor,
    guide_queries: Tensor,
    guide_documents: Tensor,
    start: int,
) -> Tensor:
    """The losses of the rows from `start` on, at most BLOCK, (B,)."""
    count = len(queries)
    mine = torch.arange(start, min(start + BLOCK, count), device=queries.device)  # (B,)
    same = mine[:, None] == torch.arange(count, device=queries.device)  # (B, R)
    guided = guide_queries[mine] @ guide_documents.T  # (B, M)
    nearest = guided.gather(1, mine[:, None])  # (B, 1) of the positive
    limit = nearest - _margin(settings) * (1 if settings.margin_strategy == "absolute" else nearest.abs())
    cosines = queries[mine] @ documents.T
    others = F.pad(~same, (0, len(documents) - count), value=True)  # (B, M) all but the positive
    parts = [cosines.masked_fill((guided > limit) & others, -torch.inf)]
    compared = [(queries[mine], queries, guide_queries[mine], guide_queries)] if settings.contrast_anchors else []
    if settings.contrast_positives:
        compared += [(documents[mine], documents[:count], guide_documents[mine], guide_documents[:count])]
    for left, right, guide_left, guide_right in compared:
        parts.append((left @ right.T).masked_fill((guide_left @ guide_right.T > limit) | same, -torch.inf))
    logits = torch.cat(parts, dim=1) / _temperature(settings)
    return logits.logsumexp(dim=1) - logits.gather(1, mine[:, None])[:, 0]


def cosent(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """log(1 + sum over pairs of rows with y_i < y_j of exp(s (cos_i - cos_j))).    Source: Su 2022."""
    return _by_order(settings, _cosines(*_pairs(embeddings, rows)), rows)


def angle(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """As `cosent`, with |cos(x, y) + sum(x'' y' - x' y'')| in place of the cosine; x', x'' are the halves of x / |x|.
    Source: Li and Li 2023, and the authors' code."""
    first, second = (F.normalize(each, dim=-1) for each in _pairs(embeddings, rows))
    if first.shape[1] % 2:
        first, second = F.pad(first, (0, 1)), F.pad(second, (0, 1))
    cosines = (first * second).sum(dim=-1)
    (low_x, high_x), (low_y, high_y) = first.chunk(2, dim=1), second.chunk(2, dim=1)
    return _by_order(settings, (cosines + (high_x * low_y - low_x * high_y).sum(dim=-1)).abs(), rows)


def _by_order(settings: EmbedSettings, similarities: Tensor, rows: RowTexts) -> Tensor:
    """log(1 + sum over y_i < y_j of exp(s (a_i - a_j))), in O(R log R). Shapes: similarities (R,) -> ()."""
    scores = similarities * (settings.scale or 20.0)
    labels, order = rows.numbers(scores).sort()
    scores = scores[order]
    above = torch.searchsorted(labels, labels, right=True)  # (R,) the first row with a higher label
    sums = torch.logcumsumexp(-scores.flip(0), dim=0).flip(0)  # (R,) log of sum over j >= i of exp(-s a_j)
    sums = torch.cat([sums, scores.new_full((1,), -torch.inf)])
    return torch.cat([scores.new_zeros(1), scores + sums[above]]).logsumexp(dim=0)


def cosine(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean of (cos - y)^2."""
    cosines = _cosines(*_pairs(embeddings, rows))
    return F.mse_loss(cosines, rows.numbers(cosines))


def triplet(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean over negatives of relu(|a - p| - |a - n| + margin).    Source: Hermans et al. 2017."""
    anchors, positives, negatives = _candidates(embeddings, rows)
    near, far = F.pairwise_distance(anchors, positives, eps=0.0), F.pairwise_distance(anchors, negatives, eps=0.0)
    return F.relu(near - far + _margin(settings)).mean()


def contrastive(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean of (y d^2 + (1 - y) relu(margin - d)^2) / 2, with d = 1 - cos.    Source: Hadsell et al. 2006."""
    distances = 1 - _cosines(*_pairs(embeddings, rows))
    labels = rows.numbers(distances)
    far = F.relu(_margin(settings) - distances)
    return (0.5 * (labels * distances.square() + (1 - labels) * far.square())).mean()


def online_contrastive(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """The sum of d^2 over similar pairs that are farther apart than the nearest dissimilar pair, and of
    relu(margin - d)^2 over dissimilar pairs that are nearer than the farthest similar pair; d = 1 - cos."""
    distances = 1 - _cosines(*_pairs(embeddings, rows))
    labels = rows.numbers(distances)
    far, near = distances[labels == 0], distances[labels == 1]
    hard_near = near[near > (far.min() if len(far) else near.mean())]
    hard_far = far[far < (near.max() if len(near) else far.mean())]
    return hard_near.square().sum() + F.relu(_margin(settings) - hard_far).square().sum()


def margin_mse(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean over negatives of ((q.p - q.n) - (teacher's score of p - teacher's score of n))^2. The numbers of a row are
    the teacher's scores of its documents, or the differences.    Source: Hofstätter et al. 2020."""
    queries, positives, negatives = _candidates(embeddings, rows)
    margins = (queries * positives).sum(dim=-1) - (queries * negatives).sum(dim=-1)
    wanted = [
        margin
        for count, scores in zip(rows.counts, rows.scores, strict=True)
        for margin in (scores if len(scores) == count - 2 else [scores[0] - other for other in scores[1:]])
    ]
    return F.mse_loss(margins, torch.tensor(wanted, dtype=margins.dtype, device=margins.device))


def distill_kl(settings: EmbedSettings, embeddings: Tensor, rows: RowTexts) -> Tensor:
    """mean over rows of KL(softmax(teacher's scores / T) || softmax(q.d / T)) T^2, over the documents of the row."""
    temperature = _temperature(settings)
    losses = []
    for texts, scores in zip(torch.split(embeddings, list(rows.counts)), rows.scores, strict=True):
        student = (texts[1:] @ texts[0] / temperature).log_softmax(dim=0)
        teacher = torch.tensor(scores, dtype=texts.dtype, device=texts.device) / temperature
        losses.append(F.kl_div(student, teacher.log_softmax(dim=0), reduction="sum", log_target=True))
    return torch.stack(losses).mean() * temperature**2


def _margin(settings: EmbedSettings) -> float:
    return MARGINS[settings.loss] if settings.margin is None else settings.margin


def _temperature(settings: EmbedSettings) -> float:
    return TEMPERATURES[settings.loss] if settings.temperature is None else settings.temperature


def _pairs(embeddings: Tensor, rows: RowTexts) -> tuple[Tensor, Tensor]:
    """The first and the second text of each row, (R, D) each."""
    anchors = rows.anchors.to(embeddings.device)
    return embeddings[anchors], embeddings[anchors + 1]


def _candidates(embeddings: Tensor, rows: RowTexts) -> tuple[Tensor, Tensor, Tensor]:
    """For each negative: its row's anchor, its row's positive, and itself, (N - 2 R, D) each."""
    anchors = rows.anchors[rows.owners[rows.negatives]].to(embeddings.device)
    return embeddings[anchors], embeddings[anchors + 1], embeddings[rows.negatives.to(embeddings.device)]


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of each pair. Shapes: (R, D) each -> (R,)."""
    return (F.normalize(first, dim=-1) * F.normalize(second, dim=-1)).sum(dim=-1)


LossFunction = Callable[[EmbedSettings, Tensor, RowTexts], Tensor]
LOSSES: dict[str, LossFunction] = {
    each.__name__: each
    for each in (
        multiple_negatives_ranking,
        gist,
        cosent,
        angle,
        cosine,
        triplet,
        contrastive,
        online_contrastive,
        margin_mse,
        distill_kl,
    )
}
