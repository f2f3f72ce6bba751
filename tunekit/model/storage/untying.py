"""Unties a planned net's output head from its embedding, where the base's files store both with different numbers."""

import torch
from torch import nn

from tunekit.model.families import Family
from tunekit.model.storage.mapped_files import MappedFiles


def untie_head(net: nn.Module, family: Family, files: MappedFiles | None) -> None:
    """Untie the head from the embedding if the files contain different numbers for the two, as transformers does."""
    stored = [f"{name}.weight" for name in (family.head_name(net), family.embedding_name(net)) if name is not None]
    if files is None or not family.tied(net) or not files.headers.keys() >= set(stored):
        return
    if not torch.equal(*map(files.view, stored)):
        head = net.get_submodule(stored[0].removesuffix(".weight"))
        head.register_parameter("weight", nn.Parameter(torch.empty_like(net.get_parameter(stored[0]))))
