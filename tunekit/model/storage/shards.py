"""Reads and writes folders of safetensors files one tensor at a time, in limited memory."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tunekit.contracts import Tensors
from tunekit.errors import ModelError
from tunekit.files.durable import rename, write_json
from tunekit.files.tensors import TensorEntry, read_tensor, read_tensor_header, write_tensors
from tunekit.files.untrusted import MODEL_FILE

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FETCH = "fetch the model's folder again"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def holds_weights(folder: Path) -> bool:
    """Whether the folder contains files with weights, also in formats that tunekit does not read."""
    return any(path.suffix in (*PICKLES, ".safetensors") for path in folder.iterdir())


def shard_files(folder: Path) -> list[str]:
    """Names of the model's safetensors files, sorted.

    Raises: ModelError for a missing shard, a name outside the folder, or pickled weights.
    """
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():
        return sorted(set(_read_index(folder).values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        what = f"{folder} contains pickled weights ({pickles[0]}), and reading a pickle can run code"
        how = "convert the file to safetensors in a sandbox"
    else:
        what, how = f"{folder} contains no {SINGLE}", "name a folder with safetensors weights, or a .gguf file"
    raise ModelError(what, how, key="model.name_or_path")


def _read_index(folder: Path) -> dict[str, str]:
    """Read the index: tensor name -> file name. All files must be in the folder itself."""
    from tunekit.model.storage.source import read_json

    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index contains no weight_map", "fetch it again", file=str(path))
    for name in {str(value) for value in weight_map.values()}:
        if Path(name).name != name or "\\" in name or name in ("", ".", "..") or not name.endswith(".safetensors"):
            what = f"the index names {name!r}, which is not a safetensors file of its folder"
            raise ModelError(what, FETCH, file=str(path))
    return {str(key): str(value) for key, value in weight_map.items()}


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Read the file, dtype and shape of every tensor from the headers of the files. The sizes of the files are checked.

    Raises: ModelError for a file that is truncated, damaged, not safetensors, or contradicts the index.
    """
    files = shard_files(folder)
    headers: dict[str, TensorEntry] = {}
    for name in files:
        for tensor, header in read_tensor_header(folder / name, MODEL_FILE).items():
            if tensor in headers:
                what = f"the tensor {tensor} is in this file and in {headers[tensor].file}"
                raise ModelError(what, "delete the file that is not part of the model", file=str(folder / name))
            headers[tensor] = header
    if files != [SINGLE]:
        for tensor, file in _read_index(folder).items():
            if tensor not in headers or headers[tensor].file != file:
                raise ModelError(
                    f"the file lacks the tensor {tensor}, which the index expects there", FETCH, file=str(folder / file)
                )
    return headers


class ShardReader:
    """Reads a folder's tensors by name, one at a time; a file is open only while one of its tensors is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers = read_headers(folder)

    def __iter__(self) -> Iterator[str]:
        """The names of the tensors, in the order of the files and of the data in each file."""
        return iter(self.headers)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in new memory."""
        entry = self.headers[name]
        return read_tensor(self.folder / entry.file, entry, MODEL_FILE)


class ShardWriter:
    """Writes tensors into shards of at most `max_shard_bytes`, then gives the files their final names."""

    def __init__(self, folder: Path, max_shard_bytes: int = 4 * 2**30) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self._pending: Tensors = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor. If the shard would become too large, the pending tensors are written first."""
        if name in self._names:
            raise ValueError(f"the tensor {name} would be written twice")
        self._names.add(name)
        stored = tensor.detach().to("cpu").contiguous()
        if self._pending and self._pending_bytes + stored.nbytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = stored
        self._pending_bytes += stored.nbytes

    def _flush(self) -> None:
        write_tensors(self._shard_path(len(self._shards)), self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> list[str]:
        """Write the remaining tensors, and give the files their final names. A single shard is named model.safetensors;
        several shards also get an index. Returns the file names."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for index, name in enumerate(names):
            rename(self._shard_path(index), self.folder / name)
        if count > 1:
            weight_map = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            content = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, content)
            names = [*names, INDEX]
        return names

    def _shard_path(self, index: int) -> Path:
        """The temporary name of a shard, used until the number of shards is known."""
        return self.folder / f"shard-{index + 1:05d}.safetensors"
