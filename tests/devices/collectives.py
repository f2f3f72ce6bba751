"""Sums and broadcasts over ranks, each with a simulated device: over the host, for tensors of the device alone, as
NCCL takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from tests.devices.simulated import Double


class Collectives(distributed.ProcessGroup):
    """A group of ranks in the place of NCCL's."""

    double: Double
    _device_types = (torch.device("cuda"),)

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

    def _over_the_host(self, operation: str, read: Any, written: Any, *given: Any) -> Any:
        """`given`: what gloo's operation takes, of tensors that are read or written or both."""
        for each in tree_leaves([read, written]):
            if not each.is_cuda:
                raise RuntimeError(f"No backend type associated with device type {each.device.type}")
        with self.double.unwatched(), torch.no_grad():
            there = {id(each): torch.empty_like(each, device="cpu") for each in tree_leaves(written)}
            there |= {id(each): each.cpu() for each in tree_leaves(read)}
            work = getattr(self.gloo, operation)(*tree_map(lambda each: there.get(id(each), each), given))
            work.wait()
            for own in tree_leaves(written):
                own.copy_(there[id(own)])
        return work

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        return self._over_the_host("allreduce", tensors, tensors, tensors, options)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        read = tensors if self.rank() == options.rootRank else []
        return self._over_the_host("broadcast", read, tensors, tensors, options)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        return self._over_the_host("allgather", inputs, outputs, outputs, inputs, options)

    def all_gather_single(self, output: Tensor, given: Tensor, options: Any) -> Any:
        return self._over_the_host("_allgather_base", [given], [output], output, given, options)

    _allgather_base = all_gather_single  # its name before torch 2.13

    def barrier(self, opts: Any = None) -> Any:
        return self.gloo.barrier()

    def getBackendName(self) -> str:  # noqa: N802: torch's
        return "simulated"


def register(double: Double) -> None:
    """Let a group of NCCL's be one of these."""
    Collectives.double = double
    distributed.Backend.register_backend("simulated", Collectives, devices=["cuda"])
    begin = distributed.init_process_group

    def init_process_group(backend: str | None = None, *rest: Any, **named: Any) -> None:
        begin("simulated" if backend == "nccl" else backend, *rest, **named)

    distributed.init_process_group = init_process_group
