"""Checks of a loaded model: packed rows against single rows, our log-probabilities against the model's, and the adapted
model against its base."""

from dataclasses import replace

import torch
from torch import Tensor

from tunekit.evaluation.scores import undisturbed
from tunekit.model.call import calling, current_call
from tunekit.objectives.losses.logprobs import scores_of_positions, supervised_positions
from tunekit.tuned.model import TunedModel

PROBE_TOKENS = 12
# The largest relative difference that rounding can cause. A leak or a missing scale causes a far larger one.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def packing_leak(model: TunedModel, ids: Tensor) -> float:
    """The relative difference between a row's hidden states when it is packed after another row, and when it is alone.
    If position ids alone separate packed rows, the difference is 0, up to rounding. The rows have random ids from
    `ids`, with a fixed seed."""
    first, second = _probe_ids(ids, 0), _probe_ids(ids, 1)  # (1, T) each
    positions = torch.arange(PROBE_TOKENS)[None]
    with undisturbed(model):
        alone = model.hidden({"input_ids": second, "position_ids": positions})
        both, places = torch.cat([first, second], dim=1), torch.cat([positions, positions], dim=1)
        packed = model.hidden({"input_ids": both, "position_ids": places})
    return _relative_difference(packed[:, PROBE_TOKENS:], alone)


def logprob_difference(model: TunedModel, inputs: dict[str, Tensor]) -> float:
    """The largest difference between our chunked losses and losses from the model's own logits, divided by the largest
    loss. Both losses are computed on a row of random ids from `inputs`."""
    family = model.base.family
    assert family.ids is not None  # a model that answers has ids
    ids = _probe_ids(inputs[family.ids], 2)  # (1, T)
    index, targets = (part.to(model.device) for part in supervised_positions(ids))
    inputs = family.inputs_of(ids, inputs)
    with undisturbed(model):
        output = replace(model.output(inputs), chunk_tokens=5)
        ours, _ = scores_of_positions(output, index, targets)
        logits = model.own_logits(inputs).float()  # (1, T, V)
        own = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1])[index], targets, reduction="none")
    return _relative_difference(ours, own)


def bypass_difference(model: TunedModel, ids: Tensor) -> float:
    """The relative difference between a row's hidden states with and without the adapter. The row has random ids from
    `ids`."""
    inputs = {"input_ids": _probe_ids(ids, 3), "position_ids": torch.arange(PROBE_TOKENS)[None]}
    with undisturbed(model):
        adapted = model.hidden(inputs)
        with calling(replace(current_call(), bypassed=True)):
            return _relative_difference(adapted, model.hidden(inputs))


def _probe_ids(ids: Tensor, number: int) -> Tensor:
    """Random ids (1, T), drawn from the run's ids. Other ids would read more pages of a memory-mapped embedding."""
    known: Tensor = torch.unique(ids)  # (ids,)
    generator = torch.Generator().manual_seed(number)
    return known[torch.randint(0, len(known), (1, PROBE_TOKENS), generator=generator)]


def _relative_difference(ours: Tensor, reference: Tensor) -> float:
    scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.float() - reference.float()).abs().max() / scale)
