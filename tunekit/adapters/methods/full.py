"""Full fine-tuning, of a base whose weights are there as they are: neither quantized nor streamed."""

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
    """The base's own parameters, tied ones once; there is no copy of what they were, so that nothing can be bypassed.

    A float32 parameter is trained where it lies. One that is computed in 16 bits has a float32 master: its gradient is
    added to the master's as soon as it is made, and it takes the master's rounded value after each update.
    Shapes: as the base's.    Weight decay spares vectors.
    """

    masters: list[tuple[nn.Parameter, nn.Parameter]]  # parameter of 16 bits, its master

    @classmethod
    def slots(cls, settings: FullSettings, net: nn.Module) -> Slots:
        """One slot per parameter; attributes are numbered, since a parameter's own name holds dots."""
        return {
            f"weight_{number}": Slot(name, tuple(tensor.shape), decays=tensor.dim() > 1)
            for number, (name, tensor) in enumerate(chosen_parameters(net, settings).items())
        }

    def declare(self, module_name: str, slots: Mapping[str, Slot], *, meta: bool) -> None:
        """Allocate nothing: `attach` takes the base's own."""
        self.module_name, self.declared = module_name, dict(slots)

    def attach(self, net: nn.Module) -> None:
        self.masters = []
        for attribute, slot in self.declared.items():
            own = master = net.get_parameter(slot.suffix)
            own.requires_grad_()
            if own.dtype != torch.float32:
                master = nn.Parameter(own.detach().float())
                own.register_post_accumulate_grad_hook(partial(_hand_over, master))  # type: ignore[no-untyped-call]
                self.masters.append((own, master))
            self.register_parameter(attribute, master)

    def initialise(self, generator: torch.Generator) -> None:
        """They are the base's."""

    @torch.no_grad()
    def check_state(self) -> None:
        for own, master in self.masters:
            own.copy_(master)

    def after_step(self, step: int, total_steps: int) -> None:
        self.check_state()


def _hand_over(master: nn.Parameter, own: Tensor) -> None:
    """Add the gradient that `own` has just got to its master's, and free it."""
    assert own.grad is not None
    master.grad = own.grad.float() if master.grad is None else master.grad.add_(own.grad)
    own.grad = None


def chosen_parameters(net: nn.Module, settings: FullSettings) -> dict[str, nn.Parameter]:
    """The parameters inside the chosen modules, each under its first name, but those that the model's class fixes."""
    modules = {name: module for name, module in net.named_modules() if next(module.parameters(), None) is not None}
    names = [*chosen_names(list(modules), settings.target_modules, "all-weights", "module with weights")]
    names += named_copies(modules, settings.modules_to_save)
    inside = {id(tensor) for name in names for tensor in modules[name].parameters()}
    fixed = fixed_parameters(net)
    own = {name: each for name, each in net.named_parameters() if id(each) in inside and each.is_floating_point()}
    return {name: each for name, each in own.items() if name not in fixed}


METHOD = Method(peft=PeftSide("", FullSettings), model=BaseWeights)
