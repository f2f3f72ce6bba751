"""Reads a base from a GGUF file. The file is parsed only once, and read one tensor at a time, either unpacked or in the
file's own quantized blocks. If tensors of the net differ from the file's tensors, transformers reads the whole file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from tunekit.model.quantized.weights import PackedLinear, kept_linear, layer_kind, weight_of
from tunekit.model.storage.gguf_facts import read_facts
from tunekit.model.storage.source import ModelSource
from tunekit.model.transformers_guard import replaced

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from transformers import PreTrainedConfig
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor

# transformers' classes that give each tensor of the file to one tensor of the net, with its rows in another order
ROW_PROCESSORS = (
    *("TensorProcessor", "LlamaTensorProcessor", "BloomTensorProcessor", "GPT2TensorProcessor"),
    *("Gemma2TensorProcessor", "NemotronTensorProcessor"),
)


def gguf_arguments(source: ModelSource) -> dict[str, Any]:
    """Arguments with which transformers unpacks all weights. tunekit cannot train or merge weights that transformers
    packed."""
    import transformers

    settings = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    arguments: dict[str, Any] = {"gguf_file": source.gguf_file}
    return arguments if settings is None else arguments | {"quantization_config": settings(dequantize=True)}


@contextmanager
def parsed_once(name_or_path: str) -> Iterator[None]:
    """Context manager: cache the parsed file and the table of its tensor names, which transformers reads repeatedly.

    Parsing SmolLM2's file takes more than two seconds, mostly for the strings of its tokenizer.
    """
    if not name_or_path.lower().endswith(".gguf"):
        yield
        return
    import gguf

    cached = {name: lru_cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with replaced(vars(gguf), **cached):
        yield


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file. `rows`: for each row of the net's tensor, the index of this row in the file; None if the
    order is the same.

    `transposed`: whether the tensor is (I, O) in the net and (O, I) in the file.
    """

    entry: ReaderTensor
    rows: NDArray[np.int64] | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the net."""
        sizes = tuple(int(size) for size in self.entry.shape)  # gguf states the last axis first
        return sizes if self.transposed else sizes[::-1]

    def data(self, first: int = 0, step: int | None = None) -> NDArray[np.uint8]:
        """The stored bytes of `step` rows of the net's tensor, starting with row `first`. `step` None: all following
        rows."""
        part = slice(first, None if step is None else first + step)
        return np.array(self.entry.data[part if self.rows is None else self.rows[part]])


class GgufFiles:
    """The tensors of a GGUF file, by the names of the net's parameters. The numbers equal the numbers that transformers
    reads.

    `processor`: transformers' object that converts vectors, such as norm weights.
    """

    mapped = False  # no tensor is a view of the file

    def __init__(self, tensors: dict[str, FileTensor], processor: TensorProcessor) -> None:
        self._tensors, self._processor = tensors, processor
        self.headers = {name: TensorEntry("", torch.float32, tensor.shape, 0) for name, tensor in tensors.items()}

    def view(self, name: str) -> Tensor:
        """The unpacked tensor, float32."""
        target = torch.empty(self.headers[name].shape)
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy the unpacked tensor into `target` (same shape, any strides and dtype), some rows at a time."""
        import gguf

        tensor = self._tensors[name]
        entry, kind = tensor.entry, tensor.entry.tensor_type
        if target.dim() < 2:
            values = self._processor.process(weights=gguf.quants.dequantize(entry.data, kind), name=entry.name).weights
            target.copy_(torch.from_numpy(np.array(values)))
            return
        target = target.t() if tensor.transposed else target
        step = max(1, CHUNK_ELEMENTS * target.shape[0] // target.numel())
        for first in range(0, target.shape[0], step):
            rows = gguf.quants.dequantize(tensor.data(first, step), kind)
            target[first : first + step] = torch.from_numpy(np.array(rows))

    def blocks(self, name: str) -> Tensor:
        """The blocks of a matrix, (O, bytes) uint8. The rows are in the net's order."""
        return torch.from_numpy(self._tensors[name].data())


def gguf_files(source: ModelSource, net: nn.Module) -> GgufFiles | None:
    """The file's tensors for a net of transformers. None if transformers might convert tensors to other numbers.

    Raises: ModelError if the file has tensors, such as biases, that transformers would ignore.
    Source: load_gguf_checkpoint of transformers.
    """
    from transformers import modeling_gguf_pytorch_utils as legacy

    facts, config = read_facts(source), text_config(net)
    kind = legacy.TENSOR_PROCESSORS.get(facts.architecture, legacy.TensorProcessor)
    if facts.architecture in _packed_architectures():
        return None
    heads = getattr(config, "num_attention_heads", None)
    counts = {"num_attention_heads": heads, "num_key_value_heads": getattr(config, "num_key_value_heads", heads)}
    processor = kind(config=counts | {"n_head": heads, "hidden_size": config.hidden_size})
    try:
        names = legacy.get_gguf_hf_weights_map(net, processor)
    except NotImplementedError:  # gguf does not know this type of model
        return None
    known = {*names, *(f"{name}.weight" for name in names)}  # experts have no ending in the net
    if unread := [name for name in facts.tensors if name not in known and _is_computed_with(name, net)]:
        raise facts.refuse(f"the file has tensors that transformers ignores ({listed(unread, 3)})")
    if kind.__name__ not in ROW_PROCESSORS:
        return None
    tensors = {}
    for stored, entry in facts.tensors.items():
        if (name := names.get(stored)) is not None:
            rows = _falcon_rows(config) if facts.architecture == "falcon" else None
            order = _row_order(entry, processor, rows)
            in_columns = layer_kind(net.get_submodule(name.rpartition(".")[0])) == "conv1d" and len(entry.shape) == 2
            tensors[name] = FileTensor(entry, order, in_columns)
    return GgufFiles(tensors, processor)


def _row_order(
    entry: ReaderTensor, processor: TensorProcessor, falcon: NDArray[np.int64] | None
) -> NDArray[np.int64] | None:
    """For each row of the net's tensor, the index of this row in the file; None if the order is the same. transformers
    processes a vector of row numbers, which shows the order."""
    if len(entry.shape) < 2:
        return None
    numbers = np.arange(int(entry.shape[-1]))
    if falcon is not None and "attn_qkv" in entry.name:
        return falcon
    order = np.array(processor.process(weights=numbers, name=entry.name.replace(".weight", ".bias")).weights)
    return None if np.array_equal(order, numbers) else order


def _falcon_rows(config: PreTrainedConfig) -> NDArray[np.int64] | None:
    """For each row of Falcon's fused projection in the net, the index of this row in the file. The net stores the
    queries, keys and values of each group of heads together.

    Source: FalconModel.modify_tensors in llama.cpp's converter; this function reverses its order.
    """
    groups = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    heads, width = config.num_attention_heads, config.head_dim
    numbers = np.arange((heads + 2 * groups) * width)
    queries, keys, values = np.split(numbers, [heads * width, (heads + groups) * width])
    parts = (each.reshape(groups, -1, width) for each in (queries, keys, values))
    return np.concatenate([*parts], axis=1).reshape(-1)


def _is_computed_with(name: str, net: nn.Module) -> bool:
    """Whether the net needs this tensor: it belongs to a layer of the net, and is not a table of rotary embeddings.
    Files may contain additional layers that the net does not have."""
    part, _, rest = name.removeprefix("blk.").partition(".")
    in_layer = name.startswith("blk.") and int(part) < text_config(net).num_hidden_layers
    return in_layer and not rest.startswith("attn_rot_embd")


def _packed_architectures() -> Collection[str]:
    """Architectures whose GGUF files transformers reads with its newer, separate code."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # older versions read all in the same way
        return ()
    return tuple(GGUF_ARCHS)


class FileBlocks:
    """The matrices of a GGUF file in the file's own quantized blocks. `net`: the net that transformers made from this
    file.

    Raises: ModelError if the base is not a GGUF file.
    """

    def __init__(self, source: ModelSource, net: nn.Module) -> None:
        import gguf

        if source.gguf_file is None:
            what = f"quantization kept reads the blocks of a .gguf file, but {source.folder} is a folder"
            raise ModelError(what, "name a .gguf file, or write nf4", key="model.quantization")
        facts = read_facts(source)
        self.tensors = facts.tensors
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == facts.architecture)
        self.names = gguf.get_tensor_name_map(number, text_config(net).num_hidden_layers)

    def layer(self, name: str, linear: nn.Module, dtype: torch.dtype) -> PackedLinear | None:
        """A PackedLinear with the file's blocks. None if the blocks cannot be unpacked, or contain other numbers than
        `linear`, the dense layer that transformers made from the file.

        For some architectures the file has the rows of a matrix in a different order. The unpacked blocks are
        therefore compared with `linear`, except on the meta device.
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
        same = torch.equal(blocks.unpack(packed, weight.shape, kind, dtype), dense)
        return kept_linear(linear, kind, packed, dtype) if same else None
