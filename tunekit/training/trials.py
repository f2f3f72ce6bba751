"""The trials of a sweep that run in one process and share one loaded base, one after another or at the same time."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunekit.artifacts.run import read_json
from tunekit.errors import RunFolderError, TunekitError
from tunekit.memory.streaming import layer_weights, make_slots
from tunekit.model.load import LoadedModel
from tunekit.recipe.model import ModelSection
from tunekit.recipe.reading.trial_recipes import TrialRecipe
from tunekit.records import Plan
from tunekit.training.begin import Load
from tunekit.training.session import Planned, Session
from tunekit.tuned.network import TensorVersions, copy_modules


@dataclass(frozen=True)
class BaseKey:
    """Identifies a loaded base, so that trials with equal keys can share it. `streaming`: where the base's layers are
    stored (device, host or disk)."""

    section: ModelSection
    streaming: str


@dataclass(eq=False)
class Trial:
    """One trial of a sweep in this process. `plan`: None before the trial is planned and after it has ended. `ended`:
    there is nothing left to train."""

    recipe: TrialRecipe
    session: Session
    plan: Plan | None = None
    planned: Planned | None = None
    ended: bool = False
    begun: bool = False  # in this process
    seconds: float = 0.0  # of its parts in this process, which training.max_minutes limits
    error: TunekitError | None = None

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.recipe.loaded.recipe.output.dir)

    @property
    def steps(self) -> int:
        """The steps of the run; 0 if it has ended."""
        return 0 if self.plan is None else self.plan.steps

    @property
    def base_key(self) -> BaseKey | None:
        """Identifies the base that this trial can share with other trials.

        None if the trial must load the base for itself alone. This is so if it changes the base or streams
        the head, or if it streams layers and `runs_together` is false.
        """
        if self.plan is None or self.planned is None:
            return None
        choice, recipe = self.plan.choice, self.recipe.loaded.recipe
        if recipe.adapter.trains_base or choice.streamed_head:
            return None
        if choice.streaming != "off" and not self.runs_together:
            return None
        return BaseKey(self.planned.model, choice.streaming)

    @property
    def process_settings(self) -> tuple[int | None, bool]:
        """Settings that apply to the whole process: number of threads, and deterministic kernels. Trials that run
        together must have equal settings."""
        threads = None if self.plan is None else self.plan.choice.threads
        return threads, self.recipe.loaded.recipe.training.deterministic

    @property
    def runs_together(self) -> bool:
        """Whether this trial's steps can run together with steps of other trials. This requires that no calibration or
        companion (auxiliary model) uses the base, and that the number of threads is fixed."""
        recipe = self.recipe.loaded.recipe
        companions = self.planned is not None and self.planned.rows.objective.companions
        return not (recipe.adapter.calibration or companions or recipe.training.threads == "adaptive")


class SharedBase:
    """The loaded base that several trials share. It is loaded when the first trial needs it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self.key: BaseKey | None = None
        self.base: LoadedModel | None = None
        self.versions: TensorVersions | None = None

    def use_for(self, trial: Trial) -> None:
        """Discard the loaded base if this trial needs a different one."""
        if trial.base_key is None or trial.base_key != self.key:
            self.base = self.versions = None
        self.key = trial.base_key

    def load(self, session: Session, plan: Plan, planned: Planned) -> LoadedModel:
        """Return the base, and load it first if necessary. It is loaded again if its weights have changed. A trial that
        shares the base gets separate module objects over the same weights."""
        if self.base is None or (self.versions is not None and not self.versions.unchanged()):
            self.base = self.versions = None
            gc.collect()
            self.base = self._load(session, plan, planned)
            if self.key is not None and self.key.streaming != "off":
                base, weights = self.base, layer_weights(self.base)
                base.slots = make_slots(weights, base.device, tier=self.key.streaming, mapped=base.mapped)
            else:
                self.versions = TensorVersions(self.base)
        return self.base if self.key is None else copy_modules(self.base)


def refuse_changed_rows(trials: Sequence[Trial]) -> None:
    """Raises: RunFolderError if a trial that has ended read other rows than a planned trial with the same data would,
    so that the two could not be compared."""
    planned_trials = [(trial, trial.planned.rows.fingerprint) for trial in trials if trial.planned is not None]
    for trial in trials:
        was = ((read_json(trial.path / "environment.json") or {}).get("fingerprint") or {}).get("data")
        if was is None or trial.planned is not None:
            continue
        for other, rows in planned_trials:
            if _reading(trial) == _reading(other) and rows != was:
                what = f"{trial.recipe.name} was trained on rows that have changed since"
                raise RunFolderError(what, "restore the files of data, or choose another output.dir")


def _reading(trial: Trial) -> tuple[object, ...]:
    """The parts of a trial's recipe that decide its rows and their tokens."""
    recipe = trial.recipe.loaded.recipe
    return recipe.data, recipe.objective, recipe.model, recipe.training.seed
