"""Log-probabilities in chunks, against torch's own log_softmax in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tunekit.contracts import ModelOutput
from tunekit.objectives.losses.logprobs import at_temperature, log_probabilities

POSITIONS, HIDDEN, VOCABULARY = 11, 6, 17


class CappedHead(nn.Module):
    """A soft cap, so that the gradient passes something that is not linear; remembers the most rows it was given."""

    def __init__(self, dtype: torch.dtype, trained: bool, dropout: float = 0.0) -> None:
        super().__init__()
        weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
        self.dropout, self.rows = dropout, 0

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows = max(self.rows, len(hidden))
        return 3 * torch.tanh(nn.functional.dropout(hidden, self.dropout) @ self.weight.T / 3)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(found: Tensor, hidden: Tensor, head: CappedHead) -> Sequence[Tensor]:
    upstream = numbers(5, POSITIONS).to(found.dtype)
    wanted = [hidden, head.weight] if head.weight.requires_grad else [hidden]
    return torch.autograd.grad((found * upstream).sum(), wanted)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_those_of_log_softmax(trained: bool, chunk: int) -> None:
    index = torch.tensor([3, 0, 5, 7, 7, 1, 9, 2, 13, 8, 4])
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    exact, hidden = CappedHead(torch.float64, trained), numbers(2, 2, 7, HIDDEN).requires_grad_()
    logits = exact.logits(hidden.reshape(-1, HIDDEN)[index])
    expected = logits.log_softmax(-1)[torch.arange(POSITIONS), targets]
    head, ours = CappedHead(torch.float32, trained), hidden.detach().float().requires_grad_()
    parameters = [head.weight] if trained else []
    output = ModelOutput(ours, head, parameters, chunk)
    found = log_probabilities(output, index, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    pairs = zip(gradients(found, ours, head), gradients(expected, hidden, exact), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert head.rows <= chunk, "never more logits than a chunk's"
    with torch.no_grad():
        torch.testing.assert_close(log_probabilities(output, index, targets), found)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_entropies_and_temperatures_are_those_of_the_distribution(trained: bool) -> None:
    index, targets = torch.tensor([3, 0, 5, 7, 1]), torch.tensor([4, 0, 16, 2, 9])
    head, hidden = CappedHead(torch.float32, trained), numbers(2, 2, 7, HIDDEN).float().requires_grad_()
    parameters = [head.weight] if trained else []
    output, entropies = ModelOutput(hidden, head, parameters, 2), torch.zeros(5)
    found = log_probabilities(at_temperature(output, 0.5), index, targets, entropies)
    expected = (2 * head.logits(hidden.reshape(-1, HIDDEN)[index])).log_softmax(-1)
    torch.testing.assert_close(found, expected[torch.arange(5), targets], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1).detach(), rtol=1e-5, atol=1e-6)
    assert not entropies.requires_grad
    found.sum().backward()  # which computes a trained head's chunks again
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1).detach(), rtol=1e-5, atol=1e-6)
    nothing = log_probabilities(output, index[:0], targets[:0], entropies[:0])
    assert nothing.shape == (0,)
    with torch.no_grad():
        assert log_probabilities(output, index[:0], targets[:0]).shape == (0,)


def test_a_head_that_draws_is_computed_again_with_the_same_draws() -> None:
    """Of one position only: its log-probability and the weight's gradient then tell the same mask."""
    head, hidden = CappedHead(torch.float32, trained=True, dropout=0.5), numbers(2, 1, 1, HIDDEN).float()
    index, targets = torch.tensor([0]), torch.tensor([4])
    masks = set()
    for seed in range(6):
        torch.manual_seed(seed)
        found = log_probabilities(ModelOutput(hidden, head, [head.weight], 4), index, targets)
        (ours,) = torch.autograd.grad(found.sum(), head.weight)
        torch.manual_seed(seed)
        direct = head.logits(hidden[0]).log_softmax(-1)[0, 4]
        (expected,) = torch.autograd.grad(direct, head.weight)
        torch.testing.assert_close(ours, expected)
        masks.add(tuple((ours.abs().sum(0) > 0).tolist()))
    assert len(masks) > 1
