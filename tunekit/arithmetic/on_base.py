"""Attaches the adapter of a folder to its base on the meta device. The base's matrices are read one at a time, when
needed."""

from functools import partial
from pathlib import Path

import torch

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.folder.read import attach_adapter_folder
from tunekit.model.load import make_meta_model
from tunekit.model.storage.rewrite import Rewriter
from tunekit.recipe.model import ModelSection
from tunekit.records import ExecutionSettings
from tunekit.tuned.network import prepare_network


def attach_to_base(folder: Path, section: ModelSection) -> tuple[AttachedAdapter, Rewriter]:
    """The adapter, attached to its base on the meta device, and a reader of the base's weights."""
    rewriter = Rewriter(section, "full" if section.quantization == "none" else "dequantized")
    return attach_without_weights(folder, section, rewriter), rewriter


def attach_without_weights(folder: Path, section: ModelSection, rewriter: Rewriter) -> AttachedAdapter:
    """The adapter, attached to its base on the meta device. Only the adapter's tensors have values."""
    cpu = torch.device("cpu")
    base = make_meta_model(section, device=cpu, all_parts=True)
    attach = partial(
        attach_adapter_folder,
        base.net,
        folder,
        head_name=base.family.head_name(base.net),
        base_fingerprint=rewriter.fingerprint(),
        device=cpu,
        base_weight=rewriter.base_weight,
    )
    attached = prepare_network(base, ExecutionSettings(), attach, planned_for=cpu).adapter
    assert attached is not None
    return attached
