"""Writes a GGUF file of a model tensor by tensor: a tensor is read, merged, quantized, written and freed before the
next."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import libgguf
import numpy as np
import torch

from tunekit.arithmetic.merge_output import check_space
from tunekit.contracts import Array
from tunekit.errors import ModelError
from tunekit.exports.llama_cpp.converter import ConvertedModel, Converter, TensorInfo, Writer, converting
from tunekit.exports.llama_cpp.types import FLOATS, Structure, block_size, choose_types
from tunekit.files.durable import read_back

CHUNK_VALUES = 2**22  # values that a thread quantizes at once


def write_model(
    converter: Converter, model: ConvertedModel, path: Path, file_type: str, imatrix: Mapping[str, Array] | None
) -> dict[str, str]:
    """Write the file. Returns the type of each tensor. `imatrix`: mean squares of the columns' activations, by tensor.

    The file begins with the names, shapes and types of all tensors, so these are computed first, without values.
    Raises: InputError if no suitable type exists for a tensor, or if the converter fails; ResourceError if the disk has
    too little space.
    """
    gguf = converter.gguf
    writer, prefix = model.gguf_writer, "MOSTLY" if file_type != "F32" else "ALL"
    with converting():
        model.prepare_tensors()
        model.ftype = gguf.LlamaFileType[f"{prefix}_{file_type}"]
        model.prepare_metadata(vocab_only=False)
    infos = writer.tensors[0]
    shapes = {name: tuple(info.shape) for name, info in infos.items() if info.dtype.name == "F32"}
    types = choose_types(file_type, shapes, structure_of(writer), imatrix)
    for name, chosen in types.items():
        infos[name].dtype = gguf.GGMLQuantizationType[chosen]
        infos[name].nbytes = int(np.prod(shapes[name])) // block_size(chosen) * libgguf.type_size(chosen_type(chosen))
    check_space(path, sum(info.nbytes for info in infos.values()))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        tensors = (
            _stored(gguf, info, types.get(name), None if imatrix is None else imatrix.get(name), threads)
            for name, info in infos.items()
        )
        write_file(gguf, writer, path, tensors)
    return types


def write_file(gguf: ModuleType, writer: Writer, path: Path, tensors: Iterable[Array]) -> None:
    """Write the file of a writer whose metadata is complete, with the values of its tensors in their order, and read
    the file back. The writer's own methods write values with numpy's `tofile`, which does not report a full disk.

    Raises: ModelError for a value of a wrong type.
    """
    for key, entry in writer.kv_data[0].items():
        if isinstance(entry.value, str) and entry.type.name != "STRING":
            what = f"{entry.value!r} of the model's configuration is a text, but {key} is a number"
            raise ModelError(what, "correct the value in generation_config.json or config.json")
    with converting():
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    [file] = writer.fout
    for values in tensors:
        writer.write_padding(file, file.tell())
        file.write(np.ascontiguousarray(values).data)
        writer.write_padding(file, values.nbytes)
        del values  # before the next tensor is read
    size_bytes = file.tell()
    writer.close()
    read_back(path, size_bytes, gguf.GGUFReader)


def _stored(
    gguf: ModuleType, info: TensorInfo, chosen: str | None, weights: Array | None, threads: ThreadPoolExecutor
) -> Array:
    """The tensor's values as the file stores them. They are read by this call and not kept."""
    values = gguf.LazyNumpyTensor.to_eager(info.tensor)
    info.tensor = None
    return values if chosen is None else quantized(values, chosen, weights, threads)


def structure_of(writer: Writer) -> Structure:
    """The model's properties that decide the types of tensors, from the file's metadata."""
    values = {key.partition(".")[2]: entry.value for key, entry in writer.kv_data[0].items()}

    def first(key: str) -> int:
        value = values.get(key, 0)
        return int(value[0] if isinstance(value, list | tuple) else value)

    heads, key_heads = first("attention.head_count"), first("attention.head_count_kv")
    ratio = heads // key_heads if key_heads else (1 if "attention.head_count_kv" not in values else 0)
    return Structure(writer.arch, first("block_count"), ratio, first("expert_count"))


def chosen_type(name: str) -> libgguf.GGMLQuantizationType:
    return libgguf.GGMLQuantizationType[name]


def quantized(values: Array, name: str, weights: Array | None, threads: ThreadPoolExecutor) -> Array:
    """The rows (..., O, I) in a ggml type, as bytes; exact for F32. `weights`: the column importance, (I,), or (E,
    I) if the values are those of E experts, (E, O, I)."""
    if name == "F32":
        return np.ascontiguousarray(values, dtype=np.float32)
    kind, columns = chosen_type(name), values.shape[-1]
    by_expert = weights is not None and weights.ndim > 1
    parts = values.reshape(len(values) if by_expert else 1, -1, columns)  # (1 or E, rows, I)
    weighted = [None] if weights is None or name in FLOATS else weights.reshape(len(parts), columns)
    size = max(1, CHUNK_VALUES // columns)
    chunks = [
        (part[start : start + size], importance)
        for part, importance in zip(parts, weighted, strict=True)
        for start in range(0, len(part), size)
    ]
    return np.concatenate(list(threads.map(lambda chunk: libgguf.quantize_rows(chunk[0], kind, chunk[1]), chunks)))
