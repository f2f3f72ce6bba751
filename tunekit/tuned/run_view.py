"""What objectives and companions see of a run: its model, rows and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tunekit.contracts import Batch, Companion, Gather, Model, Progress, Read, RowKind, no_progress


@dataclass
class ModelRun:
    """A RunView over one model; its companions are the model's."""

    model: Model
    rows: RowKind
    gather: Gather = list
    progress: Progress = no_progress

    @property
    def is_simulated(self) -> bool:
        """Whether the model is on the meta device, without values."""
        return self.model.device.type == "meta"

    def score(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """What `read` takes from the model's forward of each batch, on the host, without gradient or dropout."""
        return self.model.scored(batches, read)

    def reference(self, batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """The same of the policy at step 0: the base, the adapter bypassed."""
        return self.model.scored(batches, read, bypassed=True)

    def companion(self, key: str) -> Companion:
        """The loaded companion with this key."""
        companion: Companion = self.model.companions[key]
        return companion
