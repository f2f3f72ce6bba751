"""Trains several runs over one base together, so that each layer is loaded and unpacked once for all runs.

There are two ways. Interleaved: in each layer, the runs compute one after another, and every result has the same bits
as in a separate run. Joined: one network computes the rows of all runs in the same matrix products.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest

from tunekit.errors import TunekitError
from tunekit.memory.splitting import collect_failed, first_line
from tunekit.model.load import LoadedModel
from tunekit.records import Choice
from tunekit.training.engines.joined import JointNetwork, can_join, passes_at_once
from tunekit.training.engines.streaming import LayerPass, StreamingEngine, run_passes
from tunekit.training.engines.window import Piece, WindowEngine, WindowRequest, WindowResult, WindowRun, pieces_of


class Together:
    """Runs windows (the micro-batches of one optimizer step) of several runs together.

    `base`: returns the loaded base, without the adapter of any run. `joined`: the settings of a network that computes
    the rows of all runs at once; None: the runs compute one after another in each layer. `warn`: prints a warning.
    """

    def __init__(
        self, base: Callable[[], LoadedModel | None], joined: Choice | None, warn: Callable[[str], None]
    ) -> None:
        self._base, self._joined, self._warn = base, joined, warn
        self._joint: JointNetwork | None = None
        self._failed = False

    def run(self, requests: Sequence[WindowRequest]) -> list[WindowResult] | None:
        """Run these windows together and return their results. Returns None if this is impossible or fails, for example
        if memory runs out. Then all gradients are zero, so that the caller can run each window alone."""
        if len(requests) < 2 or self._failed:
            return None
        try:
            return self._run(requests)
        except TunekitError:  # of one run, which raises it again alone and ends
            reason = ""
        except Exception as error:
            reason = first_line(error) or type(error).__name__
        if reason:
            self._failed, self._joint = True, None
            self._warn(f"the trials cannot run together ({reason}); from now on, their steps run one after another")
        collect_failed()  # not inside `except`: the error keeps the failed attempt's tensors alive there
        for request in requests:
            request.model.clear_gradient()
        return None

    def _run(self, requests: Sequence[WindowRequest]) -> list[WindowResult] | None:
        runs = [_window_run(request) for request in requests]
        pieces = [_pieces(request) for request in requests]
        with ExitStack() as models:
            for request in requests:
                models.enter_context(request.model.unchanged_weights())
                models.enter_context(request.model.clearing_on_failure())
            if self._joined is not None and all(map(can_join, runs, pieces)):
                self._joint_network(self._joined, requests).run(runs, pieces, passes_at_once(runs))
            elif all(request.model.slots is not None for request in requests):
                for passes in zip_longest(*map(_passes, runs, pieces)):
                    run_passes([layer_pass for layer_pass in passes if layer_pass is not None], unpacks_once=True)
            else:
                return None
        return [run.results() for run in runs]

    def _joint_network(self, choice: Choice, requests: Sequence[WindowRequest]) -> JointNetwork:
        """The network that computes all these runs. It is created again when the set of runs changes."""
        models, base = [request.model for request in requests], self._base()
        assert base is not None
        if self._joint is None or [*map(id, self._joint.models)] != [*map(id, models)]:
            self._joint = JointNetwork(base, models, choice)
        return self._joint


def _window_run(request: WindowRequest) -> WindowRun:
    assert isinstance(request.engine, WindowEngine)
    return WindowRun(request.engine, request.model, request.objective, request.window, request.units)


def _pieces(request: WindowRequest) -> list[Piece]:
    """The micro-batches of a window. Micro-batches that are as large as one that ran out of memory before are split."""
    assert isinstance(request.engine, WindowEngine)
    split, kind, batches = request.engine.splitting, request.objective.rows, request.window.batches
    parts = [[batch] if split is None else split.pieces(kind, batch) for batch in batches]
    return pieces_of(request.window, parts, request.micro_batches)


def _passes(run: WindowRun, pieces: Sequence[Piece]) -> Iterator[LayerPass]:
    assert isinstance(run.engine, StreamingEngine)
    return run.engine.passes(run, pieces)
