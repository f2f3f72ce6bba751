"""Recordings to ids of what is said in them, greedy unless the sampling says otherwise, by transformers."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tunekit.contracts import GREEDY, Sampling
from tunekit.machine.placing import placed
from tunekit.model.call import seed_for
from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import as_pretrained
from tunekit.model.text.generation import drawn_settings, left_as_found
from tunekit.model.transformers_guard import quiet


@torch.no_grad()
def transcribe(
    model: LoadedModel,
    features: Tensor,
    asked: Mapping[str, Any],
    *,
    timestamps: bool,
    most_tokens: int,
    place: int = 0,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """New ids of each recording, special tokens among them. The model's own generation settings hold, but for what is
    old in them: forced_decoder_ids, in whose stead language and task are named.

    Shapes: features (B, M, F), or samples (B, N).
    `asked`: language and task, of multilingual models; `most_tokens`: of an answer; `place`: of the batch, for seeds.
    """
    settings = deepcopy(model.generation_config)
    assert settings is not None
    settings.forced_decoder_ids, settings.return_timestamps = None, timestamps
    chosen = drawn_settings(sampling)
    settings.update(max_new_tokens=most_tokens, max_length=None, num_beams=1, use_cache=True, **chosen)
    with left_as_found(model.net), quiet():
        torch.manual_seed(seed_for("generate", sampling.seed, place))
        inputs = placed(features, model.device).to(model.dtype)
        output = as_pretrained(model.net).generate(inputs, generation_config=settings, **asked)
    return output.tolist()


def without_padding(ids: Sequence[int], end: int | None) -> list[int]:
    """Ids up to the first that ends an answer."""
    return list(ids[: ids.index(end)]) if end in ids else list(ids)
