"""Defines RequiresGrad: which hidden states of a streamed model need a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tunekit.contracts import LayerCall, Stages


@dataclass
class RequiresGrad:
    """Records which hidden states depend on trained parameters, and so require a gradient. The values are recorded
    while the first micro-batch runs."""

    embeddings: list[bool] = field(default_factory=list)  # of each stack
    layers: list[bool] = field(default_factory=list)  # of each layer's output
    side_outputs: list[list[bool]] = field(default_factory=list)  # of each layer

    @staticmethod
    def nowhere(stages: Stages) -> RequiresGrad:
        """No hidden state requires a gradient, because there is no backward pass."""
        return RequiresGrad([False] * len(stages.stacks), [False] * len(stages.layers))

    def before(self, number: int, stack: int | None) -> bool:
        """Whether this layer's input requires a gradient. `stack`: the index of the stack (encoder or decoder) that
        starts with this layer; None if no stack starts here."""
        return self.layers[number - 1] if stack is None else self.embeddings[stack]

    def record(self, number: int, stack: int | None, hidden: Tensor, call: LayerCall) -> None:
        """Record whether a layer's output requires a gradient. `hidden`: the output, computed with a graph for this
        layer alone."""
        self.layers.append(self.before(number, stack) or hidden.requires_grad)
        values = [None if side is None else side.value for side in call.side_outputs]
        self.side_outputs.append([value is not None and value.requires_grad for value in values])
