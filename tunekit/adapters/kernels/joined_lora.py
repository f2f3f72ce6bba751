"""Autograd functions for the LoRA of neighbouring layers: one for queries, keys and values, one for the gated MLP.

The functions compute the same outputs as the layers, with less memory and fewer memory accesses. For the backward pass
they save the input and a handle of the base layer, and for the MLP also the outputs of `gate` and `up`. They never save
a dense W of a quantized layer, a base output, a low-rank product, or a value between `gate` and `down`; these are
recomputed.
Results equal those of the module's own forward, with the same dropout masks, except for the order of sums. A module
that the functions cannot compute, such as a module with hooks, runs its own forward.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tunekit.adapters.base import Casts, LayerAdapter
from tunekit.adapters.kernels.gated import is_gated_mlp
from tunekit.adapters.kernels.lora_products import Gated, Products, gated_product, products
from tunekit.contracts import Modules
from tunekit.model.call import current_call
from tunekit.model.quantized.weights import multiplies_exactly
from tunekit.recipe.bases.low_rank import LowRankSettings
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.records import Target, short_name

JOINED = ("q_proj", "k_proj", "v_proj")  # layers of an attention module that have the same input
CROSS = ("encoder_attn",)  # attention modules whose queries have a different input than their keys and values
GATED = ("gate_proj", "up_proj", "down_proj")
LayerGroup = tuple[str, ...]  # names of layers that are computed together


@dataclass(frozen=True)
class JoinedProducts:
    """The joined computation of layers y = W x + s B A x, for one method. `layer`: the class of these layers. A layer
    with tensors other than A and B runs its own forward."""

    layer: type[LayerAdapter[Any]]

    def groups(
        self, net: nn.Module, modules: Modules, settings: AdapterSettings, targets: Sequence[Target]
    ) -> list[LayerGroup]:
        """The groups of layers that are computed together. `modules`: the base's layer for each target name."""
        children: dict[str, set[str]] = {}
        for target in targets:
            plain = target.kind == "linear" and set(self.layer.slots(settings, target)) == {"A", "B"}
            if plain and "." in target.name and multiplies_exactly(modules[target.name]):
                parent, _, child_name = target.name.rpartition(".")
                children.setdefault(parent, set()).add(child_name)
        inputs = {target.name: target.in_features for target in targets}
        groups: list[LayerGroup] = []
        for parent, child_names in children.items():
            is_gated = child_names & set(GATED) and is_gated_mlp(net.get_submodule(parent))
            sets: list[LayerGroup] = [GATED] if is_gated and child_names >= set(GATED) else []
            joined = JOINED[1:] if parent.rpartition(".")[2] in CROSS else JOINED
            widths = {inputs[f"{parent}.{name}"] for name in child_names & set(joined)}
            sets += [joined] if len(widths) == 1 and len(child_names & set(joined)) > 1 else []
            together = [tuple(name for name in names if name in child_names) for names in sets]
            remaining = child_names - {name for names in together for name in names}
            together += [(name,) for name in sorted(remaining)]
            groups += [tuple(f"{parent}.{name}" for name in names) for names in together]
        return groups

    def join(
        self,
        net: nn.Module,
        layers: Mapping[str, Any],
        settings: AdapterSettings,
        targets: Sequence[Target],
        casts: Casts,
    ) -> list[LayerGroup]:
        """Make the attached layers of `net` compute in groups, and return the groups."""
        groups = self.groups(net, {name: layer.base_layer for name, layer in layers.items()}, settings, targets)
        for group in groups:
            members = [layers[name] for name in group]
            if [name.rpartition(".")[2] for name in group] == list(GATED):
                mlp = net.get_submodule(group[0].rpartition(".")[0])
                mlp.forward = GatedMlp(mlp, members, casts)
            else:
                joined = JoinedLayers(members, casts)
                for layer in members:
                    layer.joined = joined
        return groups


def describe(groups: Sequence[LayerGroup]) -> str:
    """The number of groups of each kind, as text."""
    counts = Counter(" + ".join(map(short_name, group)) for group in groups)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))


def _factors(layers: Sequence[LayerAdapter[LowRankSettings]]) -> list[Tensor]:
    return [factor for layer in layers for factor in (layer.A, layer.B)]


def _dropout(layer: LayerAdapter[LowRankSettings]) -> float:
    """The dropout rate that applies to the layer's inputs now: 0 outside of training."""
    return float(layer.settings.dropout) if layer.training else 0.0


def _has_hooks(layer: LayerAdapter[LowRankSettings]) -> bool:
    """Whether hooks are registered that need the inputs or outputs of the layer or of its base layer."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in (layer, layer.base_layer)
    )


class JoinedLayers:
    """Layers with the same input. The first layer that is called computes the outputs of all of them."""

    def __init__(self, layers: Sequence[LayerAdapter[LowRankSettings]], casts: Casts) -> None:
        self.layers, self.casts = list(layers), casts
        self.together = len(layers) > 1 and not layers[0].settings.dropout  # a mask is drawn when its layer is called
        self.group = Products(layers, casts)
        self.single = {id(layer): Products([layer], casts) for layer in layers}
        self._input: Tensor | None = None
        self._results: dict[int, Tensor] = {}

    def product(self, layer: LayerAdapter[LowRankSettings], x: Tensor) -> Tensor | None:
        """W x + s B A x of one of the layers; None if the layer must run its own forward."""
        if _has_hooks(layer):
            return None
        if not self.together:
            return products(self.single[id(layer)], x, _factors([layer]), _dropout(layer))[0]
        if self._input is not x or id(layer) not in self._results:
            if self._results:  # a layer got a different input, so the layers cannot be computed together
                self.together, self._input, self._results = False, None, {}
                return self.product(layer, x)
            outputs = products(self.group, x, _factors(self.layers))
            self._input = x
            self._results = {id(member): output for member, output in zip(self.layers, outputs, strict=True)}
        output = self._results.pop(id(layer))
        if not self._results:
            self._input = None
        return output


class GatedMlp:
    """down(act(gate(x)) * up(x)) in one function; replaces the module's forward."""

    def __init__(self, mlp: Any, layers: Sequence[LayerAdapter[LowRankSettings]], casts: Casts) -> None:
        self.mlp, self.layers = mlp, list(layers)
        self.gated = Gated(Products(layers[:2], casts), mlp.act_fn, Products(layers[2:], casts))

    def __call__(self, x: Tensor) -> Tensor:
        in_place = all(getattr(self.mlp, name) is layer for name, layer in zip(GATED, self.layers, strict=True))
        if not in_place or current_call().bypassed or any(_has_hooks(layer) for layer in self.layers):
            return type(self.mlp).forward(self.mlp, x)
        return gated_product(self.gated, x, _factors(self.layers), _dropout(self.layers[0]))
