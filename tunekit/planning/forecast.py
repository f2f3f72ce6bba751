"""Predicts a run's peak memory: the largest batches are simulated, and the memory of loading is calculated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.contracts import Batch, RowKind, Rows
from tunekit.data.batching.steps import BatchSettings, StoredSteps, collate
from tunekit.data.batching.stream import StreamedSteps
from tunekit.errors import ModelError
from tunekit.model.attention.self_attention import attention_sizes
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.weights import packed_layers, stored_bytes, weight_of
from tunekit.model.storage.packed_cache import can_be_cached
from tunekit.model.storage.shards import read_headers
from tunekit.model.storage.source import find_source
from tunekit.planning.simulated.estimate import peak_bytes
from tunekit.planning.simulated.loading import (
    StoredBase,
    copying_bytes,
    load_bytes,
    packing_bytes,
    parsing_bytes,
    stored_base,
    untouched_bytes,
)
from tunekit.planning.simulated.tracker import Simulation
from tunekit.planning.simulation import SimulatedRun
from tunekit.records import ExecutionSettings, PeakBytes

EXAMINED_EPOCHS = 8  # packs differ by epoch, but hardly in size
SAMPLED_ROWS = 20_000  # rows that are searched for token ids
MODEL_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError)  # of the model's code, on the meta device


def largest_batch(
    steps: StoredSteps, rows: Rows, kind: RowKind, settings: BatchSettings, *, by_scores: bool = False
) -> Batch:
    """The run's micro-batch with the most tokens, padding included.

    `by_scores`: instead, the micro-batch with the most attention scores. Their number grows with the square of a
    document's length, so this is often a single long row.
    """
    sizes = np.asarray(rows.sizes)  # (rows, sizes)
    lengths = sizes.sum(axis=1)  # (rows,)
    best, best_size, left = None, (-1, -1), steps.count
    for epoch in range(EXAMINED_EPOCHS):
        of_epoch = [*islice(steps.steps_of(epoch), left)]
        left -= len(of_epoch)
        for micro_batch in chain.from_iterable(of_epoch):
            widths = np.stack([sizes[list(group)].sum(axis=0) for group in micro_batch])  # (B, sizes)
            padded = np.array([kind.layout.padded(each) for each in widths])  # (B, sizes)
            tokens = int(widths.sum() if settings.end_to_end else len(padded) * padded.max(axis=0).sum())
            if tokens > best_size[0]:
                tokens -= sum(kind.shared(rows[row]) for group in micro_batch for row in group)
            if by_scores:
                tokens = sum(int(lengths[row]) ** 2 for group in micro_batch for row in group)
            size = (tokens, int(widths.sum(axis=1).max()))
            if size > best_size:
                best, best_size = micro_batch, size
        if left <= 0:
            break
    assert best is not None
    return collate(rows, best, kind, end_to_end=settings.end_to_end)


def supervised_tokens(steps: StoredSteps | StreamedSteps, rows: Rows, settings: BatchSettings) -> int:
    """Number of supervised tokens in the whole run. For streamed sources, it is estimated from the sampled rows."""
    supervised, per_step = np.asarray(rows.supervised), settings.gradient_accumulation_steps  # (rows,)
    if not isinstance(steps, StoredSteps):
        tokens = steps.count * per_step * (settings.micro_batch_size or 1)
        return round(tokens * float(supervised.mean()))
    total, left, epoch = 0, steps.count, 0
    while left > 0:
        micro_batches = steps.micro_batches(epoch)[: left * per_step]
        total += sum(int(supervised[list(group)].sum()) for batch in micro_batches for group in batch)
        left -= -(-len(micro_batches) // per_step)
        epoch += 1
    return total


@dataclass(frozen=True)
class Forecast:
    """The inputs for a prediction of a run's peak memory.

    `largest_batch`: a function from the rows per micro-batch (None if limited by tokens) to the largest micro-batch.
    `answer_tokens`: the length of the longest prompt with its answer; 0 if the run generates no answers.
    `initialisation_bytes`: maximum memory of the adapter's initialisation, without the base; it is freed before the
    optimizer is made. `companion_bytes`: weights of companions (auxiliary models) that are always in memory and are not
    simulated. `any_token`: whether the run may look up embeddings of tokens that do not occur in the rows.
    """

    run: SimulatedRun
    base: LoadedModel
    largest_batch: Callable[[int | None], Batch]
    rows: Rows
    evaluation_batch: Batch | None = None
    answer_tokens: int = 0
    initialisation_bytes: int = 0
    companion_bytes: int = 0
    any_token: bool = False
    errors: list[str] = field(default_factory=list, init=False, repr=False)  # of models that cannot be simulated
    _peaks: dict[ExecutionSettings, PeakBytes] = field(default_factory=dict, init=False, repr=False)
    _steps: dict[ExecutionSettings, Simulation] = field(default_factory=dict, init=False, repr=False)
    _evaluations: dict[tuple[int, str], Simulation] = field(default_factory=dict, init=False, repr=False)
    _rehearsals: dict[int, Simulation | None] = field(default_factory=dict, init=False, repr=False)

    def known_peak(self, execution: ExecutionSettings) -> PeakBytes:
        """Peak memory of the run with these settings; without activations if the model cannot be simulated. Every
        search for settings uses this function. Peaks are cached."""
        if execution not in self._peaks:
            try:
                self._peaks[execution] = self.peak(execution)
            except MODEL_ERRORS as error:
                self.errors.append(str(error).strip().partition("\n")[0])
                self._peaks[execution] = self._without_activations()
        return self._peaks[execution]

    def sampled_together(self, limit: float) -> int:
        """The number of completions that are sampled together: the recipe's number, halved until they fit into `limit`
        bytes. 0 if the run samples no completions."""
        companions = self.run.companions.values()
        size = max((companion.sampling_batch_size for companion in companions), default=0)
        try:
            while size > 1 and self._sampling_peak(size) > limit:
                size = (size + 1) // 2
        except MODEL_ERRORS:  # `known_peak` records it
            pass
        return size

    def peak(self, execution: ExecutionSettings) -> PeakBytes:
        """Peak memory of the run with these settings. Raises: errors of the model's own code."""
        run = replace(self.run, execution=execution)
        load = self._base_load_bytes(execution)
        simulations, device = (self._step(execution), self._evaluation(run), self._rehearsal(run)), self.run.device
        peak = peak_bytes(*simulations, device, self.base.dtype, cache_bytes=self._cache_bytes, load_bytes=load)
        peak = replace(peak, weights=peak.weights + self.companion_bytes, total=peak.total + self.companion_bytes)
        if not self.initialisation_bytes:
            return peak
        return replace(peak, total=max(peak.total, peak.total - peak.optimizer + self.initialisation_bytes))

    def offloaded_bytes(self, execution: ExecutionSettings) -> int:
        """Bytes of pinned host memory for the offloaded inputs of recomputed layers; 0 if the model cannot be
        simulated."""
        self.known_peak(execution)  # records an error of the model's code
        return 0 if self.errors else self._step(execution).offloaded

    def _step(self, execution: ExecutionSettings) -> Simulation:
        if execution not in self._steps:
            batch = self.largest_batch(execution.micro_batch_size)
            simulation = replace(self.run, execution=execution).training_step(batch, execution.pass_micro_batches)
            self._steps[execution] = self._without_unread(simulation, execution.streaming)
        return self._steps[execution]

    def _without_activations(self) -> PeakBytes:
        """Peak memory without activations, for a model whose code cannot run on the meta device."""
        before = self.run.before_a_step()
        parts = {name: before.get(name, 0) for name in ("weights", "adapter", "optimizer")}
        load = self._base_load_bytes(self.run.execution)
        simulation = Simulation(parts, sum(parts.values()))
        return peak_bytes(simulation, None, None, self.run.device, self.base.dtype, load_bytes=load)

    def _rehearsal(self, run: SimulatedRun) -> Simulation | None:
        """The simulation of the run's companions (sampling, image generation); None if nothing has to be simulated. Of
        all settings, it depends only on the number of completions that are sampled together."""
        if not any(companion.rehearses for companion in run.companions.values()):
            return None
        known, size = self._rehearsals, run.execution.sampling_batch_size
        if size not in known:
            known[size] = run.rehearsals(self.largest_batch(run.execution.micro_batch_size))
        return known[size]

    def _sampling_peak(self, size: int) -> int:
        """Total peak bytes if `size` completions are sampled together."""
        rehearsal = self._rehearsal(replace(self.run, execution=replace(self.run.execution, sampling_batch_size=size)))
        assert rehearsal is not None
        return peak_bytes(rehearsal, None, None, self.run.device, self.base.dtype).total + self.companion_bytes

    def _evaluation(self, run: SimulatedRun) -> Simulation | None:
        """The simulation of the longest evaluation batch; None without evaluation rows. Of all settings, it depends
        only on the size of logits chunks and on where weights are stored."""
        if self.evaluation_batch is None:
            return None
        known, chunk, tier = self._evaluations, run.execution.logits_chunk_tokens, run.execution.streaming
        if (chunk, tier) not in known:
            known[chunk, tier] = self._without_unread(run.evaluation(self.evaluation_batch), tier)
        return known[chunk, tier]

    @cached_property
    def _cache_bytes(self) -> int:
        """Bytes of the key-value cache of all layers when the longest answer ends; 0 for a base without attention."""
        if not self.answer_tokens or self.evaluation_batch is None:
            return 0
        numbers = sum(heads * width for _, heads, width in attention_sizes(self.base.net, self.base.facts.layers))
        rows = len(self.evaluation_batch.sequences)
        return 2 * rows * self.answer_tokens * numbers * self.base.dtype.itemsize

    @cached_property
    def _stored(self) -> StoredBase | None:
        """The size and format of the base on disk, from the headers of its files. If the base is not downloaded yet,
        they are derived from its configuration."""
        source = find_source(self.run.model, weights=False)
        if source.gguf_file is not None:
            return StoredBase((source.folder / source.gguf_file).stat().st_size, False, gguf=True)
        try:
            headers = read_headers(Path(source.folder))
        except ModelError:
            declared = getattr(self.base.config, "dtype", None)
            kind = declared if isinstance(declared, torch.dtype) else self.base.dtype
            return stored_base([(self.base.facts.total_parameters * kind.itemsize, kind)], self.base.dtype)
        read = [each for name, each in headers.items() if not name.startswith(self.base.family.unread)]
        return stored_base([(header.size_bytes, header.dtype) for header in read], self.base.dtype)

    def _base_load_bytes(self, execution: ExecutionSettings) -> int:
        """Peak memory of loading the base."""
        parsed = parsing_bytes(self.base.net) if self._stored is not None and self._stored.gguf else 0
        return parsed + (self._load_bytes if execution.streaming == "off" else self._streamed_load_bytes)

    @cached_property
    def _load_bytes(self) -> int:
        packed = packed_layers(self.base.net)
        matrices = list(packed.values()) if packed else list(self.base.net.modules())
        largest = max((weight.elements for weight in map(weight_of, matrices) if weight is not None), default=0)
        dense, loaded = self.base.facts.total_parameters * self.base.dtype.itemsize, stored_bytes(self.base.net)
        if self.base.packed_while_read:
            packing = packing_bytes(0 if self._kept else loaded, largest, self.base.dtype)
            return max(packing, self._largest_bytes)
        if self.base.copied_while_read:
            return copying_bytes(loaded)
        assert self._stored is not None
        return load_bytes(self._stored, dense, loaded, largest, bool(packed))

    @cached_property
    def _kept(self) -> bool:
        """Whether the packed (quantized) base is mapped from a cache file, so that packed weights need not stay in
        memory."""
        return self.base.packed_while_read and can_be_cached(stored_bytes(self.base.net))

    @cached_property
    def _streamed_load_bytes(self) -> int:
        """Memory for loading a base whose weights stay in their files. It is the memory of one matrix (unpacked and
        packed), or of the largest tensor that is copied unpacked, such as the embedding."""
        packed = packed_layers(self.base.net).values()
        matrix = max((4 * weight.elements for weight in map(weight_of, packed) if weight is not None), default=0)
        copied = self.base.packed_while_read or self.base.copied_while_read
        return max(matrix, self._largest_bytes if copied else 0)

    @cached_property
    def _largest_bytes(self) -> int:
        return max(parameter.nbytes for parameter in self.base.net.parameters())

    def _without_unread(self, simulation: Simulation, streaming: str) -> Simulation:
        """The simulation without the embedding rows that no token of the run needs. Only an embedding in a mapped file
        on a CPU has such rows."""
        unread = self._unread_bytes(streaming)
        peak = simulation.peak | {"weights": simulation.peak.get("weights", 0) - unread}
        return replace(simulation, peak=peak, total=simulation.total - unread)

    def maps_weights(self, streaming: str) -> bool:
        """Whether the base's weights are views of files, which the processes of a machine share."""
        stored = self._stored is not None and self._stored.mapped
        as_stored = stored and not packed_layers(self.base.net) and not self.base.copied_while_read
        return (as_stored or self._kept or streaming != "off") and not self.run.adapter.trains_base

    def _unread_bytes(self, streaming: str) -> int:
        family, net = self.base.family, self.base.net
        name = family.embedding_name(net)
        mapped = self.maps_weights(streaming) and not self.any_token
        if self.run.device.type != "cpu" or not mapped or name is None or family.tied(net):
            return 0
        embedding = weight_of(net.get_submodule(name))
        if embedding is None:
            return 0
        row_bytes = embedding.shape[1] * self.base.dtype.itemsize
        ids = _ids(self.rows, self.run.objective.rows.layout.token_parts)
        return untouched_bytes(ids, row_bytes, embedding.shape[0] * row_bytes)


def _ids(rows: Rows, parts: Sequence[str]) -> NDArray[np.int64]:
    """The token ids (ids,) in the named parts of the first SAMPLED_ROWS rows."""
    sampled = map(rows.__getitem__, range(min(len(rows), SAMPLED_ROWS)))
    ids = {token for row in sampled for part in parts for token in row.parts[part].tolist()}
    return np.array(sorted(ids), dtype=np.int64)
