"""Plain data classes that several packages use: the plan and its parts, a step, an evaluation, the values of a report.

They contain only plain values and other records, so that `dataclasses.asdict` makes JSON of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tunekit.basics import DEFAULT_SHOWS as DEFAULT_SHOWS
from tunekit.basics import Headline as Headline
from tunekit.basics import JsonObject as JsonObject
from tunekit.basics import Panel as Panel
from tunekit.basics import Shows as Shows
from tunekit.basics import Stall as Stall
from tunekit.basics import bytes_text as bytes_text
from tunekit.basics import with_article as with_article


@dataclass(frozen=True)
class Refusal:
    """A reason why `train` would refuse the recipe.

    `key`: a key of the recipe; `line`: its line, None if the recipe does not contain the key. `message`: what is wrong
    and how to mend it. `file`: the recipe, another input, or `command line`. `exit_code`: 4 means too little memory.
    """

    key: str
    line: int | None
    message: str
    file: str | None = None
    exit_code: int = 2


@dataclass(frozen=True)
class Target:
    """An adapted module of the base. `kind`: linear, conv1d, embedding or parameter."""

    name: str
    kind: str
    in_features: int
    out_features: int
    trainable_parameters: int
    r: int | None = None
    alpha: float | None = None
    experts: int | None = None  # number of experts in a fused parameter (experts, out, in)
    has_bias: bool = False
    transposed: bool = False  # whether a fused parameter is stored as (experts, in, out)
    wrapped: int = 0  # how many further fused parameters of the same module are adapted


@dataclass(frozen=True)
class PeakBytes:
    """The predicted memory of each part at the peak, in bytes. `total`: the peak of the whole step, not the sum of the
    parts."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int
    total: int


@dataclass(frozen=True)
class RowCounts:
    """How many rows were read, trained on, dropped and truncated. `supervised_tokens`: tokens with a loss in one
    epoch."""

    read: int
    trained: int
    dropped: int
    truncated: int
    tokens: int
    supervised_tokens: int
    longest_tokens: int
    estimated: bool = False
    dropped_reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """The properties of the base model, after every `auto` has been resolved."""

    name_or_path: str
    revision: str | None
    family: str
    model_type: str
    dtype: str
    quantization: str
    double_quantization: bool
    attention: str
    total_parameters: int
    layers: int
    hidden_size: int
    fingerprint: str | None


@dataclass(frozen=True)
class TextFacts:
    """Limits of a model that reads or writes text. The number of positions is None if the model does not state it."""

    vocabulary_size: int
    positions: int | None


@dataclass(frozen=True)
class ExecutionSettings:
    """The settings that plan chose for computing a step. `micro_batch_size`: rows per micro-batch; None if tokens limit
    micro-batches.

    `streaming`: where the base's weights are stored: off (on the device), host, disk, or ranks (each rank stores one of
    `shares` equal shares). `pass_micro_batches`: how many
    micro-batches use a streamed layer before the next layer is copied. `streamed_head`: whether the output projection
    is streamed too. `threads`: the number of threads at the start; None in the plan of an older version.
    `sampling_batch_size`: how many completions are sampled together; 0 if none are sampled.
    """

    micro_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    logits_chunk_tokens: int = 0  # 0: chosen by the size of the vocabulary
    checkpointed_layers: int = 0
    streaming: str = "off"
    streamed_head: bool = False
    pass_micro_batches: int = 1
    activation_offload: str | bool = "auto"
    mlp_tile_tokens: int | None = None
    kernels: str = "none"
    threads: int | None = None
    sampling_batch_size: int = 0
    shares: int = 1

    @property
    def common(self) -> tuple[object, ...]:
        """The settings that must be the same on all ranks, and that all ranks of a resumed run take from its plan."""
        micro_batches = self.micro_batch_size, self.gradient_accumulation_steps
        return (*micro_batches, self.kernels, self.sampling_batch_size)


@dataclass(frozen=True)
class PlannedRows:
    """The numbers of training rows, evaluation rows, and micro-batches and steps per epoch (None for a stream)."""

    training: RowCounts
    evaluation: RowCounts | None
    packing: bool
    packing_reason: str
    micro_batches_per_epoch: int | None
    steps_per_epoch: int | None


