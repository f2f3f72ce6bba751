"""One forward and backward pass for the rows of several runs: each layer of the shared base computes all rows at once.

All runs share one network for embeddings and layers; each run has its own head and loss. The results equal those of
separate runs, except for rounding: sums are computed in a different order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch

from tunekit.adapters.base import Casts
from tunekit.adapters.kernels.lane_products import LaneProducts, obstacle_to_lanes
from tunekit.adapters.kernels.norms import lighten_norms
from tunekit.memory.slots import LayerSlots
from tunekit.model.call import Call, calling
from tunekit.model.load import LoadedModel
from tunekit.records import Choice
from tunekit.training.engines.streaming import (
    LayerPass,
    PieceState,
    RequiresGrad,
    StreamingEngine,
    run_passes,
    stages_of,
)
from tunekit.training.engines.window import Piece, WindowRun
from tunekit.tuned.model import TunedModel
from tunekit.tuned.network import prepare_network
from tunekit.tuned.twin import make_twin

INPUTS = {"input_ids", "position_ids"}  # of rows end to end, which can be put after each other


def can_join(run: WindowRun, pieces: Sequence[Piece]) -> bool:
    """Whether this run's micro-batches (`pieces`) can be computed in one forward together with micro-batches of other
    runs."""
    adapter = run.model.adapter
    parts = [] if adapter is None else adapter.parts()
    layers = [] if adapter is None else list(adapter.layers.values())
    if not layers or len(parts) != len(layers) or obstacle_to_lanes(layers) is not None:
        return False
    return all(piece.batch.inputs.keys() == INPUTS and len(piece.batch.inputs["input_ids"]) == 1 for piece in pieces)


@dataclass(eq=False)
class _JoinedState(PieceState):
    """The hidden states of several runs between two layers. `pieces`: one micro-batch of each run; None for a run that
    has no more micro-batches."""

    pieces: Sequence[Piece | None] = ()
    lengths: tuple[int, ...] = ()  # tokens of each run


class _JoinedRun(WindowRun):
    """A WindowRun whose model is the joint network of all runs, instead of the model of one run."""

    def __init__(self, model: TunedModel) -> None:
        self.model = model

    def computing(self, piece: Piece) -> None:
        """Do nothing: if memory runs out, no single micro-batch is to blame. Each run then continues alone."""


class _JoinedPass(LayerPass):
    """Computes the micro-batches of several runs. Micro-batch k of every run is computed together, as one long
    sequence, for some consecutive values of k."""

    def __init__(
        self, joint: JointNetwork, runs: Sequence[WindowRun], pieces: Sequence[Sequence[Piece | None]]
    ) -> None:
        self.runs, self._pieces, self._casts = runs, pieces, joint.casts
        super().__init__(_JoinedRun(joint.model), joint.stages, joint.slots, [], joint.requires)

    def begin(self, pieces: Sequence[Piece]) -> list[PieceState]:
        states: list[PieceState] = []
        for some in self._pieces:
            batches = [piece.batch.inputs for piece in some if piece is not None]
            inputs = {name: torch.cat([batch[name] for batch in batches], dim=1) for name in INPUTS}  # (1, T)
            lengths = tuple(0 if piece is None else piece.batch.inputs["input_ids"].shape[1] for piece in some)
            first = next(piece for piece in some if piece is not None)
            with calling(Call(lanes=lengths)):
                call = self.run.model.call_for(inputs)
            states.append(_JoinedState(first, call, inputs, pieces=some, lengths=lengths))
        return states

    def forward(self, number: int) -> None:
        with self._casts.caching():  # of one layer only: those of all layers would be a copy of every run's adapter
            super().forward(number)

    def backward(self, number: int) -> None:
        with self._casts.caching():
            super().backward(number)

    def head(self) -> None:
        for state in self.states:
            assert isinstance(state, _JoinedState)
            gradients = []
            parts = torch.split(state.hidden, list(state.lengths), dim=1)
            for run, piece, rows in zip(self.runs, state.pieces, parts, strict=True):
                if piece is not None:
                    hidden = rows.detach().contiguous().requires_grad_()
                    with calling(run.call(piece)):
                        call = run.model.call_for(piece.batch.inputs)
                    gradients.append(self.head_gradient(run, piece, call, hidden))
            state.hidden = torch.cat(gradients, dim=1)


@dataclass(eq=False)
class JointNetwork:
    """A network that has one base and the adapters of several models. Each adapter computes only the rows of its own
    model."""

    base: LoadedModel
    models: Sequence[TunedModel]
    choice: Choice
    casts: Casts = field(default_factory=Casts)
    requires: RequiresGrad | None = None

    def __post_init__(self) -> None:
        twin = make_twin(self.base)
        adapters = [model.adapter for model in self.models if model.adapter is not None]
        for name in sorted({name for adapter in adapters for name in adapter.layers}):
            layers = [adapter.layers.get(name) for adapter in adapters]
            twin.net.set_submodule(name, LaneProducts(twin.net.get_submodule(name), layers, self.casts))
        lighten_norms(twin.net)
        self.model = prepare_network(twin, replace(self.choice, checkpointed_layers=0, mlp_tile_tokens=None))
        self.stages = stages_of(twin)
        self.slots = self.model.slots or _NoSlots()

    def run(self, runs: Sequence[WindowRun], pieces: Sequence[Sequence[Piece]], at_once: int) -> None:
        """Run the micro-batches (`pieces`) of all runs. Up to `at_once` micro-batches of each run pass through a layer
        before the next layer."""
        joined = list(zip_longest(*pieces))
        with self.model.training_mode(True):
            for start in range(0, len(joined), at_once):
                one = _JoinedPass(self, runs, joined[start : start + at_once])
                run_passes([one], unpacks_once=True)
                self.requires = one.requires


class _NoSlots(LayerSlots):
    """A replacement for LayerSlots if all layers of the base are on the device. It copies nothing."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def holding(self, layer: int, then: int | None = None) -> Iterator[None]:
        yield


def passes_at_once(runs: Sequence[WindowRun]) -> int:
    """How many micro-batches of each run pass through a layer before the next layer runs."""
    sizes = [run.engine.micro_batches_per_pass for run in runs if isinstance(run.engine, StreamingEngine)]
    return min(sizes, default=1)
