"""Trains trials of a sweep together: in each round, every trial makes one step."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from tunekit.artifacts.checkpoint import list_checkpoints
from tunekit.errors import Stopped, TunekitError
from tunekit.training import run_files
from tunekit.training.begin import begin_run
from tunekit.training.result import finish_run
from tunekit.training.run import Run
from tunekit.training.streaming import make_engine
from tunekit.training.time_limit import TimeLimit
from tunekit.training.trials import SharedBase, Trial


class _OpenRun:
    """A run that trains together with others. `opening`: a context manager in which the run trains. It keeps the errors
    of its run."""

    def __init__(self, opening: AbstractContextManager[Run | None]) -> None:
        self._opening = opening
        self.is_open = False
        self.stopped: Stopped | None = None  # by a signal

    def open(self) -> None:
        """Open the run, and start it. It is closed again if nothing is left to train."""
        with self._kept_errors():
            run = self._opening.__enter__()
            self.is_open = True
        with self.closed_by_errors():
            if not self.is_open or run is None or not run.start():
                self.close()
            else:
                self.run, self.steps = run, iter(run.steps.after(run.state.step))

    def close(self, error: BaseException | None = None) -> None:
        """Leave the context of the run. Raises: an error that is no TunekitError."""
        if self.is_open:
            self.is_open = False
            with self._kept_errors():
                if not self._opening.__exit__(type(error) if error else None, error, None) and error is not None:
                    raise error

    @contextmanager
    def closed_by_errors(self) -> Iterator[None]:
        """A context manager: an error in the block closes the run."""
        try:
            yield
        except BaseException as error:
            self.close(error)

    @contextmanager
    def _kept_errors(self) -> Iterator[None]:
        try:
            yield
        except Stopped as stopped:
            self.stopped = stopped
        except TunekitError:
            pass  # the context keeps it


def train_together(openings: Iterable[AbstractContextManager[Run | None]], warn: Callable[[str], None]) -> None:
    """Open these runs one by one, then train them together until all have ended.

    When a run ends or fails, the others continue. After a stop signal, no further run is opened.
    Raises: Stopped after a stop signal, when all open runs have ended.
    """
    opened: list[_OpenRun] = []
    try:
        for opening in openings:
            opened.append(_OpenRun(opening))
            opened[-1].open()
            if opened[-1].stopped is not None:
                break
        engine = None
        while running := [one for one in opened if one.is_open]:
            engine = engine or make_engine(running[0].run.model, warn)
            works = []
            for one in running:
                with one.closed_by_errors():
                    works.append((one, one.run.begin_step(next(one.steps))))
            results = engine.run([work for _, work in works])
            for (one, work), result in zip(works, results, strict=True):
                with one.closed_by_errors():
                    one.run.finish_step(work, result)
                    others = [each.run for each in running if each.is_open and each is not one]
                    one.run.session.limit.others = sum(run.ending.seconds(run.state) for run in others)
                    if not one.run.after_step():
                        one.close()
    except BaseException as error:
        for one in opened:
            one.close(error)
        raise
    for one in opened:
        if one.stopped is not None:
            raise one.stopped


@contextmanager
def opened_trial(trial: Trial, end: int | None, base: SharedBase, resume: bool, named: bool) -> Iterator[Run | None]:
    """A context manager: the open run of a trial, which the block trains to its end, or to the step `end`; None
    if it has reached this step. Its result is then exported. An error is stored in the trial. `named`: printed lines
    begin with the trial's name.

    Raises: Stopped after a stop signal.
    """
    resume = resume or trial.begun
    if end is not None and any(step >= end for step, _ in list_checkpoints(trial.path / "checkpoints")):
        yield None
        return
    console = trial.session.console.named(trial.recipe.name) if named else trial.session.console
    seconds = {} if trial.begun else trial.session.seconds
    limit = TimeLimit(trial.recipe.loaded.recipe.training.limit_seconds, time.monotonic(), earlier=trial.seconds)
    session = replace(trial.session, last_step=end, limit=limit, seconds=seconds, console=console)
    assert trial.plan is not None
    assert trial.planned is not None
    trial.begun = trial.ended = True
    try:
        with run_files.locked_folder(session, trial.path, resume, overwrite=False):
            with session.signals.at_once("before training began; nothing was trained"):
                checkpoint = run_files.read_checkpoint(session, resume)
            run = begin_run(session, trial.plan, trial.planned, checkpoint, base.load)
            with run.opened():
                yield run
            finish_run(run)
    except Stopped as stop:
        trial.ended = False  # it pauses
        if session.signals.requested is not None:
            what = f"{trial.recipe.name}: {stop.problems[0].what}"
            raise Stopped(what, stop.exit_code - 128, "continue the sweep with --resume") from stop
    except TunekitError as error:
        trial.session.console.warn(f"{trial.recipe.name}: {error}")
        trial.error = type(error).of(error.problems)  # without the traceback, which would keep the trial's tensors
        raise trial.error from None
    finally:
        trial.seconds = limit.elapsed
        if trial.ended:
            trial.planned = None
