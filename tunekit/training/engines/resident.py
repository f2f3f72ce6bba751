"""The engine for a base whose weights are all on the device: one micro-batch after the other.

Comes in: a window and the step's units.  Goes out: the gradient of (sum of losses / units), in the flat buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tunekit.model.call import OUTSIDE_LAYERS, calling, seed_layer
from tunekit.training.engines.window import Piece, WindowEngine, WindowRun


class ResidentEngine(WindowEngine):
    """Forward and backward of each micro-batch; only one micro-batch's activations live at a time."""

    def _run(self, run: WindowRun, pieces: Sequence[Piece]) -> None:
        model = run.model

        def penalty() -> Tensor | None:
            return model.adapter.penalty() if model.adapter else None

        for piece in pieces:
            run.computing(piece)
            with calling(run.call(piece)) as call:
                seed_layer(call, OUTSIDE_LAYERS)
                run.backward(piece, model.output(piece.batch.inputs), penalty)
