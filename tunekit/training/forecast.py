"""The peak memory of a run, foreseen: its largest batches simulated, its base loaded on paper.

Comes in: sections, the model without weights, rows.  Goes out: PeakBytes of a Choice.
Next: plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.data.batches import BatchSettings, TrainingWindows
from tunekit.data.collate import collate
from tunekit.data.stream import StreamedWindows
from tunekit.decisions import PeakBytes
from tunekit.errors import ModelError
from tunekit.memory.choice import Choice
from tunekit.memory.estimate import Work, peak_bytes
from tunekit.memory.loading import StoredBase, load_bytes, stored_base, untouched_bytes
from tunekit.memory.tracker import Simulation
from tunekit.model.families import text_config
from tunekit.model.load import LoadedModel
from tunekit.model.shards import read_headers
from tunekit.model.source import find_source
from tunekit.model.weights import packed_layers, stored_bytes, weight_of
from tunekit.protocols import Batch, EncodedRows
from tunekit.training.simulation import SimulatedRun

EXAMINED_EPOCHS = 8  # packs differ from epoch to epoch, though hardly in size
SAMPLED_ROWS = 20_000  # for the ids that occur


def largest_batch(
    windows: TrainingWindows, rows: EncodedRows, settings: BatchSettings, *, by_scores: bool = False
) -> Batch:
    """The micro-batch with most padded tokens among those that the run will really make.

    `by_scores`: the one with most attention scores, which grow with the square of a document; of batches cut by tokens
    that is another one: a single long row.
    """
    lengths = np.asarray(rows.lengths)  # (rows,)
    best, best_size, left = None, (-1, -1), windows.steps
    for epoch in range(EXAMINED_EPOCHS):
        micro_batches = windows.micro_batches(epoch)[: left * settings.gradient_accumulation_steps]
        left -= -(-len(micro_batches) // settings.gradient_accumulation_steps)
        for micro_batch in micro_batches:
            widest = max(int(lengths[list(group)].sum()) for group in micro_batch)
            size = (widest * len(micro_batch), widest)
            if by_scores:
                documents = [int(lengths[row]) for group in micro_batch for row in group]
                size = (sum(length**2 for length in documents), widest)
            if size > best_size:
                best, best_size = micro_batch, size
        if left <= 0:
            break
    assert best is not None
    return collate(rows, best, pad_id=settings.pad_id, packed=settings.packing)


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
    """

    run: SimulatedRun
    base: LoadedModel
    largest_batch: Callable[[int | None], Batch]
    steps: int
    rows: EncodedRows
    evaluation_batch: Batch | None = None
    answer_tokens: int = 0
    start_bytes: int = 0
    _evaluations: dict[int, Simulation] = field(default_factory=dict, init=False, repr=False)  # by logits chunk

    def peak(self, choice: Choice) -> PeakBytes:
        """Of the run with this choice: the one function that every search for a setting asks.

        The base is counted as on its device: only the tier `off` is simulated.
        """
        run = replace(self.run, logits_chunk_tokens=choice.logits_chunk_tokens)
        batch = self.largest_batch(choice.micro_batch_size)
        step = self._really_held(run.training_step(batch, choice.checkpointed_layers))
        work = Work(step, self.steps, self._evaluation(run), self._cache_blocks, self._load_bytes)
        peak = peak_bytes(work, self.run.device)
        if not self.start_bytes:
            return peak
        return replace(peak, total=max(peak.total, peak.total - peak.optimizer + self.start_bytes))

    def without_activations(self) -> PeakBytes:
        """What is known of a model whose own code does not run without values."""
        held = self.run.before_a_step()
        parts = {name: held.get(name, 0) for name in ("weights", "adapter", "optimizer")}
        return PeakBytes(**parts, activations=0, logits=0, total=sum(parts.values()))

    def _evaluation(self, run: SimulatedRun) -> Simulation | None:
        """Of the longest evaluation batch; only the logits chunk is of any consequence to it."""
        if self.evaluation_batch is None:
            return None
        known, chunk = self._evaluations, run.logits_chunk_tokens
        if chunk not in known:
            known[chunk] = self._really_held(run.evaluation(self.evaluation_batch))
        return known[chunk]

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
        dense = self.base.facts.total_parameters * self.base.dtype.itemsize
        assert self._stored is not None
        return load_bytes(self._stored, dense, stored_bytes(self.base.net), largest, bool(packed))

    def _really_held(self, simulation: Simulation) -> Simulation:
        """Without the rows of a mapped embedding that no token reads; on the host only."""
        unread = self._unread_bytes
        peak = simulation.peak | {"weights": simulation.peak.get("weights", 0) - unread}
        return replace(simulation, peak=peak, total=simulation.total - unread, held=simulation.held - unread)

    @cached_property
    def _unread_bytes(self) -> int:
        family, net = self.base.family, self.base.net
        name = family.embedding_name(net)
        mapped = self._stored is not None and self._stored.mapped and not packed_layers(net)
        if self.run.device.type != "cpu" or not mapped or name is None or family.tied(net):
            return 0
        embedding = weight_of(net.get_submodule(name))
        if embedding is None:
            return 0
        row_bytes = embedding.shape[1] * self.base.dtype.itemsize
        return untouched_bytes(_ids(self.rows), row_bytes, embedding.shape[0] * row_bytes)


def _ids(rows: EncodedRows) -> NDArray[np.int64]:
    """(ids,) that occur in the rows (in the first of very many)."""
    found: set[int] = set()
    for index in range(min(len(rows), SAMPLED_ROWS)):
        found.update(rows[index].ids.tolist())
    return np.array(sorted(found), dtype=np.int64)
