"""Lists the tensors that an adapter file must contain, and compares them with the file's header. The list depends only
on the configuration and the base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunekit.adapters.base import AdapterPart, Slot, Slots, full_name
from tunekit.adapters.copies import TrainedCopy
from tunekit.adapters.method import Method
from tunekit.adapters.module_names import base_modules, parameter_names
from tunekit.adapters.tokens import TrainedTokens, token_slots
from tunekit.errors import AdapterError, Problem
from tunekit.files.tensors import NAMES, TensorEntry
from tunekit.files.untrusted import printable
from tunekit.model.parts import parts_apart
from tunekit.model.quantized.weights import weight_of
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Target

PREFIX = AdapterPart.file_prefix
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # all are exact in float32
TYPES = {
    torch.float32: FLOATS,
    torch.int64: (torch.int64,),
    torch.int32: (torch.int32,),
    torch.uint8: (torch.uint8,),
    torch.bool: (torch.bool,),
}
BASE_COPY = ".base_layer.weight"  # peft's copy of an embedding's own weight
SHOWN_PROBLEMS = 8


@dataclass
class ExpectedTensors:
    """The tensors that an adapter file must contain. `slots`, `names`: the declaration and the name of each tensor, by
    its key in the file. `base_copies`: copies of base weights that peft may have added to the file."""

    slots: Slots = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    base_copies: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # key -> module, shape
    repeats: dict[str, str] = field(default_factory=dict)  # key of a layer's copy of a shared tensor -> the shared key
    unused: dict[str, tuple[int, ...]] = field(default_factory=dict)  # key of a tensor that the copy replaces -> shape
    base_names: frozenset[str] = frozenset()  # the base's own parameters
    unloaded: tuple[str, ...] = ()  # starts of keys of parts of the base that are not loaded

    def add(self, part: type[AdapterPart], module_name: str, slots: Mapping[str, Slot]) -> None:
        """Add the declared tensors of one part to the expected tensors, except those that only checkpoints contain."""
        for slot in slots.values():
            if slot.kind != "resume":
                name = full_name(module_name, slot.suffix)
                self.slots[part.file_key(name)], self.names[part.file_key(name)] = slot, name

    def add_biases(self, module_name: str, slots: Mapping[str, Slot]) -> None:
        """Allow the biases of a module in modules_to_save that PEFT repeats in the file with `bias: all`."""
        for slot in slots.values():
            key = f"{PREFIX}{module_name}.{slot.suffix}"
            if slot.suffix.endswith("bias") and key in self.slots:
                self.repeats[f"{PREFIX}{module_name}.modules_to_save.{slot.suffix}"] = key
                self.unused[f"{PREFIX}{module_name}.original_module.{slot.suffix}"] = slot.shape

    def check(self, header: Mapping[str, TensorEntry], file: str) -> dict[str, str]:
        """Compare the expected tensors with the header, in both directions. Returns the copies of base weights in the
        file: key -> module.

        Raises: AdapterError with every missing, extra, misshaped and mistyped tensor.
        """
        wrong = [f"'{key}' is missing{_loss(key)}" for key in sorted(set(self.slots) - set(header))]
        copies: dict[str, str] = {}
        for key, entry in header.items():
            if key in self.slots:
                wrong += self._compare(key, entry, self.slots[key])
            elif key in self.base_copies and entry.shape == self.base_copies[key][1] and entry.dtype in FLOATS:
                copies[key] = self.base_copies[key][0]
            elif key.startswith(self.unloaded) or (key in self.unused and entry.shape == self.unused[key]):
                continue
            elif key in self.repeats and self.repeats[key] in header:
                wrong += self._compare(key, entry, self.slots[self.repeats[key]])
            else:
                wrong.append(f"'{printable(key, 200)}' is not a tensor of this adapter{self._hint(key)}")
        if wrong:
            how = "use a file that belongs to this configuration and base"
            more = [f"and {len(wrong) - SHOWN_PROBLEMS} more tensors"] if len(wrong) > SHOWN_PROBLEMS else []
            raise AdapterError.of([Problem(text, how, file) for text in [*wrong[:SHOWN_PROBLEMS], *more]])
        return copies

    def _compare(self, key: str, entry: TensorEntry, slot: Slot) -> list[str]:
        if entry.shape != slot.shape:
            return [f"'{key}' has shape {list(entry.shape)}, expected {list(slot.shape)}"]
        if entry.dtype not in TYPES[slot.dtype]:
            expected = " or ".join(NAMES[dtype] for dtype in TYPES[slot.dtype])
            return [f"'{key}' has type {NAMES[entry.dtype]}, expected {expected}"]
        return []

    def _hint(self, key: str) -> str:
        """A possible reason for an unexpected key in the file; empty if there is none."""
        if f"{PREFIX}{key}" in self.slots:
            return f" (it lacks the prefix {PREFIX})"
        named = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        return " (it would overwrite a weight of the base)" if named in self.base_names else ""


def _loss(key: str) -> str:
    """A possible reason for a missing tensor; empty if there is none."""
    lost = key.endswith(".base_layer.bias")
    return " (peft 0.6 does not save this bias, nor does 0.15 with bias: lora_only)" if lost else ""


def refuse_not_finite(tensors: Mapping[str, Tensor], file: str) -> None:
    """Raises: AdapterError for tensors with NaN or infinity."""
    broken = [
        name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())
    ]
    if broken:
        how = "list these tensors with: tunekit adapter show"
        raise AdapterError(f"{broken[0]} contains NaN or infinity ({len(broken)} such tensors)", how, file=file)


def expected_tensors(
    net: nn.Module,
    method: Method,
    settings: AdapterSettings,
    targets: list[Target],
    head_name: str | None,
    enlarged: Collection[str] = (),
) -> ExpectedTensors:
    """All tensors that a file of this configuration must contain for this base; allocates nothing."""
    modules = base_modules(net)
    unloaded = tuple(f"{PREFIX}{name}." for name in parts_apart(net))
    expected = ExpectedTensors(base_names=frozenset(parameter_names(base_modules(net))), unloaded=unloaded)
    for target in targets:
        part = method.parameter if target.kind == "parameter" else method.layer
        assert part is not None
        expected.add(part, target.name, part.slots(settings, target))
        if target.kind == "embedding" or target.name == head_name:
            weight = weight_of(modules[target.name])
            assert weight is not None
            expected.base_copies[f"{PREFIX}{target.name}{BASE_COPY}"] = target.name, weight.shape
    if method.shared is not None:
        shared = method.shared.slots(settings, targets)
        expected.add(method.shared, "", shared)
        for slot in shared.values() if method.repeats_shared else ():
            shared_key = method.shared.file_key(slot.suffix)
            expected.repeats |= {f"{PREFIX}{target.name}.{slot.suffix}": shared_key for target in targets}
    if method.model is not None:
        expected.add(method.model, "", method.model.file_slots(settings, net))
    for name, only in method.copied_modules(modules, settings, targets).items():
        slots = TrainedCopy.slots(modules[name], name, only)
        expected.add(method.copy_class(settings, name), name, slots)
        if only is None and getattr(settings, "bias", "none") == "all":
            expected.add_biases(name, slots)
    for name, slots in token_slots(net, settings).items():
        expected.add(TrainedTokens, name, slots)
    for name in enlarged:  # PEFT saves all tensors of such a module, even if it also saves a copy
        shape, weight_key = tuple(modules[name].get_parameter("weight").shape), f"{PREFIX}{name}.weight"
        for key in (weight_key, f"{PREFIX}{name}.original_module.weight"):
            expected.base_copies[key] = name, shape
        if weight_key in expected.slots:
            expected.repeats[f"{PREFIX}{name}.modules_to_save.weight"] = weight_key
    return expected
