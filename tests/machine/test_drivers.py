"""Settings and messages that depend on the GPU's driver, with made-up drivers, kernels and builds of torch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from tunekit.machine import drivers
from tunekit.machine.variables import allocator_settings, has_windows_driver
from tunekit.model.quantized import fp8

NATIVE, WSL = "6.8.0-45-generic", "5.15.167.4-microsoft-standard-WSL2"
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("system", "release", "build", "environment", "expected"),
    [
        ("Linux", NATIVE, "2.13.0", {}, EXPANDABLE),
        ("Linux", NATIVE, "2.13.0+cu128", {}, EXPANDABLE),
        ("Linux", NATIVE, "2.13.0+rocm6.4", {}, {}),
        ("Linux", NATIVE, "2.13.0+cpu", {}, {}),
        ("Linux", NATIVE, "", {}, {}),
        ("Linux", WSL, "2.13.0+cu128", {}, {}),
        ("Windows", "11", "2.13.0+cu128", {}, {}),
        ("Darwin", "24.0.0", "2.13.0", {}, {}),
        ("Linux", NATIVE, "2.13.0", {"PYTORCH_HIP_ALLOC_CONF": "x"}, {}),
        ("Linux", NATIVE, "2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "x"}, {}),
        ("Linux", NATIVE, "2.13.0", {"PYTORCH_ALLOC_CONF": "x"}, {}),
    ],
)
def test_the_allocators_setting_is_that_of_native_linux_with_cuda(
    system: str, release: str, build: str, environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert allocator_settings(environment, system, release, build) == expected


def test_the_driver_of_windows_is_recognised() -> None:
    assert has_windows_driver("Windows", "11")
    assert has_windows_driver("Linux", WSL)
    assert not has_windows_driver("Linux", NATIVE)


class Library:
    """NVIDIA's driver library, of a version."""

    def __init__(self, number: int) -> None:
        self.number = number

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = self.number
        return 0


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.13.0")


def use_driver(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    def load(name: str) -> Library:
        if number is None:
            raise OSError(f"{name} is missing")
        return Library(number)

    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("number", "cuda", "message"),
    [
        (
            11040,
            "12.8",
            "the driver supports CUDA 11.4, but torch 2.13.0 was built for CUDA 12.8: update the driver, or",
        ),
        (12080, None, "an NVIDIA driver is installed (CUDA 12.8), but torch 2.13.0 has no CUDA: install such a build"),
        (13000, "12.8", "an NVIDIA driver is installed (CUDA 13.0), but torch 2.13.0 finds no GPU: run nvidia-smi"),
        (None, "12.8", None),
    ],
)
def test_a_driver_that_torch_cannot_use_is_named(
    number: int | None, cuda: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_driver(monkeypatch, number)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = drivers.gpu_problem(tmp_path / "kfd")
    assert (found is None) if message is None else (found or "").startswith(message)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert drivers.gpu_problem(tmp_path / "kfd") is None, "the user hides the GPU"


@pytest.mark.usefixtures("no_gpu")
def test_gpus_of_amd_and_intel_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_driver(monkeypatch, None)
    monkeypatch.setattr(torch.version, "hip", None)
    (tmp_path / "kfd").touch()
    assert "was not built for ROCm" in (drivers.gpu_problem(tmp_path / "kfd") or "")
    vendor = tmp_path / "renderD128" / "device" / "vendor"
    vendor.parent.mkdir(parents=True)
    for name, is_intel in (("0x8086", True), ("0x10de", False)):
        vendor.write_text(f"{name}\n", encoding="ascii")
        assert (drivers.intel_problem(tmp_path) is not None) is is_intel


def test_a_float8_product_that_does_not_work_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, and on some new GPUs. The same rounded numbers are multiplied in float32."""
    device = torch.device("cpu")
    x, weight = torch.randn(4, 32), fp8.pack(torch.randn(16, 32))
    expected = fp8.product(x, **weight)

    def fail(*values: Any, **named: Any) -> Any:
        raise RuntimeError("row-wise scaling is not supported")

    monkeypatch.setattr(fp8, "capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_scaled_mm", fail)
    fp8._multiplies.cache_clear()
    assert not fp8.computes_fp8(device)
    assert torch.equal(fp8.product(x, **weight), expected)
    fp8._multiplies.cache_clear()