@dataclass(frozen=True)
class Plan:
    """All decisions that are made before weights are loaded. It is saved as plan.json, and train follows it."""

    tunekit_version: str
    recipe: dict[str, dict[str, object]]
    model: ModelFacts
    text: TextFacts | None  # None if the family has no text
    device: str
    targets: list[Target]
    trainable_parameters: int
    total_parameters: int
    steps: int
    warmup_steps: int
    supervised_tokens: int
    rows: PlannedRows
    choice: ExecutionSettings
    peak_bytes: PeakBytes
    refusals: list[Refusal]
    notes: list[str] = field(default_factory=list)
    budget_bytes: int | None = None
    tries_longest_batch: bool = False  # whether train tries the longest micro-batch before step 1
    trial_reason: str = ""

    @property
    def objective(self) -> str:
        """The name of the recipe's objective."""
        return str(self.recipe.get("objective", {}).get("method", "sft"))


@dataclass(frozen=True)
class Preparation:
    """The results of preparing a step. `metrics`: numbers to log, over all ranks; `seconds`: time by part; `samples`:
    completions of the model."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, object]] = ()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as in metrics.jsonl. `loss`: the mean over the units of this step, not smoothed."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    metrics: dict[str, float] = field(default_factory=dict)  # the objective's other numbers, as means over the step
    samples: list[Mapping[str, object]] | None = None  # completions of the model; only some steps have them
    threads: int | None = None  # threads that computed the step; only where training.threads is adaptive


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation. `metrics`: numbers by name, always with `loss`; `classes`: counts of each label; `samples`:
    generated answers to the first rows, as {prompt, reference, answer}; `sources`: the metrics and number of `rows` of
    each source, if there are several; `search`: the metrics of each ranking of documents, if documents are searched."""

    step: int
    metrics: dict[str, float]
    classes: Mapping[str, object] | None = None
    samples: list[dict[str, str]] | None = None
    sources: dict[str, dict[str, float]] | None = None
    search: dict[str, dict[str, float]] | None = None


@dataclass(frozen=True)
class Reaction:
    """An event in training and train's reaction to it. `probe`: the event or measurement; `action`: the reaction;
    `step`: 0 means before the first step."""

    probe: str
    action: str
    step: int


@dataclass(frozen=True)
class ReportFacts:
    """The content of report.json. A value that was not measured is None, and is left out of the file."""

    peak_requested_bytes: int | None
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_host_bytes: int | None
    tokens_per_second: float | None
    supervised_tokens_per_second: float | None
    seconds: dict[str, float]
    rows: dict[str, int]
    tokens: int
    supervised_tokens: int
    predicted_bytes: dict[str, int]
    measured_bytes: dict[str, int]
    adapter_bytes: int | None
    base_bytes: int | None
    trainable_parameters: int
    best_step: int | None
    final_step: int
    first_loss: float | None  # means over the first and the last tenth of the steps
    final_loss: float | None
    base_eval_loss: float | None  # before training
    eval_loss: float | None  # of the exported weights
    verdict: str | None  # a sentence, if a loss rose, or if the training loss ended with a spike
    evaluations: list[dict[str, object]]
    reactions: list[Reaction]
    skipped_steps: int | None = None  # steps whose gradients overflowed in float16
    calibration: Mapping[str, object] | None = None
    budget_bytes: int | None = None
    # first_NAME and final_NAME, if the headline is not the loss
    headline: Mapping[str, float] = field(default_factory=dict)
    classes: Mapping[str, object] | None = None  # counts of each label, with the exported weights
    # each start of the command: its first and last step, and its minutes (up to the last checkpoint if it was killed)
    starts: Sequence[Mapping[str, float]] = ()
    baselines: Mapping[str, object] | None = None  # scores of plain baselines on the evaluation rows
    base_bytes_of_rank: int | None = None  # the part of a sharded base that each rank stores


def calibration_text(facts: Mapping[str, object]) -> str:
    """A sentence about the data that an adapter's initialisation read before step 1: micro-batches, passes and time."""
    backward = f" and {facts['backward_passes']:,} backward" if facts["backward_passes"] else ""
    return (
        f"the initialisation {facts['start']} looked at {facts['micro_batches']:,} micro-batches "
        f"({facts['tokens']:,} tokens) before step 1: {facts['forward_passes']:,} forward{backward} passes "
        f"in {facts['seconds']:.1f} s"
    )


def skipped_text(steps: int) -> str:
    """A sentence about the steps that changed no weight."""
    return f"{steps:,} steps changed no weight: their gradients overflowed in float16"


def short_name(name: str) -> str:
    """The name of a module within its layer, such as q_proj. For an item of a list, the list's name is included:
    to_out.0."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
