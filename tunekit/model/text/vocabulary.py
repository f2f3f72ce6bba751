"""Tokens against rows of the embedding: a token without a row is refused, or rows are added; rows are never removed.

Comes in: a net and a tokenizer.  Goes out: ModelError naming the tokens, or a net with more rows.
Next: plan.py and train.py check; an adapter that trains new rows adds them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunekit.contracts import Tokenizer
from tunekit.errors import ModelError
from tunekit.model.families import Family, text_config
from tunekit.model.quantized.weights import weight_of


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int, largest_used_id: int | None = None) -> None:
    """Refuse ids beyond the embedding. `largest_used_id`: of the data; None counts every id of the tokenizer as used.

    Raises: ModelError with the tokens and how to mend.
    """
    largest = tokenizer.vocabulary_size - 1 if largest_used_id is None else largest_used_id
    if largest < embedding_rows:
        return
    beyond = range(embedding_rows, tokenizer.vocabulary_size)
    shown = ", ".join(repr(tokenizer.token_text(token_id)) for token_id in beyond[:5])
    raise ModelError(
        f"the tokenizer has {len(beyond)} tokens without a row in the model's embedding of {embedding_rows} ({shown})",
        "use the tokenizer that belongs to the base, or a base whose vocabulary was resized for these tokens",
        key="model.name_or_path",
    )


def extend_vocabulary(net: nn.Module, rows: int) -> int:
    """Give embedding and head (dense, tied or not) at least `rows` rows; returns how many were added.

    A new row is the mean of the old ones, so that it starts as an unremarkable token. Matrices that are larger already
    (padded ones) stay as they are.
    """
    family = Family()
    tied = family.tied(net)
    names = [name for name in (family.embedding_name(net), family.head_name(net)) if name is not None]
    modules: list[Any] = [net.get_submodule(name) for name in names]
    added = 0
    for module in modules[:1] if tied else modules:
        added = max(added, _add_rows(module, rows))
    if tied and added:
        modules[1].weight = modules[0].weight
    for module in modules:
        size_name = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
        setattr(module, size_name, module.weight.shape[0])
    if added:
        text_config(net).vocab_size = modules[0].weight.shape[0]
    return added


def _add_rows(module: Any, rows: int) -> int:
    """Append mean rows to a dense matrix (V, D), and mean entries to its bias (V,)."""
    weight = weight_of(module)
    if weight is None or weight.kind != "dense":
        raise ModelError(f"a {type(module).__name__} cannot take new tokens", "load it without quantization")
    missing = rows - weight.shape[0]
    if missing <= 0:
        return 0
    for name in ("weight", "bias"):
        old = getattr(module, name, None)
        if old is not None:
            mean = old.detach().float().mean(dim=0, keepdim=True).to(old.dtype)  # (1, D) or (1,)
            grown = torch.cat([old.detach(), mean.expand(missing, *mean.shape[1:])])
            setattr(module, name, nn.Parameter(grown, requires_grad=old.requires_grad))
    return missing
