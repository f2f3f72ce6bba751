"""The resources of one process of a run: recipe, devices, console, signals and, on the main rank, the run folder. Also
Planned: what planning decided, apart from the plain values in plan.json."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from signal import SIGTERM
from typing import TypeVar

from tunekit.artifacts.run import RunFolder
from tunekit.console import Console
from tunekit.contracts import Batch, Processor
from tunekit.data.batching.steps import BatchSettings
from tunekit.data.rows import RowSet
from tunekit.errors import ResourceError
from tunekit.machine.devices import Devices
from tunekit.machine.memory import device_peaks, peak_host_bytes
from tunekit.machine.signals import StopSignals
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.load import LoadedRecipe
from tunekit.recipe.model import ModelSection
from tunekit.records import Reaction, bytes_text
from tunekit.training.state import LoopState, Processors, timed
from tunekit.training.time_limit import TimeLimit


@dataclass(frozen=True)
class Planned:
    """Results of planning that training needs: rows, batch settings, adapter settings, the largest batch."""

    model: ModelSection  # includes the heads that the objective needs
    processor: Processor
    rows: RowSet
    batch_settings: BatchSettings  # with the micro-batches that plan chose
    adapter: AdapterSettings  # with its texts as token ids
    largest_batch: Batch  # the largest micro-batch of the run; for a stream, of the largest possible size
    learned_length: int | None = None  # tokens of a row for which the base has learned positions
    kernel_packages: tuple[str, ...] = ()  # packages whose kernels the base uses on a GPU


Result = TypeVar("Result")


@dataclass
class Session:
    """The resources of one process of a run. `folder`: the run folder; None on other ranks, and if the run writes no
    files."""

    loaded: LoadedRecipe
    devices: Devices
    console: Console
    signals: StopSignals
    dry_run: bool = False
    accepted: tuple[str, ...] = ()  # keys of the recipe whose files may have changed since the resumed run
    changed: list[str] = field(default_factory=list)  # accepted keys whose files did change
    last_step: int | None = None  # an audit stops after this step, with a checkpoint
    limit: TimeLimit = field(default_factory=TimeLimit)  # of this start
    folder: RunFolder | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # times of the parts before the loop
    processors: Processors = field(default_factory=dict)  # that were loaded; the trials of a sweep share them
    described: set[str] = field(default_factory=set)  # lines about plans that were printed; the trials share them
    baseline_bytes: int = 0  # memory of the process with libraries imported, before the base was loaded

    def timed(self, part: str) -> AbstractContextManager[None]:
        """A context manager that adds the time of its block to `part` of the report's seconds."""
        return timed(self.seconds, part)

    def stop_signal(self, step: int) -> int:
        """The number of the signal that requests a stop after `step`; 0 if the run continues."""
        return self.signals.requested or (SIGTERM if step == self.last_step else 0)

    def in_folder(self, use: Callable[[RunFolder], Result]) -> Result | None:
        """Call `use` with the run folder on the main rank, and return its result there; None on other ranks or without
        a run folder. An error is raised on every rank."""

        def work() -> Result | None:
            with self.devices.undisturbed():
                return None if self.folder is None else use(self.folder)

        return self.devices.on_main(work)

    def from_folder(self, read: Callable[[RunFolder], Result]) -> Result | None:
        """Call `read` with the run folder on the main rank, and return its result on all ranks."""
        return self.devices.from_main(self.in_folder(read))

    def out_of_memory(self) -> ResourceError:
        """The error for a process that ran out of memory; it states the memory peaks."""
        peaks = device_peaks(self.devices.device)
        if peaks.allocated is not None:
            had = f"peak {bytes_text(peaks.allocated)} allocated, {bytes_text(peaks.reserved or 0)} reserved"
        else:
            total = bytes_text(peak_host_bytes())
            had = f"peak {bytes_text(self.peak_bytes())}, or {total} with Python and its libraries"
        budget = self.loaded.recipe.memory.budget
        budget_how = "set memory.budget, so that plan chooses settings that fit"
        first = budget_how if budget is None else "raise the budget"
        how = f"{first}, lower data.max_length, or {self.loaded.recipe.adapter.less_memory}"
        return ResourceError(f"out of memory ({had})", how)

    def react(self, state: LoopState, reaction: Reaction, *, once: bool = False) -> None:
        """Print a reaction, and keep it for the report and for a resume. `once`: only if the probe has not found the
        same before."""
        if not once or all(known["probe"] != reaction.probe for known in state.reactions):
            state.reactions.append(asdict(reaction))
            when = f"step {reaction.step}: " if reaction.step else ""
            self.console.warn(f"{when}{reaction.probe}; {reaction.action}")

    def peak_bytes(self) -> int:
        """The peak of memory so far, comparable with the predicted peak of plan. On a GPU: the allocated memory. On
        Metal: the reserved memory. On a CPU: the growth of the process since before the base was loaded."""
        peaks = device_peaks(self.devices.device)
        return peaks.allocated or peaks.reserved or max(0, peak_host_bytes() - self.baseline_bytes)
