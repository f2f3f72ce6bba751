"""The recipe's sections, the model without weights and the rows go in; the peak memory of a run with some Choice comes
out: its largest batches simulated, its base loaded on paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.contracts import Batch, EncodedRows
from tunekit.data.batching.pad import collate
from tunekit.data.batching.stream import StreamedWindows
from tunekit.data.batching.windows import BatchSettings, TrainingWindows, padded_tokens, part_lengths
from tunekit.errors import ModelError
from tunekit.model.families import text_config
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import packed_layers, stored_bytes, weight_of
from tunekit.model.storage.kept import can_be_kept
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.source import find_source
from tunekit.planning.simulated.estimate import SETTLING_PASSES, Work, peak_bytes
from tunekit.planning.simulated.loading import (
    StoredBase,
    copying_bytes,
    load_bytes,
    packing_bytes,
    stored_base,
    untouched_bytes,
)
from tunekit.planning.simulated.tracker import Simulation
from tunekit.planning.simulation import SimulatedRun
from tunekit.records import Choice, PeakBytes

EXAMINED_EPOCHS = 8  # packs differ from epoch to epoch, though hardly in size
SIMULATED = 2  # micro-batches of a pass; of more, each keeps the same
SAMPLED_ROWS = 20_000  # for the ids that occur


def largest_batch(
    windows: TrainingWindows, rows: EncodedRows, settings: BatchSettings, *, by_scores: bool = False
) -> Batch:
    """The micro-batch with most tokens, padding included, among those that the run will really make.

    `by_scores`: the one with most attention scores, which grow with the square of a document; of batches cut by tokens
    that is another one: a single long row.
    """
    lengths = np.asarray(rows.lengths)  # (rows,)
    parts = part_lengths(lengths, np.asarray(rows.supervised), settings.reads_source)  # of each row
    best, best_size, left = None, (-1, -1), windows.steps
    for epoch in range(EXAMINED_EPOCHS):
        micro_batches = windows.micro_batches(epoch)[: left * settings.gradient_accumulation_steps]
        left -= -(-len(micro_batches) // settings.gradient_accumulation_steps)
        for micro_batch in micro_batches:
            widths = [int(lengths[list(group)].sum()) for group in micro_batch]
            tokens = sum(widths) if settings.end_to_end else max(widths) * len(widths)
            if settings.reads_source:
                tokens = padded_tokens([parts[row] for group in micro_batch for row in group])
            size = (tokens, max(widths))
            if by_scores:
                documents = [int(lengths[row]) for group in micro_batch for row in group]
                size = (sum(length**2 for length in documents), max(widths))
            if size > best_size:
                best, best_size = micro_batch, size
        if left <= 0:
            break
    assert best is not None
    return collate(rows, best, pad_id=settings.pad_id, packed=settings.packing, end_to_end=settings.end_to_end)


def first_shares(windows: TrainingWindows | StreamedWindows, settings: BatchSettings, rows: EncodedRows) -> list[float]:
    """Tokens of the run's first micro-batches, as shares of the largest's; of a stream, as if all were alike."""
    if not isinstance(windows, TrainingWindows):
        return [1.0] * SETTLING_PASSES
    lengths = np.asarray(rows.lengths)  # (rows,)
    micro_batches = windows.micro_batches(0)[: windows.steps * settings.gradient_accumulation_steps]
    tokens = [sum(int(lengths[list(group)].sum()) for group in micro_batch) for micro_batch in micro_batches]
    return [count / max(tokens) for count in tokens[:SETTLING_PASSES]]


def supervised_tokens(windows: TrainingWindows | StreamedWindows, rows: EncodedRows, settings: BatchSettings) -> int:
    """Loss tokens of the whole run, step by step as the windows will be; of a stream, as its sample has them."""
    supervised, per_step = np.asarray(rows.supervised), settings.gradient_accumulation_steps  # (rows,)
    if not isinstance(windows, TrainingWindows):
        tokens = windows.steps * per_step * (settings.micro_batch_size or 1)
        return round(tokens * float(supervised.mean()))
    total, left, epoch = 0, windows.steps, 0
    while left > 0:
        micro_batches = windows.micro_batches(epoch)[: left * per_step]
        total += sum(int(supervised[list(group)].sum()) for batch in micro_batches for group in batch)
        left -= -(-len(micro_batches) // per_step)
        epoch += 1
    return total


@dataclass(frozen=True)
class Forecast:
    """What decides a run's memory. `largest_batch`: of micro-batches of so many rows (None: as written, by tokens).

    `answer_tokens`: of the longest prompt with its answer; 0: nothing is generated.
    `start_bytes`: the most that the adapter's start keeps beside the base, before there is an optimizer.
    `first_shares`: of micro-batches of so many rows, the run's first, in tokens, as shares of the largest.
    """

    run: SimulatedRun
    base: LoadedModel
    largest_batch: Callable[[int | None], Batch]
    rows: EncodedRows
    evaluation_batch: Batch | None = None
    answer_tokens: int = 0
    start_bytes: int = 0
    first_shares: Callable[[int | None], Sequence[float]] = lambda size: ()
    _steps: dict[Choice, Simulation] = field(default_factory=dict, init=False, repr=False)
    _evaluations: dict[tuple[int, str], Simulation] = field(default_factory=dict, init=False, repr=False)

    def peak(self, choice: Choice) -> PeakBytes:
        """Of the run with this choice: the one function that every search for a setting asks."""
        run = self._run(choice)
        load = self._load_bytes if choice.streaming == "off" else self._streamed_load_bytes
        before = self.first_shares(choice.micro_batch_size)
        work = Work(self._step(choice), self._evaluation(run), self._cache_blocks, load, before)
        peak = peak_bytes(work, self.run.device)
        if not self.start_bytes:
            return peak
        return replace(peak, total=max(peak.total, peak.total - peak.optimizer + self.start_bytes))

    def offloaded_bytes(self, choice: Choice) -> int:
        """Pinned memory of the host beside a GPU's, where inputs of recomputed layers wait."""
        return self._step(choice).offloaded

    def _run(self, choice: Choice) -> SimulatedRun:
        return replace(self.run, choice=choice)

    def _step(self, choice: Choice) -> Simulation:
        if choice not in self._steps:
            batch, together = self.largest_batch(choice.micro_batch_size), min(choice.pass_micro_batches, SIMULATED)
            simulation = self._run(choice).training_step(batch, together)
            more = (choice.pass_micro_batches - together) * self._input_bytes(batch)
            simulation = _with_inputs(simulation, more, self.run.device)
            self._steps[choice] = self._really_held(simulation, choice.streaming)
        return self._steps[choice]

    def _input_bytes(self, batch: Batch) -> int:
        """What one more micro-batch of a pass keeps: the input of every layer."""
        return int(batch.input_ids.numel()) * self.base.facts.hidden_size * self.base.dtype.itemsize * (
            self.base.facts.layers + 1
        )  # fmt: skip

    def without_activations(self) -> PeakBytes:
        """What is known of a model whose own code does not run without values."""
        held = self.run.before_a_step()
        parts = {name: held.get(name, 0) for name in ("weights", "adapter", "optimizer")}
        return PeakBytes(**parts, activations=0, logits=0, total=sum(parts.values()))

    def _evaluation(self, run: SimulatedRun) -> Simulation | None:
        """Of the longest evaluation batch; of a choice, the logits chunk and the tier are of any consequence to it."""
        if self.evaluation_batch is None:
            return None
        known, chunk, tier = self._evaluations, run.choice.logits_chunk_tokens, run.choice.streaming
        if (chunk, tier) not in known:
            known[chunk, tier] = self._really_held(run.evaluation(self.evaluation_batch), tier)
        return known[chunk, tier]

    @cached_property
    def _cache_blocks(self) -> Sequence[int]:
        """Bytes of each layer's keys and values at the end of an answer."""
        if not self.answer_tokens or self.evaluation_batch is None:
            return ()
        config = text_config(self.base.net)
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        rows = self.evaluation_batch.input_ids.shape[0]
        block = rows * heads * self.answer_tokens * width * self.base.dtype.itemsize
        return [block] * (2 * self.base.facts.layers)

    @cached_property
    def _stored(self) -> StoredBase | None:
        """The base's files; what the configuration says of them, where they are not here yet."""
        source = find_source(self.run.model, weights=False)
        if source.gguf_file is not None:
            return StoredBase((source.folder / source.gguf_file).stat().st_size, False, gguf=True)
        try:
            headers = read_headers(Path(source.folder)).values()
        except ModelError:
            declared = getattr(self.base.config, "dtype", None)
            kind = declared if isinstance(declared, torch.dtype) else self.base.dtype
            return stored_base([(self.base.facts.total_parameters * kind.itemsize, kind)], self.base.dtype)
        return stored_base([(header.size_bytes, header.dtype) for header in headers], self.base.dtype)

    @cached_property
    def _load_bytes(self) -> int:
        packed = packed_layers(self.base.net)
        matrices = list(packed.values()) if packed else list(self.base.net.modules())
        largest = max((weight.elements for weight in map(weight_of, matrices) if weight is not None), default=0)
        dense, held = self.base.facts.total_parameters * self.base.dtype.itemsize, stored_bytes(self.base.net)
        if self.base.packed_while_read:
            return packing_bytes(0 if self._kept else held, largest, self.base.dtype)
        if self.base.copied_while_read:
            return copying_bytes(held)
        assert self._stored is not None
        return load_bytes(self._stored, dense, held, largest, bool(packed))

    @cached_property
    def _kept(self) -> bool:
        """Whether the packed base is going to be mapped from a sidecar: nothing of it is held while it is packed."""
        return self.base.packed_while_read and can_be_kept(stored_bytes(self.base.net))

    @cached_property
    def _streamed_load_bytes(self) -> int:
        """Of a base that stays in its files: the largest matrix, as it is read and as it is packed."""
        packed = packed_layers(self.base.net).values()
        return max((4 * weight.elements for weight in map(weight_of, packed) if weight is not None), default=0)

    def _really_held(self, simulation: Simulation, streaming: str) -> Simulation:
        """Without the rows of a mapped embedding that no token reads; on the host only."""
        unread = self._unread_bytes(streaming)
        peak = simulation.peak | {"weights": simulation.peak.get("weights", 0) - unread}
        return replace(simulation, peak=peak, total=simulation.total - unread, held=simulation.held - unread)

    def _unread_bytes(self, streaming: str) -> int:
        family, net = self.base.family, self.base.net
        name = family.embedding_name(net)
        stored = self._stored is not None and self._stored.mapped
        as_stored = stored and not packed_layers(net) and not self.base.copied_while_read
        mapped = as_stored or self._kept or streaming != "off"
        if self.run.device.type != "cpu" or not mapped or name is None or family.tied(net):
            return 0
        embedding = weight_of(net.get_submodule(name))
        if embedding is None:
            return 0
        row_bytes = embedding.shape[1] * self.base.dtype.itemsize
        return untouched_bytes(_ids(self.rows), row_bytes, embedding.shape[0] * row_bytes)


def _with_inputs(simulation: Simulation, size_bytes: int, device: torch.device) -> Simulation:
    """With further layers' inputs kept: beside a step's other activations, or on a GPU on the host."""
    if not size_bytes:
        return simulation
    if device.type == "cuda" and simulation.offloaded:
        return replace(simulation, offloaded=simulation.offloaded + size_bytes)
    peak = simulation.peak | {"activations": simulation.peak.get("activations", 0) + size_bytes}
    return replace(simulation, peak=peak, total=simulation.total + size_bytes, held=simulation.held + size_bytes)


def _ids(rows: EncodedRows) -> NDArray[np.int64]:
    """(ids,) that occur in the rows (in the first of very many)."""
    found: set[int] = set()
    for index in range(min(len(rows), SAMPLED_ROWS)):
        found.update(rows[index].ids.tolist())
    return np.array(sorted(found), dtype=np.int64)
