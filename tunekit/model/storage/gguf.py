"""GGUF files as a base: read by transformers, unpacked to dense weights, and parsed only once. Layers can keep the
file's own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.errors import ModelError
from tunekit.model.families import text_config
from tunekit.model.quantized import blocks
from tunekit.model.quantized.weights import PackedLinear, kept_linear, weight_of
from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import replaced


def gguf_arguments(source: ModelSource) -> dict[str, Any]:
    """Arguments with which transformers unpacks all weights, because it cannot train or merge packed ones."""
    import transformers

    settings = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    arguments: dict[str, Any] = {"gguf_file": source.gguf_file}
    return arguments if settings is None else arguments | {"quantization_config": settings(dequantize=True)}


@contextmanager
def parsed_once(name_or_path: str) -> Iterator[None]:
    """Cache the parsed file and its table of names inside the block, because transformers requests both repeatedly.

    Parsing SmolLM2's file takes more than two seconds, most of them for the strings of its tokenizer.
    """
    if not name_or_path.lower().endswith(".gguf"):
        yield
        return
    import gguf

    cached = {name: lru_cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with replaced(vars(gguf), **cached):
        yield


class FileBlocks:
    """The matrices of a GGUF file in their own blocks. `net`: the net that transformers reads from this file.

    Raises: ModelError if the base is not a GGUF file.
    """

    def __init__(self, source: ModelSource, net: nn.Module) -> None:
        import gguf

        if source.gguf_file is None:
            what = f"kept keeps the blocks of a .gguf file, and {source.folder} is a folder"
            raise ModelError(what, "name a .gguf file, or write nf4", key="model.quantization")
        reader = gguf.GGUFReader(str(source.folder / source.gguf_file))
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = reader.fields["general.architecture"].contents()
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        config = text_config(net)
        self.names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        heads = config.num_attention_heads
        self.heads = dict.fromkeys((heads, getattr(config, "num_key_value_heads", heads)))

    def layer(self, name: str, linear: nn.Module, dtype: torch.dtype) -> PackedLinear | None:
        """The layer with the file's blocks; None if the file has other numbers, or blocks that cannot be unpacked.

        `linear`: the dense layer that transformers made from the file. Some architectures have the rows of a matrix in
        another order in the file, so the blocks are compared with it. On the meta device they are not.
        """
        tensor = self.tensors.get(f"{self.names.get_name(name)}.weight")
        weight = weight_of(linear)
        if tensor is None or weight is None:
            return None
        kind, size = tensor.tensor_type.name.lower(), blocks.block_size(tensor.tensor_type.name.lower())
        if size is None or weight.shape[1] % size[0]:
            return None
        shape = weight.shape[0], blocks.row_bytes(kind, weight.shape[1])
        if next(linear.parameters()).is_meta:
            return kept_linear(linear, kind, torch.empty(shape, dtype=torch.uint8, device="meta"), dtype)
        packed, dense = torch.from_numpy(tensor.data.copy()).view(shape), weight.read(dtype)
        for rows in (packed, *(_halves_together(packed, heads) for heads in self.heads)):
            if rows is not None and torch.equal(blocks.unpack(rows, weight.shape, kind, dtype), dense):
                return kept_linear(linear, kind, rows.contiguous(), dtype)
        return None


def _halves_together(packed: Tensor, heads: int) -> Tensor | None:
    """Rows (O, bytes) in transformers' order, if the file has the two halves of each head's rows interleaved.

    Source: LlamaModel.permute in llama.cpp's converter, which this undoes.
    """
    if packed.shape[0] % (2 * heads):
        return None
    return packed.view(heads, -1, 2, packed.shape[1]).transpose(1, 2).reshape(packed.shape)
