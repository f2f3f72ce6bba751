"""Bases packed while they are loaded, and their sidecar: the same bytes, bounded memory, never a stale file."""

from __future__ import annotations

import errno
import faulthandler
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

from tests.conftest import write_tiny_llama
from tests.model.test_four_bit import with_peak
from tests.model.test_reading import KINDS, save
from tests.support.packed import packed_hash
from tests.support.train_case import in_child
from tunekit.errors import ModelError
from tunekit.files import durable
from tunekit.model.base_spec import read_base_spec
from tunekit.model.load import LoadedModel, load_model
from tunekit.model.quantized import four_bit
from tunekit.model.quantized.weights import PackedLinear, packed_layers, weight_of
from tunekit.model.storage import sidecar
from tunekit.model.storage.packing import packed_base
from tunekit.model.storage.reading import open_net
from tunekit.model.storage.source import find_source
from tunekit.recipe.model import ModelSection

CPU, IDS = torch.device("cpu"), torch.arange(3, 12)[None]
QUANTIZATIONS = ("nf4", "fp4", "int8", "int8_weight_only")


@pytest.fixture
def bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sidecars, in which a base of any size is kept."""
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sidecar, "MIN_BYTES", 0)
    return tmp_path / "cache" / "bases"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "base")


def load(folder: Path, quantization: str = "nf4", **settings: Any) -> LoadedModel:
    section = ModelSection(name_or_path=str(folder), quantization=quantization, **{"dtype": "float32", **settings})
    return load_model(section, device=CPU)


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert (tensor.shape, tensor.dtype) == (b[name].shape, b[name].dtype)
        assert torch.equal(tensor, b[name]), name
    assert [name for name, _ in first.named_parameters()] == [name for name, _ in second.named_parameters()]
    for (name, tensor), (_, other) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(tensor, other), name


CASES = [("llama", "float32", QUANTIZATIONS), ("llama", "bfloat16", QUANTIZATIONS)]
CASES += [(kind, "bfloat16", ("nf4",)) for kind in ("gpt2", "gemma", "mixtral", "t5", "bart", "bart-classifier")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "dtype", "quantizations"), CASES)
def test_a_base_packed_while_it_is_read_equals_one_packed_afterwards(
    kind: str,
    dtype: str,
    quantizations: tuple[str, ...],
    bases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save(KINDS[kind](), tmp_path / "base", max_shard_size="20KB")
    for quantization in quantizations:
        mapped = load(folder, quantization, dtype=dtype)
        assert mapped.sidecar is not None
        with monkeypatch.context() as patch:
            patch.setattr(sidecar, "MIN_BYTES", 2**40)
            in_memory = load(folder, quantization, dtype=dtype)
            patch.setattr("tunekit.model.load.open_net", lambda *_: None)
            afterwards = load(folder, quantization, dtype=dtype)
        assert in_memory.sidecar is None
        for found in (mapped, in_memory):
            assert_equal(afterwards.net, found.net)
            assert (found.facts, found.notes) == (afterwards.facts, afterwards.notes)
            ours, theirs = (getattr(each, "generation_config", None) for each in (found, afterwards))
            assert (ours and ours.to_dict()) == (theirs and theirs.to_dict())
            assert not any(tensor.data_ptr() % 64 for tensor in found.net.state_dict().values())


def test_layers_that_transformers_keeps_in_float32_are_not_packed(tmp_path: Path) -> None:
    """T5's wo, whose products overflow in float16. A merged model with packed numbers there could not be loaded."""
    folder = save(KINDS["t5"](), tmp_path / "base")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=packing)
    expected = {name for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    for dtype in ("float32", "bfloat16"):
        net = load(folder, dtype=dtype).net
        assert {name for name, module in net.named_modules() if isinstance(module, PackedLinear)} == expected
        assert net(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()


def test_the_second_load_maps_what_the_first_packed(base: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(base)
    written = only(bases).stat()
    monkeypatch.setattr("tunekit.model.quantized.weights.codec.pack", None)  # nothing is packed again
    second = load(base)
    assert_equal(first.net, second.net)
    assert packed_hash(first.net) == packed_hash(second.net)
    assert only(bases).stat().st_mtime_ns == written.st_mtime_ns
    x = torch.arange(12)[None]
    assert torch.equal(first.net(input_ids=x).logits, second.net(input_ids=x).logits)


def test_other_settings_have_files_of_their_own(base: Path, bases: Path) -> None:
    for settings in ({}, {"double_quantization": False}, {"dtype": "bfloat16"}, {"quantization": "fp4"}):
        load(base, **settings)
    assert len(list(bases.iterdir())) == 4
    load(base)
    assert len(list(bases.iterdir())) == 4


def change_one_number(folder: Path) -> None:
    """In place, with size and time of the last change as before."""
    path = folder / "model.safetensors"
    before = path.stat()
    stored = load_file(path)
    stored["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    save_file(stored, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("sampled", [True, False])
def test_a_changed_base_is_packed_anew(base: Path, bases: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sampled:  # as where a base is so large that its fingerprint does not see the number
        monkeypatch.setattr("tunekit.model.storage.inspection.fingerprint", lambda source: "the same")
    before = load(base)
    kept = only(bases)
    change_one_number(base)
    after = load(base)
    assert packed_hash(after.net) != packed_hash(before.net)
    assert only(bases) != kept, "what was made of the old files is gone"
    monkeypatch.setattr("tunekit.model.load.open_net", lambda *_: None)
    assert_equal(load(base).net, after.net)


def test_a_base_that_changes_while_it_is_read_is_not_kept(
    base: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sidecar.write_sidecar

    def changed_meanwhile(*given: Any) -> Any:
        opened = write(*given)
        change_one_number(base)
        return opened

    monkeypatch.setattr("tunekit.model.storage.packed_cache.write_sidecar", changed_meanwhile)
    loaded = load(base)
    assert loaded.sidecar is None
    assert list(bases.iterdir()) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def relabel(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"key":"', b'"key":"f', 1))


def reshape(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"shape":[264,64]', b'"shape":[64,264]', 1))


def swap(path: Path) -> None:
    """Two tensors of one shape exchange their names: size, tiling and layout fit."""
    text = path.read_bytes()
    q, o = (f"layers.0.self_attn.{name}_proj.packed".encode() for name in "qo")
    path.write_bytes(text.replace(q, b"#", 1).replace(o, q, 1).replace(b"#", o, 1))


@pytest.mark.parametrize("damage", [flip, truncate, empty, relabel, reshape, swap])
def test_a_damaged_sidecar_is_made_anew(
    base: Path, bases: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(base)
    before = only(bases).read_bytes()
    damage(only(bases))
    assert only(bases).read_bytes() != before
    again = load(base)
    assert only(bases).read_bytes() == before
    monkeypatch.setattr("tunekit.model.load.open_net", lambda *_: None)
    assert_equal(load(base).net, again.net)


def no_folder(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bases.parent.write_text("a file where the folder would be")


def no_space(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, sidecar.SPARE_BYTES))


def full_later(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform, left = durable.perform, iter(range(20))

    def failing(kind: str, path: Path, action: Callable[[], Any]) -> Any:
        if kind == "write" and next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return perform(kind, path, action)

    monkeypatch.setattr(durable, "perform", failing)


@pytest.mark.parametrize("obstacle", [no_folder, no_space, full_later])
def test_where_nothing_can_be_kept_the_base_is_held_in_memory(
    base: Path, bases: Path, obstacle: Callable[[Path, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacle(bases, monkeypatch)
    loaded = load(base)
    assert loaded.sidecar is None
    assert any(note.startswith("the packed base is not cached for the next run (") for note in loaded.notes)
    assert not bases.is_dir() or list(bases.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("tunekit.model.load.open_net", lambda *_: None)
    assert_equal(load(base).net, loaded.net)


def test_the_file_is_plain_safetensors_with_layers_that_are_contiguous(base: Path, bases: Path) -> None:
    model = load(base)
    opened = model.sidecar
    assert opened is not None
    state = model.net.state_dict()
    with safe_open(str(opened.path), framework="pt") as file:
        assert {name for name in file.keys() if not name.startswith(sidecar.FILLER)} == set(state)  # noqa: SIM118
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state.items())
    starts = {name: opened.files.headers[name].offset_bytes for name in opened.names}
    assert sorted(starts.values()) == list(starts.values())
    assert all(start % 64 == 0 for start in starts.values())
    assert set(opened.names[:3]) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, _ in model.family.layers(model.net):
        first, *others = [name for name in opened.names if name.startswith(f"{layer}.")]
        assert starts[first] % 4096 == 0
        for name in (first, *others):
            assert torch.equal(opened.view(name), state[name])
            assert opened.view(name).data_ptr() == state[name].data_ptr()
            assert state[name].data_ptr() - state[first].data_ptr() == starts[name] - starts[first]
        assert starts[others[-1]] - starts[first] < sum(state[name].nbytes + 64 for name in (first, *others[:-1]))
    assert torch.equal(opened.view("lm_head.weight"), state["lm_head.weight"])


def test_views_cannot_be_written_to(base: Path, bases: Path, tmp_path: Path) -> None:
    model = load(base)
    (name, layer), *_ = packed_layers(model.net).items()
    ended = in_child(lambda: layer.get_buffer("packed").zero_() and None, tmp_path / "log", faulthandler.disable)
    assert ended.code == -11
    assert layer.get_buffer("packed").any(), name


def test_a_mapped_layer_is_replaced_and_leaves_the_file_alone(base: Path, bases: Path) -> None:
    model = load(base)
    before = only(bases).read_bytes()
    for name in ("model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"):
        handle = weight_of(model.net.get_submodule(name))
        assert handle is not None
        handle.replace(handle.read() + 1)
        assert handle.read().mean() > 0.5
    assert only(bases).read_bytes() == before
    assert not torch.equal(load(base).net.state_dict()["lm_head.weight"], model.net.state_dict()["lm_head.weight"])


def test_numbers_that_are_not_finite_are_refused_and_nothing_is_kept(base: Path, bases: Path) -> None:
    path = base / "model.safetensors"
    stored = load_file(path)
    for value in (float("nan"), float("inf")):
        stored["model.layers.1.self_attn.v_proj.weight"][1, 1] = value
        save_file(stored, path, metadata={"format": "pt"})
        for quantization in ("nf4", "int8_weight_only"):
            with pytest.raises(ModelError, match="contains NaN or infinity"):
                load(base, quantization)
    assert list(bases.iterdir()) == []


@pytest.mark.drawn
def test_loading_holds_the_packed_base_and_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that torch has allocated at most: in memory of its own, and where the sidecar takes the tensors."""
    monkeypatch.setattr(four_bit, "CHUNK_ELEMENTS", 2**12)
    for name in ("reading", "mapped_files"):
        monkeypatch.setattr(f"tunekit.model.storage.{name}.CHUNK_BYTES", 2**14)
    folder = write_tiny_llama(tmp_path / "base", layers=6, hidden=256)
    section = ModelSection(name_or_path=str(folder), quantization="nf4", dtype="bfloat16")
    spec = read_base_spec(find_source(section, weights=True), section, CPU, weights=True)
    opened_net = open_net(spec)
    assert opened_net is not None
    packed = packed_base(*opened_net, spec)
    held = sum(place.size_bytes for place in packed.layout)
    matrix, small = 2 * 256 * 512, 8 * 4 * 2**12  # the largest, and what is held beside it; a whole base has 5.0 MB
    assert held + 2 * matrix + small < 6 * (4 * 256 * 256 + 3 * 256 * 512) * 2

    _, peak = with_peak(packed.fill)
    assert peak < held + matrix + small + 2**16
    path = tmp_path / "side.safetensors"
    write = partial(sidecar.write_sidecar, path, "key", packed.layout)
    _, peak = with_peak(lambda: write(packed.iterate_tensors(in_parts=True)))
    assert peak < 2 * matrix + small + 2**16 < held
    opened = sidecar.open_sidecar(path, "key", packed.layout)
    assert opened is not None
    _, peak = with_peak(lambda: packed.map(opened))
    assert peak < 2**12


def test_every_packed_buffer_of_a_loaded_base_keeps_its_kind(base: Path, bases: Path) -> None:
    model = load(base, "int8_weight_only")
    layer = model.net.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, PackedLinear)
    assert {name: tensor.dtype for name, tensor in layer.tensors().items()} == {
        "packed": torch.int8,
        "absmax": torch.float32,
    }
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
