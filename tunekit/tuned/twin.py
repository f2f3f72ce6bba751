"""Copies of a base's modules that share its tensors, so that several runs can adapt one loaded base."""

import copy
from dataclasses import replace

from torch import Tensor, nn

from tunekit.model.load import LoadedModel
from tunekit.model.pretrained import config_of


def make_twin(base: LoadedModel) -> LoadedModel:
    """A copy of the base with separate modules and configuration, but the same tensors. A run may replace and wrap
    modules, but must not change values. The base must not have been prepared for a run."""
    shared: dict[int, object] = {}
    for module in base.net.modules():
        named = {**module._parameters, **module._buffers, **vars(module)}
        shared |= {id(value): value for value in named.values() if isinstance(value, Tensor)}
    net: nn.Module = copy.deepcopy(base.net, shared)
    return replace(base, net=net, config=config_of(net))


class TensorVersions:
    """Records the state of a base's tensors, to detect a run that changes them."""

    def __init__(self, base: LoadedModel) -> None:
        tensors = [*base.net.parameters(), *base.net.buffers()]
        self._tensors = [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]

    def unchanged(self) -> bool:
        """Whether no value was changed in place, and no tensor moved to different memory. Streamed layers always
        move, so this works only for bases that stay on the device."""
        return all(t._version == version and t.data_ptr() == pointer for t, version, pointer in self._tensors)
