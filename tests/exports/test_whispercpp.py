"""`--to whispercpp`: the file's layout, what it cannot hold, and whisper.cpp's own log-probabilities."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from tests.support.programs import needs
from tests.support.speech_case import write_tiny_whisper
from tunekit.errors import DataError, InputError
from tunekit.export import CERTIFICATE, export_verb
from tunekit.exports.recordings import make_recordings
from tunekit.model.storage.shards import ShardReader
from tunekit.targets.exportable import make_exportable
from tunekit.targets.target import find_target

TYPES = {0: np.float32, 1: np.float16}


def numbers(file: BinaryIO, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}i", file.read(4 * count))


def read_file(path: Path) -> tuple[tuple[int, ...], np.ndarray, list[bytes], dict[str, np.ndarray]]:
    """Sizes, filters, vocabulary and tensors of a file, read to its end."""
    with path.open("rb") as file:
        sizes = numbers(file, 12)
        bands, frequencies = numbers(file, 2)
        filters = np.frombuffer(file.read(4 * bands * frequencies), np.float32).reshape(bands, frequencies)
        tokens = [file.read(numbers(file, 1)[0]) for _ in range(numbers(file, 1)[0])]
        tensors = {}
        while start := file.read(12):
            count, length, kind = struct.unpack("<3i", start)
            shape = numbers(file, count)[::-1]
            name = file.read(length).decode()
            values = np.dtype(TYPES[kind])
            tensors[name] = np.frombuffer(file.read(values.itemsize * int(np.prod(shape))), values).reshape(shape)
    return sizes, filters, tokens, tensors


def test_layout(tiny_whisper: Path, tmp_path: Path) -> None:
    export_verb(str(tiny_whisper), "whispercpp", str(tmp_path / "model.bin"), certify=False)
    sizes, filters, tokens, tensors = read_file(tmp_path / "model.bin")
    config = json.loads((tiny_whisper / "config.json").read_text())
    assert sizes == (0x67676D6C, config["vocab_size"], 100, 32, 4, 2, 64, 32, 4, 2, 16, 1)
    assert filters.shape == (16, 201)
    assert len(tokens) < config["vocab_size"]
    assert b"e" in tokens
    assert b"\n" in tokens
    stored = ShardReader(tiny_whisper)
    key = stored.read("model.encoder.layers.1.self_attn.k_proj.weight")
    assert np.array_equal(tensors["encoder.blocks.1.attn.key.weight"], key.half().numpy())
    cross = stored.read("model.decoder.layers.0.encoder_attn.out_proj.bias")
    assert np.array_equal(tensors["decoder.blocks.0.cross_attn.out.bias"], cross.numpy())
    positions = stored.read("model.decoder.embed_positions.weight")
    assert np.array_equal(tensors["decoder.positional_embedding"], positions.numpy())
    assert tensors["encoder.conv1.bias"].shape == (32, 1)
    assert tensors["encoder.conv1.bias"].dtype == np.float32
    assert len(tensors) == len([name for name in stored if name != "proj_out.weight"])


@pytest.mark.drawn
def test_the_adapter_is_merged(speech_run: Path, tiny_whisper: Path, tmp_path: Path) -> None:
    export_verb(str(speech_run), "whispercpp", str(tmp_path / "model.bin"), certify=False)
    query = read_file(tmp_path / "model.bin")[3]["decoder.blocks.0.attn.query.weight"]
    base = ShardReader(tiny_whisper).read("model.decoder.layers.0.self_attn.q_proj.weight")
    assert float((torch.from_numpy(query.astype(np.float32)) - base).abs().max()) > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_a_shape_that_whisper_cpp_does_not_have(tmp_path: Path) -> None:
    base = write_tiny_whisper(tmp_path / "base")
    with pytest.raises(InputError, match=r"feed-forward layers have 48 units, and whisper\.cpp has 128"):
        export_verb(str(base), "whispercpp", str(tmp_path / "model.bin"))


def test_a_text_model(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"whisper\.cpp reads Whisper models, and this is llama"):
        export_verb(str(tiny_llama), "whispercpp", str(tmp_path / "model.bin"))


@pytest.mark.drawn
def test_a_run_without_its_recordings_is_compared_on_noise(speech_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise DataError("is missing", file="sounds")

    monkeypatch.setattr("tunekit.targets.rows.load_rows", gone)
    compared = make_recordings(make_exportable(find_target(str(speech_run), None, []))).questions
    reason = "because the run's rows cannot be read (sounds: is missing)"
    assert compared.described == f"one recording of noise, {reason}"


class TestProgram:
    pytestmark = needs("whisper.cpp")

    @pytest.mark.parametrize("target", ["tiny_whisper", "speech_run"])
    def test_certificate(self, target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        """float16 matrices, and nothing else, separate the program from torch."""
        path = tmp_path / "model.bin"
        export_verb(str(request.getfixturevalue(target)), "whispercpp", str(path), certify=True)
        part = json.loads(Path(f"{path}.{CERTIFICATE}").read_text())["certificate"]["parts"]["F16"]
        assert 0 < part["largest"] < 0.05
        assert part["perplexity"] == pytest.approx(part["torch_perplexity"], rel=1e-2)
