"""Computes MLPs and norms in tiles of tokens. This is for rows so long that the activations of an MLP take most of a
layer's memory.

MLPs and norms compute each token separately. Only the input and output of a tile are stored. The backward pass
recomputes the tile, including adapters, to get its gradients. So activations need memory for one tile instead of a
whole row.
Gradients of trained tensors are summed over tiles; compared with a computation without tiles, only the order of sums
differs. Dropout masks differ too.
Source: Bekman et al. 2025, Arctic Long Sequence Training (tiled MLP).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.errors import ModelError
from tunekit.model.autograd import Context
from tunekit.model.call import Call, calling, current_call, seed_torch
from tunekit.model.families.structure import training_mode

KEY = "memory.mlp_tile_tokens"
NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")  # of a decoder layer's MLP
NORMS = ("LayerNorm", "RMSNorm")  # suffixes of their class names
# largest relative difference; a module that mixes tokens differs more
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
PROBED_TOKENS, FIRST_TILE = 5, 2


def tile_layers(layers: Sequence[tuple[str, nn.Module]], tokens: int, hidden: Tensor) -> None:
    """Make the MLP and the norms of every layer compute `tokens` tokens at a time.

    `layers`: (module name, layer) pairs. `hidden`: an empty tensor (0, D) with the dtype and device of hidden states.
    Raises: ModelError with the name of a layer that has no MLP, or whose MLP does not compute each token separately.
    """
    obstacles: dict[type, str | None] = {}
    for number, (name, layer) in enumerate(layers):
        mlp = next((child for child in NAMES if isinstance(getattr(layer, child, None), nn.Module)), None)
        if mlp is None:
            raise _refusal(f"{name} ({type(layer).__name__}) has no MLP")
        norms = [child_name for child_name, child in layer.named_children() if type(child).__name__.endswith(NORMS)]
        for part in (mlp, *norms):
            module = layer.get_submodule(part)
            if type(module) not in obstacles:
                obstacles[type(module)] = _obstacle(module, hidden)
            obstacle = obstacles[type(module)]
            if obstacle is None:
                module.forward = Tiles(module, module.forward, tokens, number)
            elif part == mlp:
                raise _refusal(f"{name}.{mlp} ({type(module).__name__}) {obstacle}")


def _refusal(what: str) -> ModelError:
    return ModelError(f"{what}, so it cannot be computed in tiles", f"remove {KEY}", key=KEY)


def _obstacle(module: nn.Module, hidden: Tensor) -> str | None:
    """The reason why a module cannot be computed in tiles; None if it can be. The module is tested: it computes a few
    tokens together, then in two tiles, and the results are compared."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBED_TOKENS, hidden.shape[-1], generator=generator).to(hidden)  # (1, T, D)
    try:
        with torch.no_grad(), training_mode(module, False):
            untiled = module(x)
            tiles = [module(x[:, :FIRST_TILE]), module(x[:, FIRST_TILE:])]
    except (TypeError, ValueError, RuntimeError):
        return "needs other inputs than hidden states"
    if not isinstance(untiled, Tensor) or untiled.shape != x.shape or untiled.dtype != x.dtype:
        return "does not return just hidden states"
    if untiled.is_meta:
        return None
    difference = float((torch.cat(tiles, dim=1) - untiled).abs().max() / untiled.abs().max().clamp(min=1e-30))
    return (
        None
        if difference <= TOLERANCE[untiled.dtype]
        else f"does not compute each token separately (results differ by {difference:.1e})"
    )


class Tiles:
    """A forward that computes a module tile by tile. The module must compute each token separately."""

    def __init__(self, module: nn.Module, run: Callable[..., Tensor], tokens: int, number: int) -> None:
        self.module, self.run, self.tokens, self.number = module, run, tokens, number
        self.trained: list[Tensor] | None = None  # from the first tile's graph

    def __call__(self, x: Tensor, *others: object, **named: object) -> Tensor:
        """Shapes: x (B, T, D) -> (B, T, D)."""
        if others or named:
            raise _refusal(f"{type(self.module).__name__} needs other inputs than hidden states")
        if x.numel() // x.shape[-1] <= self.tokens or current_call().adapter_of_row is not None:
            return self.run(x)
        if not torch.is_grad_enabled():
            return self.output(x, None)
        if self.trained is None:  # the hooks hide the first tile's saved tensors from a surrounding checkpoint
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                self.trained = _trained_leaves(self.run(_flat(x)[:, : self.tokens].detach()))
        return _Tiled.apply(self, current_call(), x, *self.trained)  # type: ignore[no-untyped-call]

    def slices(self, x: Tensor) -> Iterator[slice]:
        """One slice of token positions for each tile; all rows are put after each other."""
        count = x.numel() // x.shape[-1]
        return (slice(start, start + self.tokens) for start in range(0, count, self.tokens))

    def output(self, x: Tensor, call: Call | None) -> Tensor:
        """The output (B, T, D), computed without a graph. `call`: the source of each tile's random seed, if the module
        may use dropout."""
        output = torch.empty_like(x, memory_format=torch.contiguous_format)  # (B, T, D)
        for index, place in enumerate(self.slices(x)):
            self._seed(call, index)
            _flat(output)[:, place] = self.run(_flat(x)[:, place])
        return output

    def gradients(self, x: Tensor, upstream: Tensor, call: Call, wants_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x (B, T, D), or None if `wants_x` is false; and the gradient of each trained tensor."""
        trained = self.trained or []
        sums = [torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False) for tensor in trained]
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None  # (B, T, D)
        for index, place in enumerate(self.slices(x)):
            with calling(call), torch.enable_grad():
                self._seed(call, index)
                tile = _flat(x)[:, place].detach().requires_grad_(wants_x)  # (1, n, D)
                output = self.run(tile)
            wanted = [tile, *trained] if wants_x else trained
            gradients = list(torch.autograd.grad(output, wanted, _flat(upstream)[:, place], allow_unused=True))
            del output, tile
            if of_x is not None:
                _flat(of_x)[:, place] = gradients.pop(0)
            for total, part in zip(sums, gradients, strict=True):
                if part is not None:
                    total += part
        return of_x, sums

    def _seed(self, call: Call | None, index: int) -> None:
        if call is not None and self.module.training:
            seed_torch("tile", call.seed, call.step, call.micro_batch, self.number, index)


class _Tiled(torch.autograd.Function):
    """The autograd function of Tiles. For the backward pass, it saves only x."""

    @staticmethod
    def forward(ctx: Context[tuple[Tiles, Call]], tiles: Tiles, call: Call, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.extra = tiles, call
        ctx.save_for_backward(x)
        return tiles.output(x, call)

    @staticmethod
    def backward(ctx: Context[tuple[Tiles, Call]], *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (tiles, call), (x,) = ctx.extra, ctx.saved_tensors
        of_x, of_trained = tiles.gradients(x, gradients[0], call, ctx.needs_input_grad[2])
        return None, None, of_x, *of_trained


def _flat(x: Tensor) -> Tensor:
    """(B, T, D) -> (1, B T, D)."""
    return x.reshape(1, -1, x.shape[-1])


def _trained_leaves(output: Tensor) -> list[Tensor]:
    """The tensors that would get a gradient from `output`, found in its autograd graph."""
    leaves: list[Tensor] = []
    waiting: list[Any] = [output.grad_fn]
    visited: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
