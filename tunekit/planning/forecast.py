"""Predicts a run's peak memory: the largest batches are simulated, the memory of loading is calculated, and overhead of
the device is added.

There are three ways to load tensors. A tensor that has the dtype of the computation and is aligned to 64 bytes is
mapped from its file; its pages become resident when they are read. Other tensors are copied or packed (quantized) one
after the other, without mapping the file. If only transformers can read the base, tensors are copied or packed while
their file is mapped.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice

import numpy as np
import torch

from tunekit.contracts import Batch, RowKind, Rows
from tunekit.data.batching.steps import BatchSettings, StoredSteps, collate
from tunekit.data.batching.stream import StreamedSteps
from tunekit.errors import ModelError
from tunekit.machine.devices import kind_of
from tunekit.model.attention.self_attention import attention_sizes
from tunekit.model.families import text_config
from tunekit.model.load import LoadedModel
from tunekit.model.quantized.four_bit import WORKING_BYTES
from tunekit.model.quantized.weights import packed_layers, stored_bytes, weight_of
from tunekit.model.storage.mapped_files import CHUNK_BYTES, MappedFiles
from tunekit.model.storage.packed_cache import can_be_cached
from tunekit.model.storage.quantized_layouts import open_weights
from tunekit.model.storage.source import find_source
from tunekit.planning.simulated.kernels import workspace_bytes
from tunekit.planning.simulated.tracker import Simulation
from tunekit.planning.simulation import MODEL_ERRORS, SimulatedRun
from tunekit.recipe.model import ModelSection
from tunekit.records import ExecutionSettings, PeakBytes

EXAMINED_EPOCHS = 8  # packs differ by epoch, but hardly in size
SAMPLED_ROWS = 20_000  # rows that are searched for token ids


@dataclass(frozen=True)
class StoredBase:
    """The size of a base on disk, and the dtypes of its tensors (not of a GGUF file). `files`: the safetensors files;
    None if the base is not downloaded, or is a GGUF file."""

    file_bytes: int
    dtypes: frozenset[torch.dtype] = frozenset()
    gguf: bool = False
    files: MappedFiles | None = None

    def converts(self, dtype: torch.dtype) -> bool:
        """Whether some tensors must be converted to the dtype of the computation."""
        return any(stored.is_floating_point and stored != dtype for stored in self.dtypes)


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

    `stored`: the base's files. `cache_room`: bytes that a packed base may take in the cache folder. `largest_batch`: a
    function from the rows per micro-batch (None if limited by tokens) to the largest micro-batch.
    `answer_tokens`: the length of the longest prompt with its answer; 0 if the run generates no answers.
    `initialisation_bytes`: maximum memory of the adapter's initialisation, without the base; it is freed before the
    optimizer is made.
    """

    run: SimulatedRun
    stored: StoredBase
    cache_room: int
    largest_batch: Callable[[int | None], Batch]
    rows: Rows
    evaluation_batch: Batch | None = None
    answer_tokens: int = 0
    initialisation_bytes: int = 0
    errors: list[str] = field(default_factory=list, init=False, repr=False)  # of models that cannot be simulated
    _peaks: dict[ExecutionSettings, PeakBytes] = field(default_factory=dict, init=False, repr=False)
    _steps: dict[ExecutionSettings, Simulation] = field(default_factory=dict, init=False, repr=False)
    _evaluations: dict[tuple[int, str], Simulation] = field(default_factory=dict, init=False, repr=False)
    _rehearsals: dict[int, Simulation | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def base(self) -> LoadedModel:
        """The base on the meta device."""
        return self.run.base

    @property
    def _companion_bytes(self) -> int:
        return sum(companion.weight_bytes for companion in self.run.companions.values())

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
        load, companions = self._load_bytes(execution), self._companion_bytes
        simulations, device = (self._step(execution), self._evaluation(run), self._rehearsal(run)), self.run.device
        peak = peak_bytes(*simulations, device, self.base.dtype, cache_bytes=self._cache_bytes, load_bytes=load)
        peak = replace(peak, weights=peak.weights + companions, total=peak.total + companions)
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
        load = self._load_bytes(self.run.execution)
        simulation = Simulation(parts, sum(parts.values()))
        return peak_bytes(simulation, None, None, self.run.device, self.base.dtype, load_bytes=load)

    def _rehearsal(self, run: SimulatedRun) -> Simulation | None:
        """The simulation of the run's companions (sampling, image generation); None if nothing has to be simulated. Of
        all settings, it depends only on the number of completions that are sampled together."""
        known, size = self._rehearsals, run.execution.sampling_batch_size
        if size not in known:
            known[size] = run.rehearsals(self.largest_batch(run.execution.micro_batch_size))
        return known[size]

    def _sampling_peak(self, size: int) -> int:
        """Total peak bytes if `size` completions are sampled together."""
        rehearsal = self._rehearsal(replace(self.run, execution=replace(self.run.execution, sampling_batch_size=size)))
        assert rehearsal is not None
        return peak_bytes(rehearsal, None, None, self.run.device, self.base.dtype).total + self._companion_bytes

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

    def _load_bytes(self, execution: ExecutionSettings) -> int:
        """Peak memory of loading the base."""
        return load_bytes(self.base, self.stored, streamed=execution.streaming != "off", cached=self._cached)

    @cached_property
    def _cached(self) -> bool:
        """Whether the packed (quantized) base is mapped from a cache file, so that packed weights need not stay in
        memory."""
        return self.base.packed_while_read and can_be_cached(stored_bytes(self.base.net), self.cache_room)

    def _without_unread(self, simulation: Simulation, streaming: str) -> Simulation:
        """The simulation without the embedding rows that no token of the run needs. Only an embedding in a mapped file
        on a CPU has such rows."""
        unread = self._unread_bytes(streaming)
        peak = simulation.peak | {"weights": simulation.peak.get("weights", 0) - unread}
        return replace(simulation, peak=peak, total=simulation.total - unread)

    def maps_weights(self, streaming: str) -> bool:
        """Whether the base's weights are views of files, which the processes of a machine share."""
        converted = self.stored.gguf or self.stored.converts(self.base.dtype) or self.base.copied_while_read
        as_stored = not converted and not packed_layers(self.base.net)
        return (as_stored or self._cached or streaming != "off") and not self.run.adapter.trains_base

    def _unread_bytes(self, streaming: str) -> int:
        family, net = self.base.family, self.base.net
        name, any_token = family.embedding_name(net), any(each.any_token for each in self.run.companions.values())
        mapped = self.maps_weights(streaming) and not any_token
        if self.run.device.type != "cpu" or not mapped or name is None or family.tied(net):
            return 0
        embedding = weight_of(net.get_submodule(name))
        if embedding is None:
            return 0
        row_bytes = embedding.shape[1] * self.base.dtype.itemsize
        ids = token_ids(self.rows, self.run.objective.rows, SAMPLED_ROWS)
        return untouched_bytes(ids, row_bytes, embedding.shape[0] * row_bytes)


def token_ids(rows: Rows, kind: RowKind, count: int) -> set[int]:
    """The token ids in the first `count` rows."""
    first = (rows[number] for number in range(min(len(rows), count)))
    return {token for row in first for part in kind.layout.token_parts for token in row.parts[part].tolist()}


PARTS = ("weights", "adapter", "optimizer", "activations", "logits")
# Resident memory of a run on a CPU besides live tensors (a GPU's allocator counts only tensors): libraries and small
# objects; the kernels that are compiled for products in 16 bits with AVX-512; and freed blocks that malloc keeps. These
# blocks are a share of all memory except the base's weights, up to a bound, because malloc returns very large blocks.
# Source: scripts/results/memory.md.
PROCESS_BYTES, COMPILED_BYTES = 100_000_000, 15_000_000
KEPT_SHARE = 0.20
MOST_KEPT_BYTES = 500_000_000


def peak_bytes(
    step: Simulation,
    evaluation: Simulation | None,
    sampling: Simulation | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cache_bytes: int = 0,
    load_bytes: int = 0,
) -> PeakBytes:
    """The peak memory of the run. Its parts are those of the largest simulation: a step, an evaluation or sampling.

    `dtype`: the dtype of the computation. `cache_bytes`: keys and values of generated answers, added to an evaluation.
    `load_bytes`: the peak of host memory while the base is loaded.
    """
    evaluated = 0 if evaluation is None else evaluation.total
    highest = max((each for each in (step, evaluation, sampling) if each is not None), key=lambda each: each.total)
    total = max(highest.total, evaluated + cache_bytes)
    if device.type == "cpu":
        kept = min(round(KEPT_SHARE * (total - highest.peak.get("weights", 0))), MOST_KEPT_BYTES)
        compiles = dtype.itemsize == 2 and "AVX512" in torch.backends.cpu.get_cpu_capability()
        total = max(total + kept, load_bytes) + PROCESS_BYTES + (COMPILED_BYTES if compiles else 0)
    elif not kind_of(device).own_memory:
        total = max(total, load_bytes)
    total += workspace_bytes(device)
    return PeakBytes(**{name: highest.peak.get(name, 0) for name in PARTS}, total=total)


FAULT_BYTES = 2 * 2**20  # Linux maps up to this many bytes around each page that is read
# What gguf's reader holds for each token of a vocabulary: its text, type and merge as arrays of their own. Measured:
# 158.8 MiB for a file with 49,152 tokens and 48,900 merges (gguf 0.19).
TOKEN_BYTES = 3_400


def read_stored_base(section: ModelSection, base: LoadedModel) -> StoredBase:
    """Read the headers of the base's files. If the base is not downloaded yet, its configuration gives the values."""
    source = find_source(section, weights=False)
    if source.gguf_file is not None:
        return StoredBase((source.folder / source.gguf_file).stat().st_size, gguf=True)
    try:
        files = open_weights(source.folder)
    except ModelError:
        declared = getattr(base.config, "dtype", None)
        dtype = declared if isinstance(declared, torch.dtype) else base.dtype
        return StoredBase(base.facts.total_parameters * dtype.itemsize, frozenset([dtype]))
    read = [header for name, header in files.headers.items() if not name.startswith(base.family.unread)]
    size, dtypes = sum(header.size_bytes for header in read), frozenset(header.dtype for header in read)
    return StoredBase(size, dtypes, files=files)


def load_bytes(base: LoadedModel, stored: StoredBase, *, streamed: bool, cached: bool) -> int:
    """Peak memory while a base is loaded.

    `streamed`: its weights stay in their files. `cached`: its packed weights are mapped from a cache file.
    """
    net, packed = base.net, list(packed_layers(base.net).values())
    weights = map(weight_of, packed or net.modules())
    elements = max((weight.elements for weight in weights if weight is not None), default=0)  # of the largest matrix
    largest_bytes = max(parameter.nbytes for parameter in net.parameters())
    parsed = TOKEN_BYTES * int(text_config(net).vocab_size) if stored.gguf else 0  # the vocabulary
    dense, loaded = base.facts.total_parameters * base.dtype.itemsize, stored_bytes(net)
    extra = 0 if stored.files is None else stored.files.extra_bytes
    if streamed:  # one matrix, or the largest tensor that is copied unpacked, such as the embedding
        copied = base.packed_while_read or base.copied_while_read
        return parsed + max(4 * elements if packed else 0, largest_bytes if copied else 0) + extra
    if base.packed_while_read:  # the base, one matrix, and buffers for packing
        packing = (0 if cached else loaded) + elements * base.dtype.itemsize + WORKING_BYTES
        return parsed + max(packing, largest_bytes) + extra
    if base.copied_while_read:  # tensors are copied one after the other
        return parsed + loaded + CHUNK_BYTES + extra
    if stored.gguf:  # the largest tensor is unpacked to float32, then copied
        return parsed + stored.file_bytes + dense + 2 * 4 * elements
    if stored.converts(base.dtype):
        return stored.file_bytes + dense
    return stored.file_bytes + loaded + 4 * elements if packed else loaded  # a matrix that is packed is copied once


def untouched_bytes(ids: Collection[int], row_bytes: int, table_bytes: int) -> int:
    """Bytes of a mapped embedding that are never read, if only the tokens in `ids` are looked up."""
    touched = {token * row_bytes // FAULT_BYTES for token in ids}
    return max(0, table_bytes - len(touched) * FAULT_BYTES)
