"""Undoes what a run put into the network of its base, so that the next run starts from the base as it was loaded."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class _Saved:
    """An object, its attributes, and a copy of the content of those that are mappings, sets or lists."""

    owner: object
    attributes: dict[str, object]
    contents: Mapping[str, object]


class NetworkSnapshot:
    """The modules of a network as they are now: their attributes, hooks, children and tensors. No tensor is copied."""

    def __init__(self, net: nn.Module) -> None:
        modules = list(net.modules())
        configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
        self._saved = [_save(owner) for owner in (*modules, *configs.values())]
        tensors = [*net.parameters(), *net.buffers()]
        self._tensors = [(tensor, tensor.data, tensor._version, tensor.requires_grad) for tensor in tensors]

    def restore(self) -> bool:
        """Put everything back. False if the values of a tensor were changed in place, which cannot be undone."""
        for saved in self._saved:
            attributes = vars(saved.owner)
            attributes.clear()
            attributes.update(saved.attributes)
            for name, content in saved.contents.items():
                _refill(attributes[name], content)
        for tensor, data, _, requires_grad in self._tensors:
            tensor.data, tensor.grad = data, None
            if tensor.is_floating_point():
                tensor.requires_grad_(requires_grad)
        return all(tensor._version == version for tensor, _, version, _ in self._tensors)


def _save(owner: object) -> _Saved:
    attributes = dict(vars(owner))
    contents = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, dict | set | list)}
    return _Saved(owner, attributes, contents)


def _refill(value: object, content: object) -> None:
    """Give a mapping, set or list its earlier content. It stays the same object, because others may refer to it."""
    if isinstance(value, list) and isinstance(content, list):
        value[:] = content
    if isinstance(value, dict) and isinstance(content, dict):
        value.clear()
        value.update(content)
    if isinstance(value, set) and isinstance(content, set):
        value.clear()
        value.update(content)
