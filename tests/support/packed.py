"""A hash of what a net holds packed, for tests that compare two loads of one base."""

from __future__ import annotations

import hashlib

from torch import nn

from tunekit.files.tensors import tensor_bytes
from tunekit.model.quantized.weights import packed_layers


def packed_hash(net: nn.Module) -> str:
    """sha256 over every packed tensor: two loads of one base must agree, or a resumed run would differ."""
    digest = hashlib.sha256()
    for name, layer in sorted(packed_layers(net).items()):
        for tensor_name, tensor in layer.tensors().items():
            digest.update(f"{name}.{tensor_name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
