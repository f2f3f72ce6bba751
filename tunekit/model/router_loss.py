"""The router loss of a mixture of experts: it is low if all experts get equally many tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunekit.machine.placing import to_device

ROUTER_LOSS = "router_loss"  # the name of its logged value


@dataclass(frozen=True)
class RouterLoss:
    """loss = weight * E * sum over experts e of f(e) p(e), over all E experts.

    f(e): how many experts e are among the `top_k` most likely ones of a token; p(e): the probability of e; each is the
    mean over all routers and all tokens of a forward, without padding. f has no gradient.
    Source: Fedus et al. 2021, eq. 4 to 6, as transformers computes it.
    """

    weight: float
    top_k: int


class Routing:
    """Adds up the routers' choices in one forward. `real`: (B, T), whether a position is a token and not padding.
    Virtual tokens, which an adapter puts before each row, count as tokens."""

    def __init__(self, settings: RouterLoss, real: Tensor) -> None:
        self.settings, self.real = settings, real
        self.recorded: list[Tensor] | None = []  # (N, E) logits; None: routers that run now are not counted
        self.chosen = self.likely = torch.zeros(1)  # (E,) sums of f and p, in float32
        self.tokens = torch.zeros(1)  # (1,) of all routers

    def add(self) -> None:
        """Add the choices of the routers that ran since `record`."""
        for logits in self.recorded or ():
            chosen, likely, tokens = self._sums(logits)
            self.chosen, self.likely = self.chosen.to(logits.device) + chosen, self.likely.to(logits.device) + likely
            self.tokens = self.tokens.to(logits.device) + tokens
        self.recorded = None

    def record(self) -> None:
        """Count the routers that run from now on."""
        self.recorded = []

    def loss(self) -> Tensor:
        """() float32: the loss of all routers that were added."""
        return self._scaled(self.likely)

    def layer_loss(self) -> Tensor | None:
        """() float32: the share of the routers that ran since `record` in the loss of all routers, which were added
        before; None without such a router."""
        recorded, self.recorded = self.recorded, None
        return self._scaled(torch.stack([self._sums(logits)[1] for logits in recorded]).sum(0)) if recorded else None

    def _scaled(self, likely: Tensor) -> Tensor:
        """The loss if the probabilities add up to `likely` (E,)."""
        scale = self.settings.weight * self.chosen.numel() / self.tokens.clamp(min=1) ** 2
        return (scale * self.chosen * likely).sum()

    def _sums(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of f and p, each (E,), and the number of tokens (1,), for one router: logits (..., E)."""
        likely = torch.softmax(logits.flatten(0, -2), -1, dtype=torch.float32)  # (N, E)
        real = self._real(likely)
        chosen = likely.detach().topk(self.settings.top_k, dim=-1).indices  # (N, K)
        counts = torch.zeros_like(likely[0]).scatter_add_(0, chosen.flatten(), real.repeat_interleave(chosen.shape[1]))
        return counts, (likely * real[:, None]).sum(0), real.sum()[None]

    def _real(self, likely: Tensor) -> Tensor:
        """(N,) float32: 1 for tokens, 0 for padding."""
        rows, width = self.real.shape
        return F.pad(
            to_device(self.real.to(likely.dtype), likely.device), (len(likely) // rows - width, 0), value=1
        ).flatten()
