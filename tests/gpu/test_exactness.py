"""What must be equal, on a GPU: packed and alone, fused and plain, recomputed, resumed, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.test_joined_lora import unfused
from tests.support import pair_case
from tests.support.data_case import objective_of
from tests.support.loop_case import Case, ListedRows, make_case, make_rows
from tests.support.steps import run_step
from tests.training.test_loop import assert_same_bits, training, weights
from tunekit.adapters.kernels.liger import use_liger
from tunekit.contracts import Batch, StepBatches
from tunekit.machine.devices import deterministic_kernels
from tunekit.model.attention.documents import PRODUCTS, VARLEN, _varlen
from tunekit.recipe.adapters.lora import LoraSettings
from tunekit.recipe.model import ModelSection
from tunekit.recipe.objectives.simpo import SimpoSettings

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}


def section(folder: Path, dtype: str = "float32", quantization: str = "none") -> ModelSection:
    return ModelSection(name_or_path=str(folder), dtype=dtype, quantization=quantization)  # type: ignore[arg-type]


def case_of(folder: Path, device: torch.device, rows: ListedRows | None = None, **settings: Any) -> Case:
    return make_case(folder, rows or make_rows(23), **{"training": training(), "device": device, **settings})


def gradient_of(case: Case, batches: list[Batch], objective: Any = None) -> tuple[Tensor, Tensor]:
    """The step's loss, and the flat gradient, of these micro-batches."""
    objective = objective or case.parts.objective
    for parameter in case.adapter.trained().values():
        torch.manual_seed(sum(parameter.shape))  # B is zero at first, and A would get no gradient
        parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
    case.optimizer.zero_gradients()
    units = torch.stack([objective.loss.units(batch) for batch in batches]).sum(0)
    step = StepBatches(0, 0.0, tuple(range(len(batches))), tuple(batches))
    with case.model.training_mode(True):
        result = run_step(case.model, objective, step, units)
    return result.total.cpu(), torch.cat(case.optimizer.gradients()).cpu()


