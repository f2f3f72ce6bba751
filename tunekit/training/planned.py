"""Defines Planned: what planning decided, apart from the plain values in plan.json."""

from dataclasses import dataclass

from tunekit.contracts import Batch, Processor
from tunekit.data.batching.steps import BatchSettings
from tunekit.data.rows import RowSet
from tunekit.recipe.bases.section import AdapterSettings
from tunekit.recipe.model import ModelSection


@dataclass(frozen=True)
class Planned:
    """Results of planning that training needs: rows, batch settings, adapter settings, the largest batch."""

    model: ModelSection  # includes the heads that the objective needs
    processor: Processor
    rows: RowSet
    batch_settings: BatchSettings  # with the micro-batches that plan chose
    adapter: AdapterSettings  # with its texts as token ids
    largest_batch: Batch  # the largest micro-batch of the run; for a stream, of the largest possible size
    learned_length: int | None = None  # tokens of a row for which the base has learned positions
    kernel_packages: tuple[str, ...] = ()  # packages whose kernels the base uses on a GPU
