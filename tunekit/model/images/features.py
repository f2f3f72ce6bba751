"""Runs the frozen vision tower of a composite model for one image at a time, so that the features of an image depend on
no other image; and makes the positions of rows with images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.errors import ModelError
from tunekit.machine.placing import to_device
from tunekit.model.parts import parts_apart
from tunekit.model.pretrained import as_pretrained


@torch.no_grad()
def image_features(net: nn.Module, inputs: Tensors, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The features of one image, (tokens, D), on `device`. `inputs`: of the tower, for this image alone."""
    if not parts_apart(net, loaded=True):
        what = "rows have images, but the parts of the base that read images are not loaded"
        raise ModelError(what, "use rows of text alone, or train an adapter on rows with images first")
    moved = {name: to_device(tensor, device) for name, tensor in inputs.items()}
    floats = {name: tensor.to(dtype) for name, tensor in moved.items() if tensor.is_floating_point()}
    pooled = as_pretrained(net).base_model.get_image_features(**moved | floats, return_dict=True).pooler_output
    features = pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))
    return features.reshape(-1, features.shape[-1])


def rope_positions(net: nn.Module, ids: Tensor, types: Tensor, images: Sequence[Tensors]) -> Tensor | None:
    """Positions (3, T) of a row, in time, height and width; None for a base that counts tokens one by one.

    `ids`, `types`: (T,), of which `types` is 1 at features of images. `images`: the tower's inputs for each image.
    """
    base = as_pretrained(net).base_model
    if not hasattr(base, "get_rope_index"):
        return None
    if not images:
        return torch.arange(len(ids)).expand(3, -1)
    grids = torch.cat([image["image_grid_thw"] for image in images])  # (images, 3)
    positions: Tensor = base.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grids)[0]
    return positions[:, 0]
