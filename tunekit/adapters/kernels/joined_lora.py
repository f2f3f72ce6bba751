"""LoRA of projections that belong together, as one autograd function each: queries, keys and values; the gated MLP.

Layers of LoRA in place in a network go in; the same products, which keep less and pass over memory less, come out.
What is kept for the backward pass is the input and a handle of the base layer, of the MLP gate and up besides: never a
dense W of a packed layer, a base output, a low-rank product, or what lies between gate and down. They are made again.
Equal to the plain path up to the order of sums, with the same dropout masks. Whatever does not fit, such as a module
with hooks, takes the plain path: its own forward.
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

JOINED = ("q_proj", "k_proj", "v_proj")  # of one attention module, where they are given the same input
CROSS = ("encoder_attn",)  # attention modules whose keys and values are of another input than their queries
GATED = ("gate_proj", "up_proj", "down_proj")
LayerGroup = tuple[str, ...]  # names of layers that are computed together


@dataclass(frozen=True)
class JoinedProducts:
    """The kernel of a method whose layers are y = W x + s B A x. `layer`: its class; one with more state than A and B
    takes the plain path."""

    layer: type[LayerAdapter[Any]]

    def groups(
        self, net: nn.Module, modules: Modules, settings: AdapterSettings, targets: Sequence[Target]
    ) -> list[LayerGroup]:
        """The groups in which the layers are computed. `modules`: the base's layer under each target's name."""
        children: dict[str, set[str]] = {}
        for target in targets:
            plain = target.kind == "linear" and set(self.layer.slots(settings, target)) == {"A", "B"}
            if plain and "." in target.name and multiplies_exactly(modules[target.name]):
                parent, _, own = target.name.rpartition(".")
                children.setdefault(parent, set()).add(own)
        inputs = {target.name: target.in_features for target in targets}
        groups: list[LayerGroup] = []
        for parent, own_names in children.items():
            whole = own_names & set(GATED) and is_gated_mlp(net.get_submodule(parent))
            sets: list[LayerGroup] = [GATED] if whole and own_names >= set(GATED) else []
            joined = JOINED[1:] if parent.rpartition(".")[2] in CROSS else JOINED
            widths = {inputs[f"{parent}.{own}"] for own in own_names & set(joined)}
            sets += [joined] if len(widths) == 1 and len(own_names & set(joined)) > 1 else []
            together = [tuple(own for own in each if own in own_names) for each in sets]
            alone = own_names - {own for each in together for own in each}
            together += [(own,) for own in sorted(alone)]
            groups += [tuple(f"{parent}.{own}" for own in each) for each in together]
        return groups

    def join(
        self,
        net: nn.Module,
        layers: Mapping[str, Any],
        settings: AdapterSettings,
        targets: Sequence[Target],
        casts: Casts,
    ) -> list[LayerGroup]:
        """Let the layers, which are in place in `net`, compute in groups; returns the groups."""
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
    """How many layers of each kind are computed in one go."""
    counts = Counter(" + ".join(map(short_name, group)) for group in groups)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))


def _factors(layers: Sequence[LayerAdapter[LowRankSettings]]) -> list[Tensor]:
    return [factor for layer in layers for factor in (layer.A, layer.B)]


def _dropout(layer: LayerAdapter[LowRankSettings]) -> float:
    """Of the layer's inputs in this call."""
    return float(layer.settings.dropout) if layer.training else 0.0


def _watched(layer: LayerAdapter[LowRankSettings]) -> bool:
    """Whether somebody wants to see the layer's or its base's inputs and outputs."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        for module in (layer, layer.base_layer)
    )


class JoinedLayers:
    """Layers that get the same input: the first that is called computes all, the others take what it has left."""

    def __init__(self, layers: Sequence[LayerAdapter[LowRankSettings]], casts: Casts) -> None:
        self.layers, self.casts = list(layers), casts
        self.together = len(layers) > 1 and not layers[0].settings.dropout  # masks are drawn where a layer is called
        self.whole = Products(layers, casts)
        self.single = {id(layer): Products([layer], casts) for layer in layers}
        self._input: Tensor | None = None
        self._left: dict[int, Tensor] = {}

    def product(self, layer: LayerAdapter[LowRankSettings], x: Tensor) -> Tensor | None:
        """W x + s B A x of one of the layers; None where the plain path must be taken."""
        if _watched(layer):
            return None
        if not self.together:
            return products(self.single[id(layer)], x, _factors([layer]), _dropout(layer))[0]
        if self._input is not x or id(layer) not in self._left:
            if self._left:  # somebody was given another input, so they are no group after all
                self.together, self._input, self._left = False, None, {}
                return self.product(layer, x)
            made = products(self.whole, x, _factors(self.layers))
            self._input = x
            self._left = {id(each): output for each, output in zip(self.layers, made, strict=True)}
        output = self._left.pop(id(layer))
        if not self._left:
            self._input = None
        return output


class GatedMlp:
    """down(act(gate(x)) * up(x)) in one go; stands where the module's forward stood."""

    def __init__(self, mlp: Any, layers: Sequence[LayerAdapter[LowRankSettings]], casts: Casts) -> None:
        self.mlp, self.layers = mlp, list(layers)
        self.gated = Gated(Products(layers[:2], casts), mlp.act_fn, Products(layers[2:], casts))

    def __call__(self, x: Tensor) -> Tensor:
        in_place = all(getattr(self.mlp, own) is layer for own, layer in zip(GATED, self.layers, strict=True))
        if not in_place or current_call().bypassed or any(_watched(layer) for layer in self.layers):
            return type(self.mlp).forward(self.mlp, x)
        return gated_product(self.gated, x, _factors(self.layers), _dropout(self.layers[0]))
