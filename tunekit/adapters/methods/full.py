"""Full fine-tuning, for a base whose weights are neither quantized nor streamed."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tunekit.adapters.base import ModelAdapter, Slot, Slots
from tunekit.adapters.blocks.chosen_modules import chosen_names
from tunekit.adapters.folder.fields import PeftSide
from tunekit.adapters.method import Method
from tunekit.adapters.module_names import named_copies
from tunekit.model.families.structure import fixed_parameters
from tunekit.recipe.adapters.full import FullSettings


class BaseWeights(ModelAdapter[FullSettings]):
    """Trains the base's own parameters. A tied parameter is trained once. The original values are not kept, so this
    adapter cannot be bypassed; a reference model is a copy of the state at step 0.

    A float32 parameter is trained in place. A 16-bit parameter has a float32 master copy. As soon as the parameter's
    gradient is computed, it is added to the master's gradient. After each update the parameter gets the master's
    rounded value.
    Shapes: those of the base. Weight decay does not apply to vectors.
    """

    masters: list[tuple[nn.Parameter, nn.Parameter]]  # 16-bit parameter, its master

    @classmethod
    def slots(cls, settings: FullSettings, net: nn.Module) -> Slots:
        """Declares one tensor per parameter. Attributes are numbered, because names of parameters contain dots."""
        return {
            f"weight_{number}": Slot(name, tuple(tensor.shape), decays=tensor.dim() > 1)
            for number, (name, tensor) in enumerate(chosen_parameters(net, settings).items())
        }

    def declare(self, module_name: str, slots: Mapping[str, Slot], *, meta: bool) -> None:
        """Allocate nothing: `attach` uses the base's parameters."""
        self.module_name, self.declared = module_name, dict(slots)

    def attach(self, net: nn.Module) -> None:
        self.masters = []
        for attribute, slot in self.declared.items():
            parameter = master = net.get_parameter(slot.suffix)
            parameter.requires_grad_()
            if parameter.dtype != torch.float32:
                master = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master))  # type: ignore[no-untyped-call]
                self.masters.append((parameter, master))
            self.register_parameter(attribute, master)

    def initialise(self, generator: torch.Generator) -> None:
        """Do nothing: the initial values are the base's values."""

    @torch.no_grad()
    def follow_state(self) -> None:
        for parameter, master in self.masters:
            parameter.copy_(master)

    def check_state(self) -> None:
        self.follow_state()

    def after_step(self, step: int, total_steps: int) -> None:
        self.follow_state()


def _move_gradient(master: nn.Parameter, parameter: Tensor) -> None:
    """Add the parameter's new gradient to the gradient of its float32 master copy, and free the parameter's
    gradient."""
    assert parameter.grad is not None
    master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
    parameter.grad = None


def chosen_parameters(net: nn.Module, settings: FullSettings) -> dict[str, nn.Parameter]:
    """The parameters in the chosen modules, each under its first name. Parameters that the model's class keeps fixed
    are left out."""
    modules = {name: module for name, module in net.named_modules() if next(module.parameters(), None) is not None}
    names = [*chosen_names(list(modules), settings.target_modules, "all-weights", "module with weights")]
    names += named_copies(modules, settings.modules_to_save)
    inside = {id(tensor) for name in names for tensor in modules[name].parameters()}
    fixed = fixed_parameters(net)
    chosen = {name: p for name, p in net.named_parameters() if id(p) in inside and p.is_floating_point()}
    return {name: parameter for name, parameter in chosen.items() if name not in fixed}


METHOD = Method(peft=PeftSide("", FullSettings), model=BaseWeights)
