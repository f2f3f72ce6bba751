"""Load-time probes: the loaded model goes in; out comes how far packed rows are from rows alone, our
log-probabilities from the model's own, and the adapted model from its base.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tunekit.evaluation.scores import undisturbed
from tunekit.model.call import calling, current_call
from tunekit.objectives.losses.logprobs import losses_of_positions, supervised_positions
from tunekit.tuned.model import TunedModel

PROBE_TOKENS = 12
# The largest relative difference that rounding explains: a leak or a missing scale is far larger.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def packing_leak(model: TunedModel, ids: Tensor) -> float:
    """Relative difference of the second row's hidden states packed behind another row and alone.

    Both rows are drawn from `ids`, a seeded choice; 0 up to rounding where position ids alone isolate packed rows.
    """
    first, second = _probe_ids(ids, 0), _probe_ids(ids, 1)  # (1, T) each
    positions = torch.arange(PROBE_TOKENS)[None]
    with undisturbed(model):
        alone = model.hidden({"input_ids": second, "position_ids": positions})
        both, places = torch.cat([first, second], dim=1), torch.cat([positions, positions], dim=1)
        packed = model.hidden({"input_ids": both, "position_ids": places})
    return _relative_difference(packed[:, PROBE_TOKENS:], alone)


def logprob_difference(model: TunedModel, inputs: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest loss, of our chunked losses and those of the net's own logits, of a
    row drawn from the ids of `inputs`."""
    family = model.base.family
    assert family.ids is not None  # it answers
    ids = _probe_ids(inputs[family.ids], 2)  # (1, T)
    index, targets = (part.to(model.device) for part in supervised_positions(ids))
    inputs = family.inputs_of(ids, inputs)
    with undisturbed(model):
        output = replace(model.output(inputs), chunk_tokens=5)
        ours = losses_of_positions(output, index, targets)
        logits = model.own_logits(inputs).float()  # (1, T, V)
        own = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1])[index], targets, reduction="none")
    return _relative_difference(ours, own)


def bypass_difference(model: TunedModel, ids: Tensor) -> float:
    """Relative difference of a row's hidden states with the adapter and without; the row is drawn from `ids`."""
    inputs = {"input_ids": _probe_ids(ids, 3), "position_ids": torch.arange(PROBE_TOKENS)[None]}
    with undisturbed(model):
        adapted = model.hidden(inputs)
        with calling(replace(current_call(), bypassed=True)):
            return _relative_difference(adapted, model.hidden(inputs))


def _probe_ids(ids: Tensor, number: int) -> Tensor:
    """(1, T) of the ids that occur in the run: of others the pages of a mapped embedding would become resident."""
    known: Tensor = torch.unique(ids)  # (ids,)
    generator = torch.Generator().manual_seed(number)
    return known[torch.randint(0, len(known), (1, PROBE_TOKENS), generator=generator)]


def _relative_difference(ours: Tensor, reference: Tensor) -> float:
    scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.float() - reference.float()).abs().max() / scale)
