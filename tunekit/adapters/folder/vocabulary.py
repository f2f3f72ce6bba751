"""Support for a vocabulary that was enlarged before training: the adapter's file adds rows to the base's matrices."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tunekit.adapters.base import AdapterPart
from tunekit.adapters.folder.config import adapter_header
from tunekit.adapters.module_names import base_modules
from tunekit.adapters.tokens import embedding_name, tied_with
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.files.tensors import read_tensor
from tunekit.model.families.structure import text_config
from tunekit.model.quantized.weights import layer_kind, weight_of


def added_rows(net: nn.Module, head_name: str | None, path: Path) -> Tensors:
    """The rows (N, D) that the file adds to the base's embedding and head, by module name.

    Raises: AdapterError if the file adds rows to only one of them.
    """
    modules, header = base_modules(net), adapter_header(path)
    embedding = embedding_name(net, modules)
    rows: Tensors = {}
    for name in {embedding, head_name or embedding} & modules.keys():
        weight = weight_of(modules[name])
        if weight is None or weight.bias is not None:
            continue
        for between in ("", ".base_layer", ".original_module"):
            entry = header.get(f"{AdapterPart.file_prefix}{name}{between}.weight")
            if entry is not None and entry.shape[1:] == weight.shape[1:] and entry.shape[0] > weight.shape[0]:
                rows[name] = read_tensor(path, entry)[weight.shape[0] :]
    if embedding in rows and head_name in tied_with(modules, embedding):
        rows.setdefault(head_name, rows[embedding])
    if len(rows) == 1 and head_name not in (None, embedding):
        (name,) = rows
        other = "the head" if name == embedding else "tokens"
        how = "save the adapter again with peft and save_embedding_layers=True"
        raise AdapterError(f"contains {len(rows[name])} new rows of '{name}' but none of {other}", how, file=str(path))
    return rows


def enlarge(net: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Append the rows to the matrices of these modules. The matrices are then no longer tied."""
    for name, added in rows.items():
        module = base_modules(net)[name]
        matrix = module.get_parameter("weight").detach()
        module.weight = nn.Parameter(torch.cat([matrix, added.to(matrix)]), requires_grad=False)
        size = "num_embeddings" if layer_kind(module) == "embedding" else "out_features"
        setattr(module, size, len(matrix) + len(added))
        text_config(net).vocab_size = len(matrix) + len(added)
