"""Peak host memory while a base is loaded, and the bytes of a mapped file that are never read.

There are three ways to load tensors. A tensor that has the dtype of the computation and is aligned to 64 bytes is
mapped from its file; its pages become resident when they are read. Other tensors are copied or packed (quantized) one
after the other, without mapping the file. If only transformers can read the base, tensors are copied or packed while
their file is mapped.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from tunekit.errors import ModelError
from tunekit.model.families import text_config
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.four_bit import WORKING_BYTES
from tunekit.model.quantized.weights import packed_layers, stored_bytes, weight_of
from tunekit.model.storage.mapped_files import CHUNK_BYTES, MappedFiles
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection

FAULT_BYTES = 2 * 2**20  # Linux maps up to this many bytes around each page that is read
# What gguf's reader holds for each token of a vocabulary: its text, type and merge as arrays of their own. Measured:
# 158.8 MiB for a file with 49,152 tokens and 48,900 merges (gguf 0.19).
TOKEN_BYTES = 3_400


@dataclass(frozen=True)
class StoredBase:
    """The size of a base on disk, and the dtypes of its tensors (not of a GGUF file). `files`: the safetensors files;
    None if the base is not downloaded, or is a GGUF file."""

    file_bytes: int
    dtypes: frozenset[torch.dtype] = frozenset()
    gguf: bool = False
    files: MappedFiles | None = None

    def converts(self, dtype: torch.dtype) -> bool:
        """Whether some tensors must be converted to the dtype of the computation."""
        return any(stored.is_floating_point and stored != dtype for stored in self.dtypes)


def read_stored_base(section: ModelSection, base: LoadedModel) -> StoredBase:
    """Read the headers of the base's files. If the base is not downloaded yet, its configuration gives the values."""
    source = find_source(section, weights=False)
    if source.gguf_file is not None:
        return StoredBase((source.folder / source.gguf_file).stat().st_size, gguf=True)
    try:
        files = open_weights(source.folder)
    except ModelError:
        declared = getattr(base.config, "dtype", None)
        dtype = declared if isinstance(declared, torch.dtype) else base.dtype
        return StoredBase(base.facts.total_parameters * dtype.itemsize, frozenset([dtype]))
    read = [header for name, header in files.headers.items() if not name.startswith(base.family.unread)]
    size, dtypes = sum(header.size_bytes for header in read), frozenset(header.dtype for header in read)
    return StoredBase(size, dtypes, files=files)


def load_bytes(base: LoadedModel, stored: StoredBase, *, streamed: bool, cached: bool) -> int:
    """Peak memory while a base is loaded.

    `streamed`: its weights stay in their files. `cached`: its packed weights are mapped from a cache file.
    """
    net, packed = base.net, list(packed_layers(base.net).values())
    weights = map(weight_of, packed or net.modules())
    elements = max((weight.elements for weight in weights if weight is not None), default=0)  # of the largest matrix
    largest_bytes = max(parameter.nbytes for parameter in net.parameters())
    parsed = TOKEN_BYTES * int(text_config(net).vocab_size) if stored.gguf else 0  # the vocabulary
    dense, loaded = base.facts.total_parameters * base.dtype.itemsize, stored_bytes(net)
    extra = 0 if stored.files is None else stored.files.extra_bytes
    if streamed:  # one matrix, or the largest tensor that is copied unpacked, such as the embedding
        copied = base.packed_while_read or base.copied_while_read
        return parsed + max(4 * elements if packed else 0, largest_bytes if copied else 0) + extra
    if base.packed_while_read:  # the base, one matrix, and buffers for packing
        packing = (0 if cached else loaded) + elements * base.dtype.itemsize + WORKING_BYTES
        return parsed + max(packing, largest_bytes) + extra
    if base.copied_while_read:  # tensors are copied one after the other
        return parsed + loaded + CHUNK_BYTES + extra
    if stored.gguf:  # the largest tensor is unpacked to float32, then copied
        return parsed + stored.file_bytes + dense + 2 * 4 * elements
    if stored.converts(base.dtype):
        return stored.file_bytes + dense
    return stored.file_bytes + loaded + 4 * elements if packed else loaded  # a matrix that is packed is copied once


def untouched_bytes(ids: Collection[int], row_bytes: int, table_bytes: int) -> int:
    """Bytes of a mapped embedding that are never read, if only the tokens in `ids` are looked up."""
    touched = {token * row_bytes // FAULT_BYTES for token in ids}
    return max(0, table_bytes - len(touched) * FAULT_BYTES)
