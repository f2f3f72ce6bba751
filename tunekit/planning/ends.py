"""Checks whether the base was trained on the token that ends answers. If not, a frozen output head cannot learn this
token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tunekit.adapters.module_names import base_modules, named_copies
from tunekit.adapters.tokens import tied_with, token_rows
from tunekit.model.pretrained import input_embedding
from tunekit.model.storage.mapped_files import MappedFiles
from tunekit.model.text.generation import end_of_turn_ids
from tunekit.planning.forecast import token_ids
from tunekit.planning.prepared import Prepared

SAMPLED_ROWS = 4096  # evenly spaced rows of the output matrix
READ_ROWS = 64  # rows of the data: nearly all of them contain an end of turn
NEAR = 0.3  # a row is untrained if its distance to the mean is below this share of the usual distance


def end_notes(prepared: Prepared) -> Iterator[str]:
    """Yields a warning for each end token in the rows that neither the base's training nor the adapter trains."""
    base, rows, adapter = prepared.base, prepared.rows, prepared.loaded.recipe.adapter
    tokenizer, head = prepared.context.processor.tokenizer, base.family.head_name(base.net)
    if tokenizer is None or head is None or not base.family.answers or adapter.trains_base:
        return
    ids = token_ids(rows.train, rows.objective.rows, READ_ROWS)
    ends = ids.intersection([*end_of_turn_ids(tokenizer, rows.template), tokenizer.eos_id])
    matrix = _matrix(prepared.stored.files, base.net, head) if ends else None
    modules = base_modules(base.net)
    wholly = {
        *named_copies(modules, getattr(adapter, "modules_to_save", None) or ()),
        *(each.name for each in prepared.context.targets),
    }
    if matrix is None or wholly & set(tied_with(modules, head)):
        return
    trained = token_rows(base.net, adapter).get(head)
    for end in sorted(ends - set(trained.ids if trained else ())):
        if _is_untrained(matrix, end):
            yield (
                f"warning: answers end with {tokenizer.decode([end])!r} (id {end}), but the base was never trained "
                f"on this token: its row in '{head}' is close to the mean of all rows. The adapter does not train "
                f"this row, so answers may never stop; write {_cure(base.net, head, end)}, or choose another end token "
                "with data.chat_template"
            )


def _cure(net: nn.Module, head: str, end: int) -> str:
    """The recipe line that trains the end token. If the output head is not tied to the embedding, the line names both,
    because PEFT applies a plain list only to the embedding."""
    modules = base_modules(net)
    embedding = next((name for name, module in modules.items() if module is input_embedding(net)), "")
    if not embedding or embedding in tied_with(modules, head):
        return f"adapter.trainable_token_indices: [{end}]"
    return f"adapter.trainable_token_indices: {{{embedding}: [{end}], {head}: [{end}]}}"


def _matrix(files: MappedFiles | None, net: nn.Module, head: str) -> Tensor | None:
    """The stored weight of the output head (V, D). None if the model is not downloaded, or if the weight is not stored
    in floating point."""
    if files is None:
        return None
    names = (f"{name}.weight" for name in (head, *tied_with(base_modules(net), head)))
    headers = files.headers
    stored = next((name for name in names if name in headers and headers[name].dtype.is_floating_point), None)
    return None if stored is None else files.view(stored)


def _is_untrained(matrix: Tensor, token: int) -> bool:
    """Whether the token's row of the matrix is unusually close to the mean of all rows, as rows of untrained tokens
    are."""
    rows = matrix[:: max(1, len(matrix) // SAMPLED_ROWS)].float()  # (S, D)
    mean = rows.mean(dim=0)  # (D,)
    usual = torch.linalg.vector_norm(rows - mean, dim=1).median()
    return bool(torch.linalg.vector_norm(matrix[token].float() - mean) < NEAR * usual)
