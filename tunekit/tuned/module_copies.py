"""Copies of a base's modules that share its tensors, so that several runs can adapt one loaded base."""

import copy
from dataclasses import replace

from torch import Tensor, nn

from tunekit.model.load import LoadedModel
from tunekit.model.parts import parts_apart
from tunekit.model.pretrained import config_of


def copy_modules(base: LoadedModel) -> LoadedModel:
    """Copy the base: new modules and a new configuration, but the same tensors. A run can replace and wrap modules of
    the copy, but must not change values of tensors. Copy a base before it is prepared for a run."""
    shared: dict[int, object] = {id(part): part for part in parts_apart(base.net).values()}
    for module in base.net.modules():
        named = {**module._parameters, **module._buffers, **vars(module)}
        shared |= {id(value): value for value in named.values() if isinstance(value, Tensor)}
    net: nn.Module = copy.deepcopy(base.net, shared)
    return replace(base, net=net, config=config_of(net))


class TensorVersions:
    """Records the versions and addresses of a base's tensors, to detect whether a run changes a tensor."""

    def __init__(self, base: LoadedModel) -> None:
        tensors = [*base.net.parameters(), *base.net.buffers()]
        self._tensors = [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]

    def unchanged(self) -> bool:
        """Whether no tensor was changed in place or moved in memory since the start. Streamed layers always move, so
        this works only for bases that stay on the device."""
        return all(t._version == version and t.data_ptr() == pointer for t, version, pointer in self._tensors)
