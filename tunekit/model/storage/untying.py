"""Unties a planned net's output head from its embedding, where the base's files store both with different numbers."""

from pathlib import Path

import torch
from torch import nn

from tunekit.files.tensors import TensorEntry
from tunekit.model.families import Family
from tunekit.model.storage.reading import MappedFiles


def untie_head(net: nn.Module, family: Family, folder: Path, headers: dict[str, TensorEntry]) -> None:
    """Untie the head from the embedding if the files contain different numbers for the two, as transformers does."""
    stored = [f"{name}.weight" for name in (family.head_name(net), family.embedding_name(net)) if name is not None]
    if not family.tied(net) or not headers.keys() >= set(stored):
        return
    files = MappedFiles(folder, headers)
    if not torch.equal(*map(files.view, stored)):
        head = net.get_submodule(stored[0].removesuffix(".weight"))
        head.register_parameter("weight", nn.Parameter(torch.empty_like(net.get_parameter(stored[0]))))
