"""Which device a run takes, and what its kind has: decisions that need no device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tunekit.errors import RecipeError
from tunekit.machine import devices
from tunekit.machine.devices import (
    Devices,
    capability,
    check_device,
    computes_bfloat16,
    deterministic_kernels,
    for_sums,
    make_devices,
    summing_dtype,
)
from tunekit.machine.memory import available_bytes
from tunekit.machine.placing import to_device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps:1", "cuda:-1"])
def test_other_names_are_refused_with_those_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_DEVICE", name)
    with pytest.raises(RecipeError, match="choose cpu, cuda, cuda:N, xpu, xpu:N or mps"):
        make_devices()


@pytest.mark.parametrize("name", ["tpu", "xla", "xla:0"])
def test_a_tpu_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_DEVICE", name)
    with pytest.raises(RecipeError, match="XLA compiles a whole step for its shapes"):
        make_devices()


def test_a_device_that_torch_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEKIT_DEVICE", "xpu:1")
    with pytest.raises(RecipeError, match="torch sees no such device"):
        make_devices()
    monkeypatch.setattr(devices, "is_here", lambda device: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match="torch finds only 1 of these devices"):
        make_devices()


@pytest.mark.parametrize(("found", "wanted"), [("cuda:0", "cuda:1"), ("cuda:0", "xpu"), ("hpu", None), ("xla", None)])
def test_a_rank_takes_what_was_wanted_or_says_so(found: str, wanted: str | None) -> None:
    with pytest.raises(RecipeError):
        check_device(torch.device(found), None if wanted is None else torch.device(wanted))
    for same in ("cuda", "cuda:1", None):
        check_device(torch.device("cuda:1"), None if same is None else torch.device(same))


def test_what_is_planned_for_and_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computes_bfloat16(torch.device("mps"))
    assert capability(torch.device("cuda")) >= (9, 0)
    assert capability(torch.device("xpu")) == (0, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # ROCm's devices are called cuda, and count otherwise
    assert capability(torch.device("cuda")) == (0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "1"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ],
)
def test_what_the_environment_asks_for_in_vain_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(
        RecipeError, match=f"the environment variable {name}={value} requests a feature that tunekit does not support; "
    ):
        make_devices()


def test_what_the_launcher_of_accelerate_always_sets_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert make_devices().world == 1


def test_a_gpu_that_does_not_tell_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some Intel Arc: then all that this process has not taken."""

    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("The device (Intel(R) Arc(TM) A770) doesn't support querying the available free memory.")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device: 1500)
    monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(total_memory=5000))
    assert available_bytes(torch.device("xpu", 0)) == 4000


def test_sums_are_taken_in_what_the_device_has() -> None:
    assert [summing_dtype(torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [
        *(torch.float64, torch.float64, torch.float32)
    ]
    assert for_sums(torch.ones(2)).dtype == torch.float64
    assert to_device(torch.ones(2, dtype=torch.float64), torch.device("cpu")).dtype == torch.float64


def settings_of_torch() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("filled", [True, False])
def test_kernels_are_deterministic_in_the_block_alone(filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", filled)
    with deterministic_kernels(False):
        assert settings_of_torch() == (False, filled)
    with deterministic_kernels(True):
        assert settings_of_torch() == (True, False)
    assert settings_of_torch() == (False, filled)
    with pytest.raises(RecipeError, match="no deterministic kernel for this run") as found, deterministic_kernels(True):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation. You may")
    assert found.value.problems[0].key == "training.deterministic"
    assert settings_of_torch() == (False, filled)
    for wanted, message in ((True, "shapes differ"), (False, "no deterministic implementation")):
        with pytest.raises(RuntimeError, match=message), deterministic_kernels(wanted):
            raise RuntimeError(message)


def test_one_process_does_not_run_the_check_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts nvidia-smi, which may take seconds."""

    def check() -> bool:
        raise AssertionError

    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", check)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Devices(torch.device("cpu")).close()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(AssertionError):
        Devices(torch.device("cpu"))
