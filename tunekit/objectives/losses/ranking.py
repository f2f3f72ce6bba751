"""Losses of rerankers. Each is a function of the scores and the labels of one query's documents, and has the formula
and the defaults of sentence-transformers 6.2.

Letters: n documents; s their scores, y their labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.recipe.objectives.rerank import RerankSettings

MU = 10.0  # weight of NDCGLoss2 in NDCGLoss2++
LARGEST_EXPONENT = 127  # of a power of two in float32


def query_losses(settings: RerankSettings, scores: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
    """The loss of each query, summed over its units, (R,). `counts`: the number of documents of each query.

    Shapes: scores (N,), labels (N,).
    """
    loss, sizes = LOSSES[settings.loss], list(counts)
    each = zip(torch.split(scores, sizes), torch.split(labels.to(scores.dtype), sizes), strict=True)
    return torch.stack([loss(settings, *pair) for pair in each])


def units_of(loss: str, labels: Sequence[float]) -> int:
    """The number of units of a query with these labels: documents, pairs of documents, or the query itself. 0 if the
    labels give the loss nothing to compare."""
    count = len(labels)
    if loss in ("binary_cross_entropy", "mse"):
        return count
    if loss == "margin_mse":
        return count - 1
    if loss in ("lambda", "ranknet"):
        order = sorted(labels)
        return sum(map(order.index, order))  # for each label, the number of lower labels
    return int(count > 1) if loss in ("listnet", "plistmle") else 1


def binary_cross_entropy(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """sum of -(w y log p + (1 - y) log(1 - p)), with p = sigmoid(s) and the weight w of relevant documents."""
    weight = None if settings.pos_weight is None else scores.new_tensor(settings.pos_weight)
    return F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight, reduction="sum")


def multiple_negatives_ranking(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """logsumexp_j(c p_j) - c p_0, with p = sigmoid(s) and the scale c. The first document is the positive."""
    logits = scores.sigmoid() * (settings.scale or 10.0)
    return logits.logsumexp(dim=0) - logits[0]


def lambda_loss(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """sum over pairs with y_i > y_j of -w_ij log2 sigmoid(s_i - s_j), with the weights of NDCGLoss2++.
    Source: Wang et al. 2018, eq. 17."""
    order = scores.sort(descending=True, stable=True).indices
    scores, labels = scores[order], labels[order]
    ranks = torch.arange(1, len(scores) + 1, device=scores.device)
    discounts = torch.log2(1.0 + ranks.to(scores.dtype))  # (n,)
    best = ((torch.pow(2, labels.sort(descending=True).values) - 1) / discounts).sum().clamp(min=1e-10)
    gains = (torch.pow(2, labels) - 1) / best
    distances = (ranks[:, None] - ranks[None, :]).abs()
    between = (1 / discounts[distances - 1] - 1 / discounts[distances.clamp(max=len(scores) - 1)]).abs()
    between = between.masked_fill(distances == 0, 0.0)
    at_ranks = (1 / discounts[:, None] - 1 / discounts[None, :]).abs()
    weights = (MU * between + at_ranks) * (gains[:, None] - gains[None, :]).abs()
    return _pairs(scores, labels, weights)


def ranknet(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """sum over pairs with y_i > y_j of -log2 sigmoid(s_i - s_j).    Source: Burges et al. 2005."""
    return _pairs(scores, labels, torch.ones_like(scores[:, None]))


def _pairs(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over pairs with y_i > y_j. Shapes: weights (n, n) or (n, 1)."""
    losses = weights * F.logsigmoid(scores[:, None] - scores[None, :]) / math.log(2)
    return -losses.masked_fill(labels[:, None] <= labels[None, :], 0.0).sum()


def listnet(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """-sum of softmax(y) log softmax(s).    Source: Cao et al. 2007."""
    return -(labels.softmax(dim=0) * scores.log_softmax(dim=0)).sum()


def plistmle(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """-sum over ranks k of w_k (s_k - logsumexp_{j >= k}(s_j)), in the order of the labels, with w_k proportional to
    2^(n - k) - 1. Documents with equal labels keep the order of the row.    Source: Lan et al. 2014."""
    scores = scores[labels.sort(descending=True, stable=True).indices]
    count = len(scores)
    down = max(count - LARGEST_EXPONENT, 0)  # the weights are divided by 2^down
    ranks = torch.arange(1, count + 1, device=scores.device, dtype=scores.dtype)
    weights = torch.pow(2.0, count - ranks - down) - 2.0**-down
    weights = weights / (weights.sum() + 1e-10)
    return -(weights * (scores - scores.flip(0).logcumsumexp(dim=0).flip(0))).sum()


def mse(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """sum of (s - y)^2; the labels are a teacher's scores."""
    return F.mse_loss(scores, labels, reduction="sum")


def margin_mse(settings: RerankSettings, scores: Tensor, labels: Tensor) -> Tensor:
    """sum over negatives j of ((s_0 - s_j) - (y_0 - y_j))^2; the labels are a teacher's scores, and the first document
    is the positive.    Source: Hofstätter et al. 2020."""
    return F.mse_loss(scores[0] - scores[1:], labels[0] - labels[1:], reduction="sum")


QueryLoss = Callable[[RerankSettings, Tensor, Tensor], Tensor]
LOSSES: Mapping[str, QueryLoss] = {
    "binary_cross_entropy": binary_cross_entropy,
    "multiple_negatives_ranking": multiple_negatives_ranking,
    "lambda": lambda_loss,
    "ranknet": ranknet,
    "listnet": listnet,
    "plistmle": plistmle,
    "mse": mse,
    "margin_mse": margin_mse,
}
