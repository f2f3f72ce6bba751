"""The simulated device of device.cpp made torch's own; it must be prepared before torch is imported.

TUNEKIT_SIMULATED_KIND is cuda, xpu or mps; TUNEKIT_SIMULATED_CAPABILITY is CUDA's (8.0); TUNEKIT_SIMULATED_BYTES is
the memory (8 GiB). torch.cuda, torch.xpu or torch.mps keep their own Python code with its checks. Through DOUBLE the
tests ask what the device did.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.devices.build import KIND, library, torch_folder

DEVICES = 1 if KIND == "mps" else 2  # the second one shows where an index is wrong
BYTES = ("allocated", "peak_allocated", "requested", "peak_requested", "reserved", "peak_reserved")


class Double:
    """What the tests ask of the device."""

    def __init__(self) -> None:
        ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self.core = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
        self.core.double_stream.restype = ctypes.c_int64
        self.core.double_set_stream.argtypes = [ctypes.c_int64, ctypes.c_int]
        self.core.double_bytes.restype = ctypes.c_size_t
        self.core.double_set_limit.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self.core.double_set_workspace.argtypes = [ctypes.c_size_t]
        self.core.double_waits.restype = ctypes.c_char_p
        self.mode, self.fractions = 0, {0: 1.0, 1: 1.0}
        major, minor = os.environ.get("TUNEKIT_SIMULATED_CAPABILITY", "8.0").split(".")
        self.properties = SimpleNamespace(
            name="simulated",
            major=int(major),
            minor=int(minor),
            total_memory=int(os.environ.get("TUNEKIT_SIMULATED_BYTES", 8 * 2**30)),
            multi_processor_count=1,
            is_integrated=0,
            gcnArchName="",
            warp_size=32,
            has_bfloat16_conversions=True,
        )

    def waits(self) -> list[str]:
        """What the host waited for since the last call, while it was watched."""
        return self.core.double_waits().decode().splitlines()

    def bytes(self, which: str, device: int = 0) -> int:
        return int(self.core.double_bytes(BYTES.index(which), device))

    def watch(self, mode: int) -> None:
        """As torch.cuda.set_sync_debug_mode: 0 off, 1 count, 2 raise."""
        self.mode = mode
        self.core.double_watch(mode)

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Without counting: what a kernel of the real device would do without the host."""
        self.core.double_watch(0)
        try:
            yield
        finally:
            self.core.double_watch(self.mode)

    def set_fraction(self, fraction: float, device: int) -> None:
        self.fractions[device] = fraction
        self.core.double_set_limit(int(fraction * self.properties.total_memory), device)

    def statistics(self, device: int) -> dict[str, Any]:
        """As torch._C._cuda_memoryStats."""
        found = {}
        for kind in ("allocated", "active", "requested", "reserved"):
            name = "allocated" if kind == "active" else kind
            current, peak = self.bytes(name, device), self.bytes(f"peak_{name}", device)
            numbers = {"current": current, "peak": peak, "allocated": 0, "freed": 0}
            found[f"{kind}_bytes"] = {"all": numbers, "small_pool": numbers, "large_pool": numbers}
        return found


DOUBLE: Double


