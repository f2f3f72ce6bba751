"""`training:` optimizer, schedule, batch size, and the steps between checkpoints and evaluations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from tunekit.recipe.bases.section import (
    Count,
    CountOrZero,
    NotNegative,
    Number,
    Positive,
    Section,
    Seed,
    Several,
    Text,
)

# settings of each scheduler and their defaults, with transformers' names; None: computed from warm-up or number of
# steps
SCHEDULERS: dict[str, dict[str, float | str | None]] = {
    "constant": {},
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 1.0},
    "polynomial": {"lr_end": 1e-7, "power": 1.0},
    "inverse_sqrt": {"timescale": None},
    "warmup_stable_decay": {"num_decay_steps": None, "decay_type": "cosine", "min_lr_ratio": 0.0, "num_cycles": 0.5},
}
_SHARES = ("min_lr_rate", "min_lr_ratio")  # of the learning rate
_STEP_COUNTS = ("num_decay_steps", "timescale")
_RATES = ("min_lr", "lr_end")
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "muon"]
MOST_MINUTES = 366 * 24 * 60  # a year
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion")


def _scheduler(value: object) -> str:
    """The name of a schedule. constant_with_warmup becomes constant, because every schedule has a warm-up."""
    if not isinstance(value, str) or value not in (*SCHEDULERS, "constant_with_warmup"):
        raise PydanticCustomError("literal_error", "unknown scheduler", {"expected": ", ".join(SCHEDULERS)})
    return value.removesuffix("_with_warmup")


def _problem_of(name: str, value: float | str, learning_rate: float | None) -> str:
    """The end of a message about a wrong setting of a schedule; empty for a valid setting."""
    if isinstance(value, str) or name == "decay_type":
        return "" if isinstance(value, str) and name == "decay_type" else "is not a valid value"
    if value < 0:
        return "is below 0"
    if name in _SHARES and value > 1:
        return "is above 1; write a share of the learning rate"
    if name in _STEP_COUNTS and (value < 1 or value % 1):
        return "is not a number of steps"
    if name in _RATES and learning_rate is not None and value > learning_rate:
        return f"is above training.learning_rate ({learning_rate:g})"
    return ""


MOST_THREADS = 1024  # more than any machine has


def _threads(value: object) -> object:
    """A number of threads, or adaptive."""
    if value == "adaptive":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(1, MOST_THREADS + 1):
        raise ValueError(f"must be adaptive, or a number of threads from 1 to {MOST_THREADS:,}")
    return int(value)


SchedulerName = Annotated[str, BeforeValidator(_scheduler), WithJsonSchema({"enum": list(SCHEDULERS)})]

Threads = Annotated[
    int | Literal["adaptive"],
    BeforeValidator(_threads),
    WithJsonSchema({"anyOf": [{"enum": ["adaptive"]}, {"type": "integer", "minimum": 1, "maximum": MOST_THREADS}]}),
]


RouterLossSetting = Literal["auto", "off"] | Positive


class TrainingSection(Section):
    """Settings of the optimizer and its steps. One step consists of `gradient_accumulation_steps` micro-batches, which
    are shared among the ranks (processes).

    These pairs exclude each other: epochs and max_steps, warmup_ratio and warmup_steps, micro_batch_size and
    micro_batch_tokens. If the recipe sets one, the other is None instead of its default.
    """

    free_keys = ("save_steps", "keep_checkpoints", "eval_steps", "rank_speeds", "max_minutes")

    learning_rate: NotNegative = Field(
        2e-4,
        description="the maximum of the schedule; default: the published rate of the objective, or else of the adapter "
        "method, if there is one",
    )
    scheduler: SchedulerName = Field(
        "cosine", description="the schedule after the warm-up; names and formulas of transformers"
    )
    scheduler_settings: dict[Text, Number | Literal["linear", "cosine", "1-sqrt"]] = Field(
        default_factory=dict,
        description="settings of the schedule with transformers' names, such as {min_lr_rate: 0.1}",
    )
    warmup_ratio: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        0.03, description="warm-up as a share of all steps"
    )
    warmup_steps: CountOrZero | None = Field(None, description="warm-up in steps, instead of warmup_ratio")
    optimizer: OptimizerName = Field(
        "adamw",
        description="AdamW with 32-bit or 8-bit state, paged or not; adafactor: factored second moments, at the "
        "schedule's rate; lion: the sign of a momentum; muon: orthogonalised momentum for matrices, at the scale of "
        "AdamW's updates, and AdamW for vectors, embeddings and heads",
    )
    weight_decay: NotNegative = Field(0.0, description="weight decay; not applied to biases, norms and scaling vectors")
    max_grad_norm: Positive | None = Field(
        1.0, description="clip the gradient of a step to this norm; null: no clipping"
    )
    epochs: Positive | None = Field(1.0, description="passes over the training rows")
    max_steps: Count | None = Field(None, description="optimizer steps, instead of epochs")
    max_minutes: Annotated[Number, Field(gt=0, le=MOST_MINUTES)] | None = Field(
        None,
        description="the time limit of one start of the command, from the start of the process to the end of the "
        "export; the run then ends with a result, and --resume continues it for as long again; the schedule stays that "
        "of epochs or max_steps; null: no limit",
    )
    micro_batch_size: Count | None = Field(
        2, description="number of rows (or packed rows) in one forward pass; affects only memory and speed"
    )
    micro_batch_tokens: Count | None = Field(
        None, description="maximum number of tokens, with padding, in one forward pass; instead of micro_batch_size"
    )
    gradient_accumulation_steps: Count = Field(
        8, description="number of micro-batches in one step, shared among the ranks"
    )
    rank_speeds: Annotated[Several[Positive], Field(min_length=1)] | None = Field(
        None,
        description="the relative speed of each rank, such as [2, 1]: faster ranks get more micro-batches of a step; "
        "null: all ranks get equally many",
    )
    head_learning_rate: NotNegative | None = Field(
        None,
        description="the learning rate of the head that the objective trains (classification, tags, regression, "
        "reward), with the schedule of learning_rate; null: learning_rate",
    )
    loraplus_ratio: Positive | None = Field(None, description="LoRA+: learning rate of B divided by the rate of A")
    router_loss: RouterLossSetting = Field(
        "auto",
        description="mixtures of experts: the weight of transformers' router loss (load balancing), which is added to "
        "the loss of each micro-batch and logged apart; auto: router_aux_loss_coef of the base's config.json, if its "
        "output_router_logits is true; off: none; evaluations leave it out",
    )
    kernels: Literal["auto", "none", "liger"] = Field(
        "auto",
        description="auto: C kernels for norms, SwiGLU and attention, in bfloat16 on a CPU with a C compiler; liger: "
        "liger-kernel's norms and SwiGLU, on a GPU with liger-kernel installed",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: use kernels with a fixed order of sums, so that a resumed run is equal bit for bit",
    )
    threads: Threads | None = Field(
        None,
        description="number of threads of a run on a CPU; null: OMP_NUM_THREADS, or one thread per core that the "
        "process can use; adaptive: fewer threads, from the next step on, while other programs use the cores",
    )
    seed: Seed = Field(0, description="seed of every random draw")
    save_steps: Count = Field(100, description="steps between checkpoints")
    keep_checkpoints: Count = Field(2, description="number of newest checkpoints to keep, in addition to the best one")
    eval_steps: Count = Field(100, description="steps between evaluations")

    @property
    def limit_seconds(self) -> float | None:
        """max_minutes in seconds."""
        return None if self.max_minutes is None else 60 * self.max_minutes

    @model_validator(mode="after")
    def _settings_of_its_scheduler(self) -> TrainingSection:
        known, written = SCHEDULERS[self.scheduler], self.scheduler_settings
        for name, value in written.items():
            if name not in known:
                mine = ", ".join(known) or "none"
                raise ValueError(f"scheduler_settings has '{name}'; the settings of {self.scheduler} are: {mine}")
            if problem := _problem_of(name, value, self.learning_rate):
                raise ValueError(f"scheduler_settings has {name}: {value}, which {problem}")
        if {"min_lr", "min_lr_rate"} <= written.keys():
            raise ValueError("scheduler_settings has min_lr and min_lr_rate, which set the same value; keep one")
        return self
