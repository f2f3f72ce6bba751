"""Trains several runs over one streamed base together, so that each layer is loaded and unpacked once for all runs.

In each layer, the runs compute one after another. Every result has the same bits as in a separate run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest

from tunekit.errors import TunekitError
from tunekit.memory.splitting import collect_failed, first_line
from tunekit.training.engines.streaming import LayerPass, StreamingEngine, run_passes
from tunekit.training.engines.window import Piece, WindowEngine, WindowRequest, WindowResult, WindowRun, pieces_of


class Together:
    """Runs windows (the micro-batches of one optimizer step) of several runs together. `warn`: prints a warning."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._failed = warn, False

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
            self._failed = True
            self._warn(f"the trials cannot run together ({reason}); from now on, their steps run one after another")
        collect_failed()  # not inside `except`: the error keeps the failed attempt's tensors alive there
        for request in requests:
            request.model.clear_gradient()
        return None

    def _run(self, requests: Sequence[WindowRequest]) -> list[WindowResult]:
        runs = [_window_run(request) for request in requests]
        pieces = [_pieces(request) for request in requests]
        with ExitStack() as models:
            for request in requests:
                models.enter_context(request.model.unchanged_weights())
                models.enter_context(request.model.clearing_on_failure())
            for passes in zip_longest(*map(_passes, runs, pieces)):
                run_passes([layer_pass for layer_pass in passes if layer_pass is not None], unpacks_once=True)
        return [run.results() for run in runs]


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
