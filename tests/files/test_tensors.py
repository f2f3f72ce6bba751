"""Safetensors files: written as the format's own library writes them, read strictly, with the caller's error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunekit.errors import AdapterError, InputError, ModelError, RunFolderError
from tunekit.files.tensors import DTYPES, iterate_tensors, read_tensor, read_tensor_header, write_tensors
from tunekit.files.untrusted import ADAPTER_FILE, MODEL_FILE, RUN_FILE, FileKind

KINDS = [(ADAPTER_FILE, AdapterError), (MODEL_FILE, ModelError), (RUN_FILE, RunFolderError)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    every = {
        f"t.{name}": torch.randint(0, 2, (3, 4), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        if name in ("F64", "F32", "BF16", "I64", "U8", "BOOL")
    }
    return {**every, "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "turned": torch.randn(3, 5).t()}


def test_files_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    size, _ = write_tensors(tmp_path / "ours", tensors(), {"format": "pt"})
    contiguous = {name: tensor.contiguous() for name, tensor in tensors().items() if name != "turned"}
    write_tensors(tmp_path / "same", contiguous, {"format": "pt"})
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert size == (tmp_path / "ours").stat().st_size
    assert load_file(tmp_path / "ours").keys() == tensors().keys()
    read, theirs = load_file(tmp_path / "same"), load_file(tmp_path / "theirs")
    assert all(torch.equal(read[name], theirs[name]) for name in contiguous)


def test_tensors_come_back_alone_and_all_together(tmp_path: Path) -> None:
    path, written = tmp_path / "file", tensors()
    write_tensors(path, written)
    header = read_tensor_header(path)
    assert header.keys() == written.keys()
    for name, tensor in iterate_tensors(path, header):
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor, written[name])
        assert torch.equal(read_tensor(path, header[name]), tensor)


@pytest.mark.parametrize(("kind", "error"), KINDS)
@pytest.mark.parametrize("text", ['{"a":1,"a":2}', '{"a":NaN}', "[]", '{"a":' * 50_000, '{"a":7}'])
def test_a_hostile_header_is_refused_with_the_error_of_its_kind(
    kind: FileKind, error: type[InputError], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(error, match="file: "):
        read_tensor_header(path, kind)


def test_only_a_model_may_be_a_link(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "file")
    (tmp_path / "link").symlink_to("file")
    assert read_tensor_header(tmp_path / "link", MODEL_FILE)["a"].shape == (2,)
    with pytest.raises(AdapterError, match="is a link"):
        read_tensor_header(tmp_path / "link")


def test_a_header_longer_than_its_kind_allows_is_not_read(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"a": "x" * 1000}}).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
    assert read_tensor_header(tmp_path / "file") == {}
    with pytest.raises(AdapterError, match="at most 100 are read"):
        read_tensor_header(tmp_path / "file", FileKind(AdapterError, json_bytes=100))


def test_a_file_that_grew_or_shrank_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, tensors())
    header = read_tensor_header(path, RUN_FILE)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(RunFolderError, match="changed"):
        dict(iterate_tensors(path, header, RUN_FILE))
    last = list(header)[-1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match="ends before"):
        read_tensor(path, header[last], RUN_FILE)
