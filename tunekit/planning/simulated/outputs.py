"""A cache for the outputs of operations on meta tensors. The key consists of the operation and the shapes, strides and
types of its inputs.

torch computes these outputs in Python, which takes a quarter of a millisecond per operation. The same few hundred
operations occur again in each layer, in each step, and for each setting that plan compares.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

OperationInputs = tuple[Any, ...]
CACHED_OUTPUTS = 20_000  # some 10 MB
CHANGING = {torch.Tag.inplace_view, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_layouts: dict[tuple[object, ...], list[_Layout] | None] = {}  # None: the output is the first input, changed in place


def meta_output(func: OpOverload, args: OperationInputs, kwargs: dict[str, Any]) -> object:
    """The output of `func(*args, **kwargs)` on meta tensors, from the cache if possible."""
    kind = _kind(func)
    key = (func, *_described(args), *_described(tuple(kwargs.items()))) if kind else (None,)
    if kind is None or None in key:
        return func(*args, **kwargs)
    try:
        known = _layouts.get(key, ())
    except TypeError:  # not hashable
        return func(*args, **kwargs)
    if known is None:
        return args[0]
    if known:
        outputs = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    if len(_layouts) >= CACHED_OUTPUTS:
        _layouts.clear()
    output = func(*args, **kwargs)
    if kind == "in place":
        if output is args[0]:
            _layouts[key] = None
    elif layouts := _layouts_of(output, (args, kwargs)):
        _layouts[key] = layouts
    return output


@cache
def _kind(func: OpOverload) -> str | None:
    """The kind of an operation: "new" if it makes new tensors, "in place" if it changes its first input; None for
    others, such as views."""
    schema = func._schema
    shared = [place for place, argument in enumerate(schema.arguments) if argument.alias_info is not None]
    if CHANGING & set(func.tags) or any(str(value.type) != "Tensor" for value in schema.returns):
        return None
    if not shared and all(value.alias_info is None for value in schema.returns):
        return "new" if schema.returns else None
    first = schema.arguments[0].alias_info
    changes = first is not None and first.is_write and len(schema.returns) == 1
    return "in place" if shared == [0] and changes else None


def _described(values: tuple[object, ...] | list[object]) -> list[object]:
    """A hashable description of the inputs, from which the output follows. It contains None for an input that is a real
    tensor or has a subclass of Tensor."""
    descriptions: list[object] = []
    for value in values:
        if isinstance(value, Tensor):
            plain = type(value) in (Tensor, nn.Parameter) and value.is_meta and not value.is_complex()
            descriptions.append((value.shape, value.stride(), value.dtype) if plain else None)
        elif isinstance(value, tuple | list):
            inside = _described(value)
            descriptions.append(None if None in inside else tuple(inside))
        else:
            descriptions.append((type(value), value))  # 1 and True and 1.0 are not the same
    return descriptions


def _layouts_of(output: object, inputs: object) -> list[_Layout]:
    """Shape, strides and dtype of each output. Empty if an output shares its storage with another tensor, or does not
    fill its storage."""
    tensors = output if isinstance(output, tuple) else (output,)
    storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    layouts: list[_Layout] = []
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_meta or tensor.untyped_storage()._cdata in storages:
            return []
        size, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
        same = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        if tensor.storage_offset() or same.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return []
        storages.add(tensor.untyped_storage()._cdata)
        layouts.append((size, stride, dtype))
    return layouts
