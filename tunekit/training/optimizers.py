"""The optimizer. All parameters of a group share one flat float32 buffer, so a group needs only one norm, one update,
and one tensor in a checkpoint."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.adapters.attach import AttachedAdapter
from tunekit.adapters.module_names import is_within
from tunekit.contracts import Tensors
from tunekit.errors import RunFolderError
from tunekit.machine.devices import kind_of
from tunekit.model.transformers_guard import adafactor
from tunekit.recipe.training import TrainingSection

OTHER_RUN = "name a different output.dir, or start again with --overwrite"
BLOCK = 256  # numbers that share one scale in bitsandbytes' 8-bit states
PART_NUMBERS = 2**30  # bitsandbytes counts a tensor's numbers in 32 bits, and does not notice an overflow
BY_TENSOR = ("adafactor", "muon")  # their update depends on the shape of each tensor
ALIGNMENT = 16  # float32 elements: every view starts at a multiple of 64 bytes


class FlatGroup:
    """Parameters with the same learning rate, as views of `data` (N,), and their gradients as views of `gradient`
    (N,); both are float32. `decays`: whether weight decay applies to them. `learning_rate`: before the multiplier;
    None: training.learning_rate."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rate_multiplier: float,
        decays: bool,
        learning_rate: float | None = None,
    ) -> None:
        self.rate_multiplier, self.decays, self.learning_rate = rate_multiplier, decays, learning_rate
        self.layout: dict[str, tuple[int, tuple[int, ...]]] = {}
        size = 0
        for name, parameter in parameters.items():
            self.layout[name] = (size, tuple(parameter.shape))
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(parameters.values())).device
        self.data = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self.gradient = torch.zeros(size, dtype=torch.float32, device=device)
        for name, (start, shape) in self.layout.items():
            parameter, stop = parameters[name], start + parameters[name].numel()
            self.data.data[start:stop].copy_(parameter.detach().reshape(-1))
            parameter.data = self.data.data[start:stop].view(shape)
            parameter.grad = self.gradient[start:stop].view(shape)
        self.data.grad = self.gradient

    def tensors(self) -> list[nn.Parameter]:
        """Each parameter as a view of `data` with its own shape, and its gradient."""
        views = []
        for start, shape in self.layout.values():
            view = nn.Parameter(self.data.detach()[start : start + math.prod(shape)].view(shape))
            view.grad = self.gradient[start : start + math.prod(shape)].view(shape)
            views.append(view)
        return views

    def parts(self) -> list[nn.Parameter]:
        """`data` as views of at most PART_NUMBERS numbers, about equally long, with their gradients."""
        count = -(-self.data.numel() // PART_NUMBERS)
        if count == 1:
            return [self.data]
        length = -(-self.data.numel() // (count * BLOCK)) * BLOCK
        parts = [nn.Parameter(part) for part in torch.split(self.data.detach(), length)]
        for part, gradient in zip(parts, torch.split(self.gradient, length), strict=True):
            part.grad = gradient
        return parts


class Optimizer:
    """The optimizer of torch, transformers or bitsandbytes that training.optimizer names, for parameters in flat
    buffers.

    AdamW: Loshchilov and Hutter 2019, betas (0.9, 0.999), eps 1e-8. Lion: Chen et al. 2023, betas (0.9, 0.99).
    Adafactor: Shazeer and Stern 2018, without relative steps and without a scale by the parameter. Muon: Jordan et al.
    2024, momentum 0.95, scaled as by Liu et al. 2025. If AdamW's `found_inf` is 1, the device skips the update, so that
    a non-finite gradient never changes a weight. The other optimizers and Metal cannot do this; there the host reads
    `found_inf` before the update.
    """

    def __init__(self, settings: TrainingSection, groups: Sequence[FlatGroup], heads: Collection[str] = ()) -> None:
        self.name = settings.optimizer
        self.learning_rate = settings.learning_rate
        self.groups = groups
        self._parts = [self._cut(flat) for flat in self.groups]
        options = [
            {
                "params": parts,
                "lr": 0.0,  # until a step
                "learning_rate": settings.learning_rate if flat.learning_rate is None else flat.learning_rate,
                "weight_decay": settings.weight_decay if flat.decays else 0.0,
                "rate_multiplier": flat.rate_multiplier,
            }
            for flat, parts in zip(self.groups, self._parts, strict=True)
        ]
        if self.name == "muon":
            options = [
                half for each, flat in zip(options, self.groups, strict=True) for half in _halves(each, flat, heads)
            ]
        self.native = _make_native(self.name, options)

    def _cut(self, flat: FlatGroup) -> list[nn.Parameter]:
        if self.name == "adamw":
            return [flat.data]
        return flat.tensors() if self.name in BY_TENSOR else flat.parts()

    @property
    def gated(self) -> bool:
        """Whether the device itself skips an update if found_inf is 1."""
        return self.name == "adamw" and kind_of(self.groups[0].data.device).gates

    def update_blocks(self, device: torch.device) -> list[int]:
        """The bytes of each temporary tensor that an update of the largest tensor allocates. These tensors exist at the
        same time.

        The fused AdamW and bitsandbytes' CUDA kernels have no temporary tensors. On a CPU, bitsandbytes allocates whole
        float32 tensors: gradient, root and denominator; with 8-bit states also both moments. Source:
        bitsandbytes/backends/cpu/ops.py, _optimizer_update_32bit_cpu, _optimizer_update_8bit_blockwise_cpu.
        """
        if self.name == "adamw" or (device.type != "cpu" and self.name not in BY_TENSOR):
            return []
        largest = max(part.numel() for parts in self._parts for part in parts) * torch.float32.itemsize
        return [largest] * (5 if self.name.endswith("8bit") else 3)

    def zero_gradients(self) -> None:
        """Zero the flat gradients in place; their views stay valid."""
        for flat in self.groups:
            flat.gradient.zero_()

    def gradients(self) -> list[Tensor]:
        """The flat gradient of each group."""
        return [flat.gradient for flat in self.groups]

    def gradient_norm(self) -> Tensor:
        """() float32: the 2-norm of all gradients together."""
        norms: list[Tensor] = [torch.linalg.vector_norm(flat.gradient) for flat in self.groups]
        return torch.linalg.vector_norm(torch.stack(norms))

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Multiply every gradient in place."""
        for flat in self.groups:
            flat.gradient.mul_(factor)

    def step(self, rate_multiplier: float, found_inf: Tensor) -> float:
        """Update every weight, unless `found_inf` (() float32) is 1. Returns training.learning_rate in this step."""
        rate = self.learning_rate * rate_multiplier
        for options in self.native.param_groups:
            options["lr"] = options["learning_rate"] * rate_multiplier * options["rate_multiplier"]
        if self.gated:
            self.native.grad_scale = torch.ones((), device=found_inf.device)  # type: ignore[attr-defined]
            self.native.found_inf = found_inf  # type: ignore[attr-defined]
        elif bool(found_inf):
            return rate
        self.native.step()
        return rate

    def state_tensors(self) -> Tensors:
        """Weights and optimizer state for a checkpoint: for each group, one tensor of weights and one per kind of
        state; the states of further parts of the group have the part's number."""
        tensors: Tensors = {}
        for number, flat in enumerate(self.groups):
            tensors[f"group{number}.weights"] = flat.data.detach()
            for part, prefix in self._parts_of(number):
                for key, value in sorted(self.native.state.get(part, {}).items()):
                    tensors[f"{prefix}{key}"] = torch.as_tensor(value).detach()
        return tensors

    def _parts_of(self, number: int) -> Iterator[tuple[nn.Parameter, str]]:
        """Yields the optimizer's tensors of a group, and the prefix of their states in a checkpoint."""
        for at, part in enumerate(self._parts[number]):
            yield part, f"group{number}.optimizer{at or ''}."

    def layout(self) -> list[dict[str, list[int]]]:
        """The place of each parameter in the flat buffer: for each group, a mapping from name to [start, *shape]. A
        checkpoint fits only if its layout is equal."""
        return [{name: [start, *shape] for name, (start, shape) in flat.layout.items()} for flat in self.groups]

    def load_state(self, tensors: Mapping[str, Tensor], layout: object) -> None:
        """Restore weights and optimizer state. `tensors`, `layout`: values that `state_tensors` and `layout` returned
        earlier.

        Raises: RunFolderError if the layout or a tensor's shape differs, or if an older version wrote the state of more
        weights than bitsandbytes can count.
        """
        if layout != self.layout():
            raise RunFolderError("the adapter tensors in the checkpoint do not match this recipe's adapter", OTHER_RUN)
        for number, flat in enumerate(self.groups):
            weights = tensors.get(f"group{number}.weights")
            if weights is None or weights.shape != flat.data.shape:
                what = f"the checkpoint's weights of group {number} are missing or have the wrong shape"
                raise RunFolderError(what, OTHER_RUN)
            flat.data.data.copy_(weights)
            states = [
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                for _, prefix in self._parts_of(number)
            ]
            if states[0] and not all(states):
                what = f"an older tunekit wrote the optimizer's state of {flat.data.numel():,} weights in one tensor"
                raise RunFolderError(what, OTHER_RUN)
            for part, state in zip(self._parts[number], states, strict=True):
                if state:
                    self._restore(part, state)

    def _restore(self, data: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        if self.name == "adamw":  # the fused AdamW has its step counter on the device
            self.native.state[data] = {key: value.to(data.device, copy=True) for key, value in state.items()}
            return
        if self.name in BY_TENSOR:  # their counters are numbers, or tensors on the host
            counters = {"step": int} if self.name == "adafactor" else {"step": Tensor.clone}
            self.native.state[data] = {
                key: counters[key](value) if key in counters else value.to(data.device, copy=True)
                for key, value in state.items()
            }
            return
        buffers = self.native.state[data]  # bitsandbytes allocates its own buffers; paged ones are special tensors
        for key, value in state.items():
            if isinstance(buffers[key], Tensor):
                buffers[key].copy_(value)
            else:
                buffers[key] = int(value)  # the step counter


def make_optimizer(settings: TrainingSection, adapter: AttachedAdapter, head_modules: Sequence[str] = ()) -> Optimizer:
    """The optimizer over the parameter groups that the adapter's method defines. `head_modules`: the modules that
    training.head_learning_rate divides from these groups."""
    trained, rate = adapter.trained(), settings.head_learning_rate
    head = {name for name in trained if rate is not None and is_within(name, head_modules)}
    groups = []
    for names, rate_multiplier, decays in adapter.groups(settings):
        for own_rate, part in ((None, set(names) - head), (rate, head.intersection(names))):
            if part:
                parameters = {name: trained[name] for name in names if name in part}
                groups.append(FlatGroup(parameters, rate_multiplier, decays, own_rate))
    return Optimizer(settings, groups, heads=adapter.head_tensors())


def _halves(options: dict[str, Any], flat: FlatGroup, heads: Collection[str]) -> list[dict[str, Any]]:
    """The options for the matrices of a group, which Muon updates, and for its other tensors, which AdamW updates.
    Weight decay does not apply to embeddings, so these are in the second half."""
    named = list(zip(flat.layout, options["params"], strict=True))
    matrices = [part for name, part in named if part.dim() == 2 and flat.decays and name not in heads]
    others = [part for part in options["params"] if not any(part is matrix for matrix in matrices)]
    halves = [{**options, "params": matrices, "use_muon": True}, {**options, "params": others, "use_muon": False}]
    return [half for half in halves if half["params"]]


class _Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, and AdamW for the others."""

    def __init__(self, options: list[dict[str, Any]]) -> None:
        super().__init__(options, {})
        halves = [[group for group in self.param_groups if group["use_muon"] is use] for use in (True, False)]
        makers: tuple[Callable[..., torch.optim.Optimizer], ...] = (
            partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW,
        )
        self._halves = [make(groups) for make, groups in zip(makers, halves, strict=True) if groups]
        self.param_groups = [group for half in self._halves for group in half.param_groups]
        for half in self._halves:
            half.state = self.state  # one mapping, so that a checkpoint finds every state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for half in self._halves:
            half.step()


def _make_native(name: str, options: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer of torch, transformers or bitsandbytes. The state of bitsandbytes is allocated here, where its
    messages are suppressed: plan has already warned that nothing is paged on a CPU."""
    if name == "adamw":
        return torch.optim.AdamW(options, fused=True)
    if name == "muon":
        return _Muon(options)
    if name == "adafactor":
        return adafactor()(options, scale_parameter=False, relative_step=False)
    from tunekit.model.quantized.codec import import_bitsandbytes
    from tunekit.model.transformers_guard import quiet

    library = import_bitsandbytes().optim
    classes = {
        "adamw_8bit": library.AdamW8bit,
        "paged_adamw": library.PagedAdamW32bit,
        "paged_adamw_8bit": library.PagedAdamW8bit,
        "lion": library.Lion32bit,
    }
    with quiet():
        optimizer = classes[name](options)
        optimizer.check_overrides()
        for number, group in enumerate(optimizer.param_groups):
            for at, part in enumerate(group["params"]):
                optimizer.init_state(group, part, number, at)
        optimizer.initialized = True
    return optimizer
