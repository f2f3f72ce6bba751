"""Finds the routers of a mixture of experts, and the router loss that a recipe or the configuration asks for."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any

from torch import Tensor, nn

from tunekit.errors import Problem
from tunekit.model.call import current_call
from tunekit.model.families.structure import base_of, text_config
from tunekit.model.loaded_model import LoadedModel
from tunekit.model.router_loss import RouterLoss

KEY = "training.router_loss"
TASK = "CAUSAL_LM"  # of the families whose classes have the loss
FORMULA = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # the arguments of transformers' function
WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")  # in configurations; some nets only have them as attributes
TOP_K = "num_experts_per_tok"


def find_routers(net: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers of a mixture of experts whose class has transformers' router loss, each with the index of its logits
    in its output."""
    base = base_of(net)
    formula = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    recorder: Any = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
    if formula is None or recorder is None or list(inspect.signature(formula).parameters) != FORMULA:
        return []
    return [
        (module, recorder.index)
        for name, module in base.named_modules()
        if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name
    ]


def make_router_loss(base: LoadedModel, setting: str | float) -> RouterLoss | None:
    """The router loss of a run; None if it has none. `setting`: of the recipe."""
    if base.family.task_type != TASK:
        return None
    weight = _weight_in_config(base) if setting == "auto" else 0.0 if setting == "off" else float(setting)
    if not weight or not find_routers(base.net):
        return None
    holder = base.net if hasattr(base.net, TOP_K) else text_config(base.net)
    return RouterLoss(weight, int(getattr(holder, TOP_K)))


def record_routers(net: nn.Module) -> None:
    """Let the routers of the net pass their logits to the Routing of the current Call."""
    for module, index in find_routers(net):
        module.register_forward_hook(partial(_record, index))


def _record(index: int, router: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
    routing = current_call().routing
    if routing is not None and routing.recorded is not None:
        routing.recorded.append(output[index] if isinstance(output, tuple) else output)


def router_problems(base: LoadedModel, setting: str | float) -> list[Problem]:
    """The reason why the router loss of the recipe cannot be computed."""
    if isinstance(setting, float) and make_router_loss(base, setting) is None:
        what = f"{base.facts.model_type} has no routers of experts for which transformers computes a router loss"
        return [Problem(what, "write router_loss: off", key=KEY)]
    return []


def router_notes(base: LoadedModel, setting: str | float) -> list[str]:
    """A note that says whether a mixture of experts has a router loss, and why."""
    if base.family.task_type != TASK:
        return []
    loss, of_config = make_router_loss(base, setting), _weight_in_config(base)
    if loss is not None:
        why = "output_router_logits of config.json" if setting == "auto" else KEY
        effect = "it is that of each micro-batch, so results depend on the size of micro-batches"
        return [f"router loss: weight {loss.weight:g} ({why}); {effect}"]
    if of_config and setting == "auto":
        return [f"router loss: off, although config.json asks for it: that of {base.facts.model_type} is not computed"]
    if find_routers(base.net):
        why = "config.json has no output_router_logits: true" if setting == "auto" and not of_config else KEY
        return [f"router loss: off ({why})"]
    return []


def _weight_in_config(base: LoadedModel) -> float:
    """The weight of the router loss for which the base's configuration asks; 0.0 for none."""
    config = text_config(base.net)
    places = [(holder, name) for holder in (config, base.net) for name in WEIGHTS]
    weight = next((value for holder, name in places if (value := getattr(holder, name, None))), 0.0)
    return float(weight) if getattr(config, "output_router_logits", False) else 0.0
