"""Converts an adapter whose initialisation changed the base's weights (such as PiSSA) to ordinary LoRA of rank 2R on
the original base. Every program that reads LoRA supports this form."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tunekit.adapters.base import LayerAdapter
from tunekit.adapters.method import WrittenForm
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.recipe.bases.start_choice import DEFAULT_START
from tunekit.records import Target


def as_plain_lora(form: WrittenForm) -> WrittenForm:
    """The adapter as ordinary LoRA with the same updates. The rank becomes 2R in layers whose A and B contain a part of
    W.

    B A - B' A' = [B - B', B'] [A; A - A']. Alpha grows with the rank, so that the scaling stays the same.
    """
    before, old_targets, layers = form
    moved = {name for name, layer in layers.items() if "start_A" in layer.declared}
    if not moved:
        return form
    assert isinstance(before, LowRankSettings)
    rank = 2 * before.r
    changes: dict[str, object] = {"r": rank, "alpha": alpha_for_rank(before, before.alpha, before.r, rank)}
    changes |= {"start": DEFAULT_START, "rank_pattern": {}, "alpha_pattern": {}}  # written from the targets
    settings = before.model_copy(update=changes)
    targets = {t.name: _target(t, settings) if t.name in moved else t for t in old_targets}
    plain = {name: _plain_layer(layers[name], settings, targets[name]) for name in moved}
    return settings, list(targets.values()), {name: plain.get(name, layer) for name, layer in layers.items()}


def _target(target: Target, settings: LowRankSettings) -> Target:
    """The target with the rank that it gets as ordinary LoRA: 2R, or the smaller side of the matrix if that is less
    than 2R."""
    old, alpha = target.r or 0, target.alpha or 0.0
    rank = min(2 * old, target.in_features, target.out_features)
    return replace(target, r=rank, alpha=alpha_for_rank(settings, alpha, old, rank))


def alpha_for_rank(settings: LowRankSettings, alpha: float, old: int, new: int) -> float:
    """The alpha that gives rank `new` the same scaling that `alpha` gives rank `old`."""
    return alpha * (math.sqrt(new / old) if settings.use_rslora else new / old)


def _plain_layer(layer: LayerAdapter[Any], settings: LowRankSettings, target: Target) -> LayerAdapter[Any]:
    """The layer as ordinary LoRA, not attached to the network. It shares all tensors except A and B with `layer`."""
    a, b = (factor.detach() for factor in layer.factors())
    if target.r != len(a):
        a, b = _identity_factors(a, b)
    plain = type(layer)(layer.base_layer, settings, target)
    for attribute in plain.declared:
        values = {"A": a, "B": b}.get(attribute)
        getattr(plain, attribute).data = getattr(layer, attribute).detach() if values is None else values
    return plain


def _identity_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of the product B A, one of which is the identity. Their rank is the smaller side of the matrix."""
    product = b @ a  # (O, I)
    outputs, inputs = product.shape
    if outputs <= inputs:
        return product, torch.eye(outputs, device=product.device)
    return torch.eye(inputs, device=product.device), product
