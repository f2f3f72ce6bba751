"""NF4 and FP4 in plain torch against bitsandbytes' own CPU code, bit for bit, and against the definition."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunekit.model.quantized import codec, four_bit

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def functional() -> Any:
    if not codec.has_bitsandbytes():
        pytest.skip("bitsandbytes is not installed")  # importorskip would import it, and its import compiles
    return codec.import_bitsandbytes().functional


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_the_bounds() -> Tensor:
    """Numbers exactly between two values, and one step of float32 to either side."""
    found = []
    for kind in KINDS:
        values = four_bit.values_of(kind).sort().values
        middle = (values[1:] + values[:-1]) / 2
        found += [values, middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)]
    numbers = torch.cat([*found, torch.zeros(-sum(map(len, found)) % 63)]).reshape(-1, 63)
    return torch.cat([numbers, torch.ones(len(numbers), 1)], dim=1)  # the last of each block makes its scale 1


MATRICES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: normal(64, 192),
    "heavy tails": lambda: normal(64, 192, seed=1) ** 5,
    "several chunks": lambda: normal(700, 1024, seed=2),
    "rows of every size": lambda: normal(300, 256, seed=3) * torch.exp(normal(300, 1, seed=4) * 8),
    "constant": lambda: torch.full((64, 64), 0.3),
    "zero": lambda: torch.zeros(32, 128),
    "some blocks zero": lambda: normal(64, 192, seed=5) * (torch.arange(192) >= 64),
    "between two values": on_the_bounds,
    "denormal": lambda: normal(64, 64, seed=6) * 1e-40,
    "tiny": lambda: normal(64, 64, seed=7) * 3e-38,
    "huge": lambda: (normal(64, 64, seed=8) * 1e36).clamp(-3e38, 3e38),
    "odd": lambda: normal(7, 13, seed=9),
    "odd, more than a block": lambda: normal(63, 65, seed=10),
    "one number": lambda: normal(1, 1, seed=11),
    "a last block in part": lambda: normal(10, 33, seed=12),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_packed_and_unpacked_are_bitsandbytes_bit_for_bit(name: str, stored: torch.dtype, functional: Any) -> None:
    matrix = MATRICES[name]().to(stored)
    if not torch.isfinite(matrix).all():
        return  # beyond float16
    for kind in KINDS:
        for double in (False, True):
            packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type=kind, compress_statistics=double)
            theirs = codec.tensors_of_state(packed, state)[0]
            ours = four_bit.pack(matrix, kind, double)
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[part], theirs[part]) for part in theirs), (kind, double)
            for dtype in DTYPES:
                expected = reference(functional, theirs, matrix, kind, dtype)
                found = unpacked(ours, matrix, kind, dtype)
                if dtype == torch.bfloat16:  # AVX512-BF16 takes what is no normal number for zero; we round it
                    exact = unpacked(ours, matrix, kind, torch.float32)
                    found = found * (exact.abs() >= torch.finfo(torch.float32).tiny)
                    expected = expected * (exact.abs() >= torch.finfo(torch.float32).tiny)
                assert torch.equal(found, expected), (kind, double, dtype)


def reference(functional: Any, tensors: dict[str, Tensor], matrix: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    operations, absmax = torch.ops.bitsandbytes, tensors["absmax"]
    if "nested_absmax" in tensors:
        code = functional.create_dynamic_map()
        nested = tensors["nested_absmax"]
        absmax = operations.dequantize_blockwise.default(absmax, nested, code, 256, torch.float32) + tensors["offset"]
    dense: Tensor = operations.dequantize_4bit.default(tensors["packed"], absmax, 64, kind, (matrix.numel(),), dtype)
    return dense.reshape(matrix.shape)


def unpacked(tensors: dict[str, Tensor], matrix: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    return codec.unpack(tensors, (matrix.shape[0], matrix.shape[1]), kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_bitsandbytes(kind: str, functional: Any) -> None:
    assert torch.equal(four_bit.values_of(kind), functional.get_4bit_type(kind, device="cpu"))
    assert torch.equal(four_bit.nested_values(), functional.create_dynamic_map())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_that_bitsandbytes_stores_as_other_numbers_are_read(storage: torch.dtype, functional: Any) -> None:
    """bnb_4bit_quant_storage, with which FSDP shards 4-bit weights."""
    matrix = normal(48, 96)
    packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    found, _ = codec.tensors_of_state(packed, state)
    assert torch.equal(found["packed"], four_bit.pack(matrix, "nf4", False)["packed"])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_form_is_bitsandbytes(kind: str, double: bool, functional: Any) -> None:
    matrix = normal(48, 96).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type=kind, compress_statistics=double)
    theirs = {"": packed, **{f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}
    ours = codec.saved_form(matrix, kind, double)
    assert set(ours) == set(theirs)
    again = codec.saved_form(matrix, kind, double)
    assert not {tensor.data_ptr() for tensor in ours.values()} & {tensor.data_ptr() for tensor in again.values()}
    facts = f".quant_state.bitsandbytes__{kind}"
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != facts)
    read = type(state).from_dict({name.removeprefix("."): ours[name] for name in ours if name}, device="cpu")
    assert read.as_dict().keys() == state.as_dict().keys()
    for name, value in state.as_dict().items():
        other = read.as_dict()[name]
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_becomes_its_nearest_value(kind: str) -> None:
    matrix = normal(32, 64)
    tensors = four_bit.pack(matrix, kind, False)
    scale = tensors["absmax"][:, None]
    distance = (four_bit.values_of(kind) * scale[..., None] - matrix[..., None]).abs()  # (32, 64, 16)
    found = four_bit.unpack(tensors, matrix.numel(), kind, torch.float32).view_as(matrix)
    torch.testing.assert_close((found - matrix).abs(), distance.min(dim=-1).values, rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(37, 129)
    whole = four_bit.pack(matrix, "nf4", True)
    dense = four_bit.unpack(whole, matrix.numel(), "nf4", torch.bfloat16)
    monkeypatch.setattr(four_bit, "CHUNK_ELEMENTS", 128)
    in_chunks = four_bit.pack(matrix, "nf4", True)
    assert all(torch.equal(in_chunks[name], tensor) for name, tensor in whole.items())
    assert torch.equal(four_bit.unpack(whole, matrix.numel(), "nf4", torch.bfloat16), dense)


def test_beside_the_tensors_only_chunks_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that torch has allocated at most, input and output left out."""
    chunk_elements = four_bit.CHUNK_ELEMENTS
    monkeypatch.setattr(four_bit, "CHUNK_ELEMENTS", 2**14)
    matrix, working = normal(1024, 1024).to(torch.bfloat16), four_bit.WORKING_BYTES * 2**14 // chunk_elements
    tensors, peak = with_peak(lambda: four_bit.pack(matrix, "nf4", True))
    assert peak - sum(tensor.nbytes for tensor in tensors.values()) <= working < matrix.nbytes
    dense, peak = with_peak(lambda: four_bit.unpack(tensors, matrix.numel(), "nf4", torch.bfloat16))
    assert peak - dense.nbytes < working


def with_peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the most bytes that torch held for it at once."""
    work()  # tables are made once
    with torch.profiler.profile(profile_memory=True) as profile:
        result = work()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, most


WITHOUT = """
import sys
import torch
sys.modules["bitsandbytes"] = None
from tunekit.model.load import load_model
from tunekit.recipe.model import ModelSection
for kind in ("nf4", "fp4", "int8_weight_only"):
    section = ModelSection(name_or_path=sys.argv[1], quantization=kind, dtype="float32")
    model = load_model(section, device=torch.device("cpu"))
    x = torch.tensor([[1, 2, 3]])
    print(model.net(input_ids=x).logits.isfinite().all().item())
"""


@pytest.mark.drawn
def test_a_base_is_packed_and_run_on_a_cpu_without_bitsandbytes(tiny_llama: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tiny_llama)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"] * 3, done.stderr[-2000:]
