"""Transcribes recordings with transformers: greedy decoding unless sampling is set."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import GREEDY, Sampling
from tunekit.machine.placing import to_device
from tunekit.model.call import seed_for
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import as_pretrained
from tunekit.model.text.decoder import decoding
from tunekit.model.text.generation import sampling_settings
from tunekit.model.transformers_guard import quiet


@torch.no_grad()
def transcribe(
    model: LoadedModel,
    features: Tensor,
    language_and_task: Mapping[str, Any],
    *,
    timestamps: bool,
    max_tokens: int,
    place: int = 0,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Generate the ids of each recording's transcript, including special tokens. The model's own generation settings
    apply, except the outdated forced_decoder_ids, because language and task are passed by name.

    Shapes: features (B, M, F), or samples (B, N).
    `language_and_task`: arguments of transformers' generate, for multilingual models. `max_tokens`: the maximum length
    of an answer. `place`: the number of the batch, for its seed.
    """
    settings = deepcopy(model.generation_config)
    assert settings is not None
    settings.forced_decoder_ids, settings.return_timestamps = None, timestamps
    chosen = sampling_settings(sampling)
    settings.update(max_new_tokens=max_tokens, max_length=None, num_beams=1, use_cache=True, **chosen)
    with decoding(model.net), quiet():
        torch.manual_seed(seed_for("generate", sampling.seed, place))
        inputs = to_device(features, model.device).to(model.dtype)
        output = as_pretrained(model.net).generate(inputs, generation_config=settings, **language_and_task)
    return output.tolist()


def without_padding(ids: Sequence[int], end: int | None) -> list[int]:
    """The ids before the first end token."""
    return list(ids[: ids.index(end)]) if end in ids else list(ids)
