"""The bounded cache of tensors on disk."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tunekit.files.tensor_cache import TensorCache


def test_the_oldest_files_are_removed(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 5000)
    for number in range(5):
        cache.write(str(number), {"a": torch.full((300,), float(number))})  # 1,200 bytes and a header
        os.utime(tmp_path / f"{number}.features", (number, number))
    assert [cache.read(str(number)) is None for number in range(5)] == [True, True, False, False, False]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5000
    stored = cache.read("4")
    assert stored is not None
    assert torch.equal(stored["a"], torch.full((300,), 4.0))
    TensorCache(tmp_path, 3000).write("5", {"a": torch.zeros(300)})  # another process counts the files that are there
    assert sorted(file.name for file in tmp_path.iterdir()) == ["4.features", "5.features"]


def test_every_bit_is_kept(tmp_path: Path) -> None:
    cache, values = TensorCache(tmp_path, 2**20), torch.randn(50, 7).to(torch.bfloat16)
    cache.write("a", {"a": values, "grid": torch.tensor([[1, 4, 6]])})
    stored = cache.read("a")
    assert stored is not None
    assert torch.equal(stored["a"].view(torch.int16), values.view(torch.int16))
    assert stored["grid"].tolist() == [[1, 4, 6]]


def test_damaged_files_are_no_entries(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 2**20)
    cache.write("a", {"a": torch.zeros(50)})
    path = tmp_path / "a.features"
    whole = path.read_bytes()
    for content in (b"", whole[:-3], whole[:-3] + b"abc", whole[:20]):
        path.write_bytes(content)
        assert cache.read("a") is None
    assert cache.read("b") is None


def test_a_cache_that_cannot_be_written_stores_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file" / "images", 2**20)
    cache.write("a", {"a": torch.zeros(5)})
    assert cache.read("a") is None
    small = TensorCache(tmp_path / "small", 10)
    small.write("a", {"a": torch.zeros(500)})
    assert small.read("a") is None
