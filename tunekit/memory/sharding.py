"""A base whose frozen weights are divided among ranks. Each rank stores an equal share of every layer. A layer is
gathered from all ranks into a slot before it is computed.

The token embedding and the output projection (the tables) are divided too. A table is gathered when its module is
called, and freed when the next layer is gathered.

All ranks must take part in each gathering, but they may need different weights, or none. Therefore every gathering is
one round: the ranks tell each other which unit (layer or table) they need, and then gather each of these units. A rank
that waits for the others at an exchange (machine.devices) takes part in rounds until no rank needs a unit. So ranks may
make different numbers of forwards.

torch's FSDP2 is not used. It divides parameters only, but packed weights are buffers: with NF4, each of two ranks kept
82 % of the bytes. It gathers each layer twice per micro-batch instead of twice per pass, and all its ranks must make
equally many forwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tunekit.machine.devices import Devices
from tunekit.memory.blobs import ALIGNMENT_BYTES, LayerBlob, forget_pages
from tunekit.memory.copies import Copier, Copy, Mark, Pairs, as_bytes
from tunekit.memory.slots import LayerSlots
from tunekit.memory.streaming import stream_layers
from tunekit.model.load import LoadedModel

TIER = "ranks"  # the value of ExecutionSettings.streaming for a sharded base
NO_UNIT = -1
CHUNK_BYTES = 2**20  # of a mapped file, copied at a time


class ShardedBlob(LayerBlob):
    """The frozen tensors of one unit (a layer or a table), divided among `world` ranks. The blob is padded, so that all
    shares have the same size."""

    def __init__(self, tensors: Sequence[Tensor], world: int) -> None:
        super().__init__(tensors)
        self.share_bytes = -(-self.size_bytes // (world * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
        self.size_bytes = world * self.share_bytes

    def keep_share(self, rank: int, device: torch.device, mapped: frozenset[int]) -> Tensor:
        """Copy this rank's bytes to the device, and let go of all others. Returns the share (bytes,) uint8.

        `mapped`: the memory addresses of values in mapped files. The pages of these values are released.
        """
        start = rank * self.share_bytes
        share = torch.zeros(self.share_bytes, dtype=torch.uint8, device=device)
        for place, values in zip(self.starts, self.source, strict=True):
            first, end = max(place, start), min(place + values.nbytes, start + self.share_bytes)
            for at in range(first, end, CHUNK_BYTES):  # in chunks, so that few pages of the file are in memory
                stored = as_bytes(values)[at - place : min(at + CHUNK_BYTES, end) - place]
                share[at - start : at - start + len(stored)] = stored
                if values.data_ptr() in mapped:
                    forget_pages(stored)
        for values in self.source:  # the system also loads pages beside those that are read
            if values.data_ptr() in mapped:
                forget_pages(values)
        self.source, self.gathered = [share], True
        self.unbind(device)
        return share

    def bind_source(self) -> None:
        """Raises: RuntimeError, because no rank stores the whole unit."""
        raise RuntimeError("a sharded layer was requested outside of its slot")


class RankCopier(Copier):
    """Gathers units (layers and tables) from the shares of all ranks. `shares`: this rank's share of each unit."""

    def __init__(self, devices: Devices, shares: Sequence[Tensor]) -> None:
        super().__init__(shares[0].device)
        self.devices, self.shares = devices, shares
        self._numbers = {share.data_ptr(): number for number, share in enumerate(shares)}

    def start(self, copies: Pairs, after: Mark) -> Copy:
        """Start to gather one unit. The device's backend first waits for the computations that are queued now, so
        `after` is not needed."""
        ((target, share),) = copies
        return self._round(self._numbers[share.data_ptr()], target)

    def wait(self, copy: Copy) -> None:
        for work in copy if isinstance(copy, list) else ():
            work.wait()

    def help_others(self) -> None:
        """Take part in rounds until no rank needs a unit."""
        while self._round(NO_UNIT, None) is not None:
            pass

    def _round(self, number: int, target: Tensor | None) -> Copy:
        """One round, in which this rank needs the unit `number`, or NO_UNIT. Returns the gathering of this rank's unit,
        or else of another rank's unit. None if no rank needs a unit."""
        gatherings: dict[int, Copy] = {}
        for unit in sorted(set(self.devices.numbers(number)) - {NO_UNIT}):
            share, memory = self.shares[unit], target
            if memory is None or unit != number:  # for other ranks only
                memory = torch.empty(self.devices.world * share.numel(), dtype=torch.uint8, device=share.device)
            gatherings[unit] = self.devices.gather_shares(memory, share)
            if memory is not target:
                self.wait(gatherings[unit])
        return gatherings.get(number) or next(iter(gatherings.values()), None)


