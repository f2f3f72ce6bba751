"""GGUF files as a base: parsed only once, and read tensor by tensor, unpacked or in the file's own blocks. Where the
net's tensors are not simply those of the file, transformers reads the whole file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunekit.errors import ModelError, listed
from tunekit.files.tensors import TensorEntry
from tunekit.model.families import text_config
from tunekit.model.quantized import blocks
from tunekit.model.quantized.four_bit import CHUNK_ELEMENTS
from tunekit.model.quantized.weights import PackedLinear, kept_linear, weight_of
from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import replaced

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

Numbers = NDArray[np.uint8] | NDArray[np.float32]  # blocks, or unpacked

# transformers' classes that give each tensor of the file to one tensor of the net, in the same shape
ROW_PROCESSORS = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor")
REORDERED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
HEADS = {"num_attention_heads": "head_count", "num_key_value_heads": "head_count_kv"}


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


class GgufFiles:
    """The tensors of a GGUF file under the names of the net's, with the numbers that transformers reads.

    `tensors`: gguf's entries by the net's names. `processor`: transformers' object that reorders the rows of a matrix.
    """

    mapped = False  # no tensor is a view of the file

    def __init__(self, tensors: dict[str, ReaderTensor], processor: TensorProcessor) -> None:
        self._tensors, self._processor = tensors, processor
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
        self.headers = {name: TensorEntry("", torch.float32, shape, 0) for name, shape in shapes.items()}

    def view(self, name: str) -> Tensor:
        """The unpacked tensor, float32."""
        target = torch.empty(self.headers[name].shape)
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy the unpacked tensor into `target` (same shape, any strides and dtype), some rows at a time if their
        order is that of the file."""
        import gguf

        tensor = self._tensors[name]
        rows, reordered = target.shape[0], tensor.name.endswith(REORDERED)
        step = rows if reordered else max(1, CHUNK_ELEMENTS * rows // max(1, target.numel()))
        for first in range(0, rows, step):
            values = gguf.quants.dequantize(tensor.data[first : first + step], tensor.tensor_type)
            target[first : first + step] = torch.from_numpy(np.array(self._in_order(tensor, values)))

    def blocks(self, name: str) -> Tensor:
        """The blocks of a matrix, its rows in the order of the net: (O, bytes) uint8."""
        tensor = self._tensors[name]
        return torch.from_numpy(np.array(self._in_order(tensor, tensor.data)))

    def _in_order(self, tensor: ReaderTensor, values: Numbers) -> Numbers:
        """`values` of rows of a tensor, as the net has them."""
        return self._processor.process(weights=values, name=tensor.name).weights


def gguf_files(source: ModelSource, net: nn.Module) -> GgufFiles | None:
    """The file's tensors for a net of transformers; None if a tensor of the net might not be exactly one of the file.

    Raises: ModelError if layers of the net lack tensors of the file, such as biases.
    Source: load_gguf_checkpoint of transformers.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as legacy

    reader = gguf.GGUFReader(str(source.folder / str(source.gguf_file)))
    architecture = str(reader.fields["general.architecture"].contents())
    kind = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
    if kind.__name__ not in ROW_PROCESSORS or architecture in _packed_architectures():
        return None
    counts = {name: reader.fields.get(f"{architecture}.attention.{key}") for name, key in HEADS.items()}
    processor = kind(config={name: field.contents() for name, field in counts.items() if field is not None})
    try:
        names = legacy.get_gguf_hf_weights_map(net, processor)
    except NotImplementedError:  # gguf does not know this type of model
        return None
    if unread := [each.name for each in reader.tensors if each.name not in names and _is_computed_with(each.name, net)]:
        what = f"{source.name_or_path} has tensors that transformers leaves out ({listed(unread, 3)})"
        raise ModelError(what, "name the model's folder instead of the file", key="model.name_or_path")
    return GgufFiles({names[each.name]: each for each in reader.tensors if each.name in names}, processor)


def _is_computed_with(name: str, net: nn.Module) -> bool:
    """Whether llama.cpp computes the net's layers with a tensor; not the layers after its last one, or rotations."""
    part, _, rest = name.removeprefix("blk.").partition(".")
    in_layer = name.startswith("blk.") and int(part) < text_config(net).num_hidden_layers
    return in_layer and not rest.startswith("attn_rot_embd")


def _packed_architectures() -> Collection[str]:
    """Architectures that transformers reads by other code."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # older versions read all in the same way
        return ()
    return tuple(GGUF_ARCHS)


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