class _Importing(importlib.abc.MetaPathFinder):
    """Something done before and after a module is imported for the first time."""

    def __init__(self, name: str, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.name, self.around, self.looking = name, around, False
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name or self.looking:
            return None
        self.looking = True
        spec = importlib.util.find_spec(name)  # as the other finders have it
        self.looking = False
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            with self.around():
                execute(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Let `import torch`, which must be still to come, find the simulated device."""
    assert "torch" not in sys.modules, "the simulated device comes before torch"
    if any(isinstance(finder, _Importing) for finder in sys.meta_path):
        return  # a worker of pytest is a child too, and a second device would have a generator that nothing draws from
    _Importing("torch", _around_torch)
    _Importing("bitsandbytes", _around_bitsandbytes)


@contextlib.contextmanager
def _around_torch() -> Iterator[None]:
    global DOUBLE
    DOUBLE = Double()
    yield
    _install(DOUBLE)
    from tests.devices import collectives, kernels

    if KIND != "cuda":
        kernels.register_plain_attention(KIND)
        return
    kernels.register(DOUBLE)
    collectives.register(DOUBLE)


@contextlib.contextmanager
def _around_bitsandbytes() -> Iterator[None]:
    """Without its CUDA library: its kernels that are made of torch's operators, and not compiled."""
    import torch

    module: Any = torch.get_device_module(KIND)
    compiled, available = torch.compile, module.is_available
    register, plain = torch.library.register_kernel, dict[str, Any]()

    def remembering(name: str, kinds: Any, function: Any = None, **named: Any) -> Any:
        if function is None:
            return lambda function: remembering(name, kinds, function, **named)
        if kinds == "default":
            plain[name.partition("::")[2]] = function
        return register(name, kinds, function, **named)

    torch.compile = lambda function=None, **named: function or (lambda given: given)  # type: ignore[assignment]
    torch.library.register_kernel = remembering
    module.is_available = lambda: False
    try:
        yield
    finally:
        torch.compile, module.is_available = compiled, available
        torch.library.register_kernel = register
    if KIND != "mps":
        from tests.devices import kernels

        kernels.register_optimizers(DOUBLE, sys.modules["bitsandbytes"], KIND)
        kernels.register_products(plain, KIND)


def _install(double: Double) -> None:
    """The functions of torch._C that a build without this kind of device lacks."""
    if KIND == "mps":
        _install_metal(double)
    else:
        _install_with_streams(double)


def _install_with_streams(double: Double) -> None:
    """For CUDA and XPU; also what their modules make of classes that torch._C lacks."""
    import torch

    module: Any = getattr(torch, KIND)

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **named: Any) -> Any:
            if "stream_id" in named:
                return super().__new__(cls, **named)
            index = module._utils._get_device_index(device, optional=True)
            return super().__new__(cls, device=torch.device(KIND, index), priority=priority)

        cuda_stream = property(lambda self: self.stream_id)

        def wait_stream(self, stream: Any) -> None:
            self.wait_event(stream.record_event())

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record(self)
            return event

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return super().__new__(cls, device=KIND, enable_timing=enable_timing)

        def record(self, stream: Any = None) -> None:
            super().record(stream or module.current_stream())
            self.recorded = time.monotonic()  # here things are computed when they are sent

        def elapsed_time(self, end_event: Any) -> float:
            return 1000.0 * (end_event.recorded - self.recorded)

        def wait(self, stream: Any = None) -> None:
            super().wait(stream or module.current_stream())

    def properties(device: Any = None) -> Any:
        module._utils._get_device_index(device, optional=True)
        return double.properties

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        total = double.properties.total_memory
        return total - double.bytes("reserved", module._utils._get_device_index(device, optional=True)), total

    core, number = double.core, {"cuda": 1, "xpu": 12}[KIND]  # of c10::DeviceType
    native = {
        "getCurrentStream": lambda device: (core.double_stream(device), device, number),
        "getDefaultStream": lambda device: (0, device, number),
        "getDeviceCount": lambda: DEVICES,
        "getDevice": lambda: core.double_device(),  # torch's compiler hashes these
        "setDevice": lambda device: core.double_set_device(device),
        "exchangeDevice": lambda device: core.double_set_device(device),
        "maybeExchangeDevice": lambda device: core.double_device() if device < 0 else core.double_set_device(device),
        "setMemoryFraction": double.set_fraction,
        "getMemoryFraction": lambda device: double.fractions[device],
        "emptyCache": lambda: core.double_empty_cache(),
        "memoryStats": double.statistics,
        "resetPeakMemoryStats": lambda device: core.double_reset_peaks(device),
        "resetAccumulatedMemoryStats": lambda device: None,
        "setStream": lambda stream_id, device_index, device_type: core.double_set_stream(stream_id, device_index),
        "getCurrentRawStream": lambda device: core.double_stream(device),
        "synchronize": lambda *device: core.double_synchronize(),
        "isInBadFork": lambda: False,
        "init": lambda: None,
        "set_sync_debug_mode": double.watch,
        "get_sync_debug_mode": lambda: double.mode,
        "getArchFlags": lambda: "sm_80",
        "ipc_collect": lambda: None,
    }
    for name, function in native.items():
        setattr(torch._C, f"_{KIND}_{name}", function)
    for part in (module, module.memory, module.random):
        part._lazy_init, part.is_initialized, part.device_count = lambda: None, lambda: True, lambda: DEVICES
    for part in (module, module.streams):
        part.Stream, part.Event = Stream, Event
    for part in (module, module.memory):
        part.mem_get_info = mem_get_info
    module._exchange_device, module._maybe_exchange_device = native["exchangeDevice"], native["maybeExchangeDevice"]
    module._initialized = True
    module.is_available = lambda: True
    module.get_device_properties = properties
    module.default_generators = tuple(torch.Generator(device=f"{KIND}:{index}") for index in range(DEVICES))
    if KIND == "cuda":
        large = double.properties.major >= 9 or os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        core.double_set_workspace(2**25 if large else 8_519_680)  # cuBLAS's
        torch.backends.cuda.is_built = lambda: True
        module.is_bf16_supported = lambda including_emulation=True: including_emulation or double.properties.major >= 8
        torch.version.cuda = "13.0"


def _install_metal(double: Double) -> None:
    """For MPS, which has one device, no streams and no peaks."""
    import torch

    core, limit = double.core, double.properties.total_memory
    generator = torch.Generator(device="mps")
    native = {
        "is_available": lambda: True,
        "is_on_macos_or_newer": lambda major, minor: True,
        "get_default_generator": lambda: generator,
        "deviceSynchronize": lambda: core.double_synchronize(),
        "emptyCache": lambda: core.double_empty_cache(),
        "setMemoryFraction": lambda fraction: double.set_fraction(fraction, 0),
        "currentAllocatedMemory": lambda: double.bytes("allocated"),
        "driverAllocatedMemory": lambda: double.bytes("reserved"),
        "recommendedMaxMemory": lambda: limit,
    }
    for name, function in native.items():
        setattr(torch._C, f"_mps_{name}", function)
    torch._C._has_mps = True
