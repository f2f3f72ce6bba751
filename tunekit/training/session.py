"""What one process of a run has at hand: recipe, devices, console, signals and, where it writes, the run folder."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

from tunekit.artifacts.run import RunFolder
from tunekit.console import Console
from tunekit.errors import ResourceError
from tunekit.machine.devices import Devices
from tunekit.machine.memory import device_peaks, peak_host_bytes
from tunekit.machine.signals import StopSignals
from tunekit.model.quantized.weights import stored_bytes
from tunekit.recipe.load import LoadedRecipe
from tunekit.records import bytes_text
from tunekit.training.finish import Measured
from tunekit.training.state import timed
from tunekit.tuned.model import TunedModel

Found = TypeVar("Found")


@dataclass
class Session:
    """What one process has at hand; `folder` only on the main rank of a run that writes."""

    loaded: LoadedRecipe
    devices: Devices
    console: Console
    signals: StopSignals
    dry_run: bool = False
    accepted: tuple[str, ...] = ()  # keys of the recipe whose files may have changed since the run that is resumed
    changed: list[str] = field(default_factory=list)  # those of them whose files did
    folder: RunFolder | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of what came before the loop
    baseline_bytes: int = 0  # what the process had, libraries imported, before the base was loaded

    def timed(self, part: str) -> AbstractContextManager[None]:
        """A block whose time is added to `part` of the report's seconds."""
        return timed(self.seconds, part)

    def in_folder(self, use: Callable[[RunFolder], Found]) -> Found | None:
        """What the main rank makes of the run folder, where there is one; an error of it is raised on every rank."""
        return self.devices.on_main(lambda: None if self.folder is None else use(self.folder))

    def from_folder(self, read: Callable[[RunFolder], Found]) -> Found | None:
        """What the main rank reads in the run folder, the same on every rank."""
        return self.devices.from_main(self.in_folder(read))

    def out_of_memory(self) -> ResourceError:
        """The one-line error for a process that ran out of memory, with what it had."""
        peaks = device_peaks(self.devices.device)
        if peaks.allocated is not None:
            had = f"peak {bytes_text(peaks.allocated)} allocated, {bytes_text(peaks.reserved or 0)} reserved"
        else:
            whole = bytes_text(peak_host_bytes())
            had = f"peak {bytes_text(self.peak_bytes())}, {whole} with Python and its libraries"
        budget = self.loaded.recipe.memory.budget
        choosing = "set memory.budget to what the run may take (plan then chooses)"
        first = choosing if budget is None else "raise the budget"
        how = f"{first}, lower data.max_length, or {self.loaded.recipe.adapter.less_memory}"
        return ResourceError(f"out of memory ({had})", how)

    def measured(self, model: TunedModel) -> Measured:
        """Peaks of this process."""
        peak = peak_host_bytes()
        return Measured(
            device=self.devices.device.type,
            peaks=device_peaks(self.devices.device),
            peak_host_bytes=peak,
            host_growth_bytes=max(0, peak - self.baseline_bytes),
            base_bytes=stored_bytes(model.base.net) - _adapter_bytes(model),
        )

    def peak_bytes(self) -> int:
        """The peak so far, which plan predicts: allocated on a device with memory of its own, or what Metal took; on a
        CPU the most of the process beyond what it had before the base was loaded."""
        peaks = device_peaks(self.devices.device)
        return peaks.allocated or peaks.reserved or max(0, peak_host_bytes() - self.baseline_bytes)


def _adapter_bytes(model: TunedModel) -> int:
    """Bytes of the adapter's own tensors that lie inside the network; those of the whole model lie beside it."""
    parts = [] if model.adapter is None else model.adapter.parts()
    inside = [part for part in parts if part is not (model.adapter and model.adapter.model_adapter)]
    return sum(tensor.nbytes for part in inside for tensor in part.state().values())
