"""Weighted sums of adapters whose method is not LoRA, but whose update is a linear function of the adapter's
tensors."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunekit.adapters.folder.config import AdapterConfig, adapter_header, read_adapter_config, tensors_path
from tunekit.arithmetic.combine import Mixture
from tunekit.arithmetic.lora_folder import PREFIX, read_tensors
from tunekit.arithmetic.write import BaseFacts, write_without_base
from tunekit.contracts import Tensors
from tunekit.errors import AdapterError
from tunekit.files.untrusted import printable, same_value

NOT_COMPARED = {"init_from", "dropout"}  # settings that do not change the output of a trained adapter
TO_LORA = "first convert each adapter to a LoRA: tunekit adapter convert --rank R"
LinearFolder = tuple[AdapterConfig, Tensors]  # an adapter of such a method, without its base


def read_linear(folder: Path) -> LinearFolder:
    """Reads the configuration and all tensors of an adapter folder whose method is linear.

    Raises: AdapterError if the method is not linear, or if the file has a tensor that does not belong to the adapter.
    """
    config = read_adapter_config(folder)
    if not config.method.is_linear(config.settings):
        what = f"{config.settings.method} adapters cannot be added: their update is not linear in their tensors"
        raise AdapterError(what, TO_LORA, file=config.file)
    path = tensors_path(folder)
    header = adapter_header(path)
    endings = tuple(f".{name}" for name in config.method.tensors)
    foreign = [key for key in header if not key.startswith(PREFIX) or not key.endswith(endings)]
    if foreign and getattr(config.settings, "modules_to_save", None):
        what = f"{config.settings.method} adapters that also train whole modules cannot be added"
        raise AdapterError(what, TO_LORA, file=config.file, key="modules_to_save")
    if foreign or not header:
        what = f"'{printable(foreign[0], 200)}' is not a tensor of this adapter" if foreign else "holds no tensors"
        raise AdapterError(what, "write the adapter again with the program that made it", file=str(path))
    return config, read_tensors(config, header)


def combine_linear(adapters: Sequence[LinearFolder], weights: Sequence[float]) -> Tensors:
    """The tensors of the combined adapter, n + sum of w (t - n), with the weights w and the adapters' tensors t. n is
    the value with which a tensor has no effect. The combined update is the weighted sum of the adapters' updates.

    Raises: AdapterError if the adapters differ in more than their trained values.
    """
    for other in adapters[1:]:
        _refuse_difference(adapters[0], other)
    config, first = adapters[0]
    method = config.method
    if method.only_copies is not None and not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        what = (
            f"{config.settings.method} trains whole tensors, so the weights must sum to 1, but they sum to "
            f"{sum(weights):g}"
        )
        raise AdapterError(what, "give weights that sum to 1", key="--weights")

    def add(tensors: list[Tensor]) -> Tensor:
        changes = [weight * (tensor.float() - method.neutral) for weight, tensor in zip(weights, tensors, strict=True)]
        return torch.stack(changes).sum(0) + method.neutral

    return {
        key: add([tensors[key] for _, tensors in adapters]) if tensor.is_floating_point() else tensor
        for key, tensor in first.items()
    }


def write_linear(place: Path, folders: Sequence[Path], mixture: Mixture, facts: BaseFacts) -> None:
    """Write the weighted sum of adapters of one method into the folder `place`.

    Raises: AdapterError if adapters of this method cannot be combined in this way.
    """
    parts = [read_linear(folder) for folder in folders]
    config, _ = parts[0]
    if mixture.kind != "linear":
        what = f"{config.settings.method} adapters can only be combined with the method linear, not {mixture.kind}"
        raise AdapterError(what, "use --method linear, or convert each adapter to a LoRA first", key="--method")
    tensors = combine_linear(parts, mixture.weights)
    fields = {key: value for key, value in config.fields.items() if key in ("target_modules", "fan_in_fan_out")}
    write_without_base(place, facts, config, tensors, fields)


def _refuse_difference(first: LinearFolder, other: LinearFolder) -> None:
    (config, tensors), (other_config, other_tensors) = first, other
    file, name = other_config.file, config.folder
    here, there = (each.settings.model_dump(exclude=NOT_COMPARED) for each in (config, other_config))
    for key, value in here.items():
        if not same_value(_plain(value), _plain(there.get(key))):
            what = f"{key} is {printable(there.get(key))}, but {printable(value)} in {name}"
            raise AdapterError(what, "only adapters with the same settings can be added", file=file)
    for key in sorted(tensors.keys() | other_tensors.keys()):
        left, right = tensors.get(key), other_tensors.get(key)
        if left is None or right is None or left.shape != right.shape:
            what = f"'{key}' is missing or has a different shape in this adapter or in {name}"
            raise AdapterError(what, "only adapters of the same base and modules can be added", file=file)
        if not left.is_floating_point() and not torch.equal(left, right):
            what = f"'{key}' has different indices than in {name}"
            raise AdapterError(what, TO_LORA, file=file)


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, tuple) else value