def difference(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_documents_equal_padded_rows(folder: Path, device: torch.device, dtype: str) -> None:
    """On a GPU in half precision: one kernel over all documents; else document by document."""
    case = case_of(folder, device, model=section(folder, dtype))
    kernel = device.type == "cuda" and dtype != "float32" and _varlen() is not None
    looped = PRODUCTS if device.type == "cpu" else "sdpa_per_document"
    assert case.model.base.facts.attention == (VARLEN if kernel else looped)
    rows = make_rows(7, longest=31, shortest=5).rows
    packed = objective_of().rows.collate([rows[:4], rows[4:]])
    padded = objective_of().rows.collate([[row] for row in rows])
    ours, reference = gradient_of(case, [packed]), gradient_of(case, [padded])
    assert difference(ours[0], reference[0]) < TOLERANCE[dtype]
    assert difference(ours[1], reference[1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_computed_once_equals_one_for_each_answer(folder: Path, device: torch.device, dtype: str) -> None:
    """The kernel over all documents has more keys than queries; document by document a mask says the same."""
    case, rows = case_of(folder, device, model=section(folder, dtype)), pair_case.make_rows()
    objective: Any = objective_of(SimpoSettings())
    layouts = [objective.laid_out(True, shares) for shares in (True, False)]
    batches = [layout.rows.collate([rows[:3], rows[3:]]) for layout in layouts]
    assert batches[0].padded < batches[1].padded
    ours, reference = (gradient_of(case, [batch], layout) for batch, layout in zip(batches, layouts, strict=True))
    assert difference(ours[0], reference[0]) < TOLERANCE[dtype]
    assert difference(ours[1], reference[1]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("float32", "nf4"), ("bfloat16", "none"), ("bfloat16", "nf4")]
)
def test_fused_groups_equal_plain_layers(folder: Path, device: torch.device, dtype: str, quantization: str) -> None:
    case = case_of(folder, device, model=section(folder, dtype, quantization))
    assert case.adapter.joined
    batch = next(iter(case.steps.after(0))).batches[0]
    fused = gradient_of(case, [batch])
    unfused(case.model.base.net, case.adapter)
    plain = gradient_of(case, [batch])
    assert difference(fused[0], plain[0]) < TOLERANCE[dtype]
    assert difference(fused[1], plain[1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_change_no_bit_with_dropout(folder: Path, device: torch.device, dtype: str) -> None:
    results = []
    for checkpointed in (0, 2, 3):
        adapter = LoraSettings(r=4, dropout=0.3)
        case = case_of(folder, device, model=section(folder, dtype), adapter=adapter, checkpointed=checkpointed)
        case.run()
        results.append((case.losses, weights(case)))
    for losses, own in results[1:]:
        assert losses == results[0][0]
        assert_same_bits(own, results[0][1])


@pytest.mark.parametrize(("dtype", "packing"), [("float32", False), ("bfloat16", True)])
def test_resume_changes_no_bit(folder: Path, device: torch.device, dtype: str, packing: bool) -> None:
    settings = {"model": section(folder, dtype), "packing": packing, "adapter": LoraSettings(r=4, dropout=0.2)}
    whole, first, second = (case_of(folder, device, training=training(max_steps=5), **settings) for _ in range(3))
    whole.run()
    second.run_after_a_stop(first, 2)
    assert first.losses + second.losses == whole.losses
    assert_same_bits(weights(second), weights(whole))


def test_resume_changes_no_bit_of_long_documents(folder: Path, device: torch.device) -> None:
    """Attention's backward pass adds up over many blocks of keys: in a fixed order only where that is asked for."""
    settings = {"model": section(folder, "bfloat16"), "packing": True, "max_length": 1024, "chunk": 256}
    rows = make_rows(6, longest=1003, shortest=998)
    with deterministic_kernels(True):
        whole, first, second = (
            case_of(folder, device, rows, training=training(max_steps=3), **settings) for _ in "012"
        )
        whole.run()
        second.run_after_a_stop(first, 1)
    assert first.losses + second.losses == whole.losses
    assert_same_bits(weights(second), weights(whole))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_streamed_layers_change_no_bit(folder: Path, device: torch.device, quantization: str) -> None:
    model, adapter = section(folder, "bfloat16", quantization), LoraSettings(r=4, dropout=0.2)
    plain = case_of(folder, device, model=model, adapter=adapter)
    streamed = case_of(folder, device, model=model, adapter=adapter, streaming={"tier": "host", "poison": True})
    plain.run()
    streamed.run()
    assert streamed.losses == plain.losses
    assert_same_bits(weights(streamed), weights(plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_liger_kernels_give_the_same_gradient(folder: Path, gpu: torch.device, dtype: str) -> None:
    pytest.importorskip("liger_kernel")
    case = case_of(folder, gpu, model=section(folder, dtype))
    batch = next(iter(case.steps.after(0))).batches[0]
    plain = gradient_of(case, [batch])
    use_liger(case.model.base.net)
    ours = gradient_of(case, [batch])
    assert difference(ours[0], plain[0]) < TOLERANCE[dtype]
    assert difference(ours[1], plain[1]) < TOLERANCE[dtype]


def test_float8_products_are_those_of_the_double(gpu: torch.device) -> None:
    from tunekit.model.quantized import fp8

    if not fp8.computes_fp8(gpu):
        pytest.skip("this GPU has no float8 products")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 128, generator=generator).bfloat16()
    tensors = fp8.pack(torch.randn(64, 128, generator=generator) * 0.02)
    there = fp8.product(x.to(gpu), **{name: tensor.to(gpu) for name, tensor in tensors.items()}).cpu()
    assert difference(there.float(), fp8.product(x, **tensors).float()) < 5e-3


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_four_bits_are_the_same_on_both_devices(
    device: torch.device, double: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed on the CPU for any device; unpacked by bitsandbytes' kernels there, or by plain torch without it."""
    from tunekit.model.quantized import codec

    if kernels:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(codec, "has_bitsandbytes", lambda: kernels)

    matrix = torch.randn(96, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    ours, reference = codec.pack(matrix.to(device), "nf4", double), codec.pack(matrix, "nf4", double)
    assert all(tensor.device.type == device.type for tensor in ours.values())
    assert all(torch.equal(ours[name].cpu(), tensor) for name, tensor in reference.items())
    for dtype in (torch.float32, torch.bfloat16):
        there = {name: tensor.to(device) for name, tensor in reference.items()}
        dense = codec.unpack(there, (96, 128), "nf4", dtype).cpu()
        torch.testing.assert_close(dense, codec.unpack(reference, (96, 128), "nf4", dtype), rtol=1e-6, atol=0)
