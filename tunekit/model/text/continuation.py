"""The decoder's input (a prompt to continue), and its output (one object per new token)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from tunekit.contracts import GREEDY, Sampling, Tensors
from tunekit.model.text.draws import Score, TokenSampler

Adapt = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class States:
    """The keys and values of the tokens `ids`. `layers`: for each layer, two tensors (1, H, T, D)."""

    ids: tuple[int, ...]
    layers: Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Continuation:
    """A prompt that the decoder continues until it reaches `max_new_tokens` tokens or one of `stop_ids`.

    `sampling`: sampling settings, with a separate seed for this continuation.
    `allowed`: a function from the new tokens so far to the tokens that can come next, (V,) bool; None: all tokens.
    `top`: report the log-probability of each new token, and the `top` most likely tokens; None: no report. The
    log-probabilities are the model's own, without temperature and `allowed`.
    `scores_prompt`: also report the log-probabilities of the prompt, from its second token on; needs `top`.
    `adapter`: the name of the adapter that generates the answer, passed to the decoder's `using`. `alone`: a forward
    with this adapter must not contain rows of other adapters.
    `adapt`: changes the inputs of the prompt's forward, for an adapter that adds `virtual_tokens` positions.
    `states`: the keys and values of a prefix of the prompt, from an earlier continuation with `keeps_states`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] = ()
    allowed: Callable[[Sequence[int]], Tensor | None] | None = None
    top: int | None = None
    scores_prompt: bool = False
    adapter: str | None = None
    alone: bool = False
    adapt: Adapt | None = None
    virtual_tokens: int = 0
    states: States | None = None
    keeps_states: bool = False

    @property
    def columns(self) -> int:
        """The maximum number of tokens whose keys and values are stored. The keys of the last new token are not
        needed."""
        return self.virtual_tokens + len(self.prompt) + self.max_new_tokens - 1


@dataclass(frozen=True)
class NewToken:
    """A new token of the continuation `handle`. `reason`: why the continuation ends with this token ("stop" or
    "length"); None: more tokens follow. `states`: keys and values, only with the last token of a continuation that
    keeps them."""

    handle: int
    id: int
    reason: str | None = None
    score: Score | None = None
    prompt_scores: Sequence[Score] = ()
    states: States | None = None


@dataclass(eq=False)
class DecoderRow:
    """A continuation that waits or runs. `offset`: the index of its first token in the key-value cache. `position`: the
    position of its last token. `prompt_scores`: the scores of the prompt's tokens; empty after they are reported."""

    handle: int
    continuation: Continuation
    sampler: TokenSampler
    tokens: list[int] = field(default_factory=list)
    offset: int = 0
    position: int = 0
    prompt_scores: Sequence[Score] = ()

    @cached_property
    def key(self) -> tuple[object, ...]:
        """A key that is the same for two rows if their prompts have the same keys and values, so that one forward is
        enough."""
        wanted = self.continuation
        return tuple(wanted.prompt), wanted.adapter, wanted.adapt is None, self.handle if self.is_special else None

    @property
    def group(self) -> tuple[bool, str | None]:
        """A key that is the same for all rows that one forward can contain."""
        wanted = self.continuation
        return wanted.alone, wanted.adapter if wanted.alone else None

    @property
    def is_special(self) -> bool:
        """Whether the row's prompt needs a separate forward, without the prompts of other rows."""
        return self.continuation.scores_prompt or self.continuation.states is not None