class ShardedTable:
    """A table (token embedding or output projection) that is gathered when one of its modules is called."""

    def __init__(self, blob: ShardedBlob, modules: Sequence[nn.Module], copier: Copier) -> None:
        self.blob, self._copier = blob, copier
        self._memory: Tensor | None = None
        for module in modules:
            module.register_forward_pre_hook(self._bring)

    def _bring(self, module: nn.Module, inputs: object) -> None:
        if self._memory is None:
            self._memory = self._copier.memory(self.blob.size_bytes, on_host=False)
            self._copier.wait(self._copier.start(self.blob.copies(self._memory), None))
            self.blob.bind(self._memory)

    def free(self) -> None:
        """Free the gathered table, if there is one."""
        if self._memory is not None:
            self.blob.unbind(self._memory.device)
            self._memory = None


class ShardedSlots(LayerSlots):
    """The slots of a sharded base. `tables` are freed when a layer is gathered."""

    tables: Sequence[ShardedTable] = ()

    @contextmanager
    def holding(self, layer: int, then: int | None = None) -> Iterator[None]:
        """A context manager, as in LayerSlots."""
        for table in self.tables:
            table.free()
        with super().holding(layer, then):
            yield


def divided_tables(base: LoadedModel) -> list[Tensor]:
    """The weights of the token embedding and the output projection; one if they are tied. Call this function before an
    adapter is attached."""
    names = (base.family.embedding_name(base.net), base.family.head_name(base.net))
    modules = [base.net.get_submodule(name) for name in names if name is not None]
    weights = [module.weight for module in modules if isinstance(module, nn.Embedding | nn.Linear)]
    return list({id(weight): weight for weight in weights}.values())


def shard_base(
    base: LoadedModel,
    layers: Sequence[Sequence[Tensor]],
    tables: Sequence[tuple[Tensor, Sequence[nn.Module]]],
    world: int,
    devices: Devices | None,
) -> LayerSlots:
    """Divide the base among ranks, and return the device slots of its layers.

    `layers`: the frozen tensors of each layer. `tables`: the weight of each table, and the modules that use it.
    `devices`: None in a simulation, on the meta device.
    """
    blobs = [ShardedBlob(tensors, world) for tensors in layers]
    table_blobs = [ShardedBlob([weight], world) for weight, _ in tables]
    units = [*table_blobs, *blobs]  # the largest first, while little else is in memory
    if devices is None:
        for blob in table_blobs:
            blob.unbind(base.device)
        slots = LayerSlots(blobs, Copier(base.device), base.device)
    else:
        copier = RankCopier(devices, [unit.keep_share(devices.rank, base.device, base.mapped) for unit in units])
        slots = sharded = ShardedSlots(blobs, copier, base.device)
        sharded.tables = [
            ShardedTable(blob, modules, copier) for blob, (_, modules) in zip(table_blobs, tables, strict=True)
        ]
        devices.before_exchange = copier.help_others
    shares = sum(unit.share_bytes for unit in units)
    slots.outside_bytes = shares + max((table.size_bytes for table in table_blobs), default=0)  # one table at a time
    slots.elsewhere_bytes = sum(tensor.nbytes for unit in units for tensor in unit.tensors) - shares
    stream_layers([layer for _, layer in base.family.layers(base.net)], slots)
    return slots
