"""`training:` optimizer, schedule, batch and how often to save and evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunekit.recipe.section import Count, CountOrZero, NotNegative, Number, Positive, Section

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class TrainingSection(Section):
    """`gradient_accumulation_steps` micro-batches make one optimizer step, shared among the ranks.

    A micro-batch is `micro_batch_size` rows (packs, if packed), or as many as fit `micro_batch_tokens` padded tokens.
    """

    learning_rate: NotNegative = 2e-4
    scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] | None = 0.03
    warmup_steps: CountOrZero | None = None
    optimizer: Optimizer = "adamw"
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive | None = 1.0
    epochs: Positive | None = 1.0
    max_steps: Count | None = None
    micro_batch_size: Count | None = 2
    micro_batch_tokens: Count | None = None
    gradient_accumulation_steps: Count = 8
    loraplus_ratio: Positive | None = None
    seed: Annotated[CountOrZero, Field(lt=2**32)] = 0
    save_steps: Count = 100
    keep_checkpoints: Count = 2
    eval_steps: Count = 100
