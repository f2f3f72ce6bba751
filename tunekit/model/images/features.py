"""Runs the frozen vision tower of a composite model for one image at a time, so that the features of an image depend on
no other image; and makes the positions of rows with images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunekit.contracts import Tensors
from tunekit.errors import ModelError
from tunekit.files.tensors import tensor_bytes
from tunekit.machine.placing import to_device
from tunekit.model.parts import parts_apart
from tunekit.model.pretrained import as_pretrained, config_of
from tunekit.records import JsonObject

GRID = "image_grid_thw"  # the input of a tower that positions of rows need
PARTS_HASH = "parts_hash"  # the attribute of a net
BOTH_WAYS = ("paligemma",)  # model types


@torch.no_grad()
def image_features(net: nn.Module, inputs: Tensors, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The features of one image, (tokens, D), on `device`. `inputs`: of the tower, for this image alone.

    Features that the base adds to the states after its first layers follow on the second axis: (tokens, (1+L) D).
    """
    if not parts_apart(net, loaded=True):
        what = "rows have images, but the parts of the base that read images are not loaded"
        raise ModelError(what, "use rows of text alone, or train an adapter on rows with images first")
    moved = {name: to_device(tensor, device) for name, tensor in inputs.items()}
    floats = {name: tensor.to(dtype) for name, tensor in moved.items() if tensor.is_floating_point()}
    output = as_pretrained(net).base_model.get_image_features(**moved | floats, return_dict=True)
    deep: Sequence[Tensor | Sequence[Tensor]] = getattr(output, "deepstack_features", None) or ()
    return torch.cat([_in_one(some) for some in (output.pooler_output, *deep)], dim=-1)


def features_key(net: nn.Module, device: torch.device, dtype: torch.dtype) -> JsonObject:
    """Everything besides the image and the processor that affects a bit of its features."""
    return {
        "parts": _parts_hash(net),
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "torch": torch.__version__,
    }


def _parts_hash(net: nn.Module) -> str:
    """sha256 of the parts that read images. It is computed once for a net, because they are frozen."""
    if PARTS_HASH not in vars(net):
        digest = hashlib.sha256()
        for name, part in sorted(parts_apart(net, loaded=True).items()):
            for key, tensor in part.state_dict().items():
                digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor_bytes(tensor.detach().cpu().contiguous()))
        vars(net)[PARTS_HASH] = digest.hexdigest()
    return str(vars(net)[PARTS_HASH])


def _in_one(features: Tensor | Sequence[Tensor]) -> Tensor:
    whole = features if isinstance(features, Tensor) else torch.cat(list(features))
    return whole.reshape(-1, whole.shape[-1])


def deep_layers(net: nn.Module) -> int:
    """The number of layers after which the base adds features of images to the states."""
    return len(getattr(getattr(config_of(net), "vision_config", None), "deepstack_visual_indexes", None) or ())


def prompts_both_ways(net: nn.Module) -> bool:
    """Whether the tokens before the first answer attend to each other in both directions."""
    return config_of(net).model_type in BOTH_WAYS


def rope_positions(net: nn.Module, ids: Tensor, types: Tensor, images: Sequence[Tensors]) -> Tensor | None:
    """Positions (3, T) of a row, in time, height and width; None for a base that counts tokens one by one.

    `ids`, `types`: (T,), of which `types` is 1 at features of images. `images`: the tower's inputs for each image.
    """
    base = as_pretrained(net).base_model
    if not hasattr(base, "get_rope_index"):
        return None
    if not images:
        return torch.arange(len(ids)).expand(3, -1)
    grids = torch.cat([image[GRID] for image in images])  # (images, 3)
    positions: Tensor = base.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grids)[0]
    return positions[:, 0]
