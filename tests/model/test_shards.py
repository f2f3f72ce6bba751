"""Safetensors folders: written, read, and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunekit.errors import ModelError
from tunekit.model.storage.shards import ShardReader, ShardWriter, read_headers, shard_files


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(16, 8, generator=generator),
        "b": torch.randn(4, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(6).reshape(2, 3),
    }


def write(folder: Path, shard_bytes: int) -> list[str]:
    writer = ShardWriter(folder, max_shard_bytes=shard_bytes)
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    return writer.close()


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    assert write(tmp_path, 10**9) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())


def test_many_shards_have_an_index_that_transformers_reads(tmp_path: Path) -> None:
    names = write(tmp_path, 100)
    assert len(names) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensors())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors().values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    reader = ShardReader(tmp_path)
    assert set(reader) == set(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(reader.read(name), tensor)
        assert (reader.headers[name].dtype, reader.headers[name].shape) == (tensor.dtype, tuple(tensor.shape))


def test_views_and_transposes_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    writer = ShardWriter(tmp_path)
    writer.add("view", whole[1])
    writer.add("turned", whole.t())
    writer.add("same", whole)
    with pytest.raises(ValueError, match="twice"):
        writer.add("same", whole)
    writer.close()
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["view"], whole[1])
    assert torch.equal(loaded["turned"], whole.t())
    assert (tmp_path / "model.safetensors").stat().st_size < 500


def index_of(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "..", "sub/one.safetensors", "one.bin", "sub\\one.safetensors", ""]
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, 10**9)
    index_of(tmp_path, {"a": name})
    with pytest.raises(ModelError, match="not a safetensors file of its folder"):
        shard_files(tmp_path)


def test_index_at_odds_with_its_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    index_of(tmp_path, {"a": "one.safetensors", "gone": "one.safetensors"})
    with pytest.raises(ModelError, match="gone"):
        read_headers(tmp_path)


def header_file(path: Path, header: dict[str, object], data: bytes) -> None:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0]},
        7,
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(tmp_path: Path, entry: object) -> None:
    header_file(tmp_path / "model.safetensors", {"a": entry}, b"\0" * 8)
    with pytest.raises(ModelError):
        read_headers(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="the tensor a is in this file and in one"):
        read_headers(tmp_path)
