"""The lanes of a sweep: runs of one process that use one loaded base, one after another."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tunekit.errors import TunekitError
from tunekit.model.load import LoadedModel
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.trials import SweepTrial
from tunekit.records import Plan
from tunekit.training.session import Session
from tunekit.training.state import RunInputs
from tunekit.tuned.restore import NetworkSnapshot

Load = Callable[[Session, Plan, RunInputs], LoadedModel]


@dataclass
class Lane:
    """One trial in this process: its session, and its plan until it has ended. `ended`: nothing is left to train."""

    trial: SweepTrial
    session: Session
    plan: Plan | None = None
    prepared: RunInputs | None = None
    ended: bool = False
    begun: bool = False  # in this process
    error: TunekitError | None = None

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.trial.loaded.recipe.output.dir)

    @property
    def steps(self) -> int:
        """The steps of the run; 0 if it has ended."""
        return 0 if self.plan is None else self.plan.steps

    @property
    def base_section(self) -> ModelSection | None:
        """The base that the lane can share with others; None if it needs a base of its own, which it changes or whose
        layers are compiled or streamed for it alone."""
        if self.plan is None or self.prepared is None:
            return None
        choice, whole = self.plan.choice, self.trial.loaded.recipe.adapter.trains_base
        alone = whole or choice.compiled or choice.streamed_head or choice.streaming != "off"
        return None if alone else self.prepared.model


class SharedBase:
    """The base that several lanes use one after another. It is loaded when the first of them needs it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.section: ModelSection | None = None
        self.base: LoadedModel | None = None
        self.snapshot: NetworkSnapshot | None = None

    def use_for(self, lane: Lane) -> None:
        """Forget the base if this lane needs another one."""
        if lane.base_section is None or lane.base_section != self.section:
            self.base = self.snapshot = None
        self.section = lane.base_section

    def load(self, session: Session, plan: Plan, prepared: RunInputs) -> LoadedModel:
        """The base as it was loaded, without the adapter of the lane before."""
        if self.base is None or self.snapshot is None or not self.snapshot.restore():
            self.base = self.snapshot = None
            gc.collect()
            self.base = self._load(session, plan, prepared)
            self.snapshot = NetworkSnapshot(self.base.net)
        return replace(self.base)
