"""Plain records that pass between folders: what an objective shows, the plan and its parts, a step, an evaluation, the
facts of a report.

Frozen dataclasses of plain values (str, int, float, bool, None, lists and dicts of those) and of each other, so that
every record can be written as JSON by `dataclasses.asdict`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

JsonObject = dict[str, Any]  # plain values by name, as JSON and YAML have them


@dataclass(frozen=True)
class Headline:
    """The number of each step that progress, the first chart and the report show; `rises`: when training goes well."""

    name: str = "loss"
    title: str = "Training loss"
    rises: bool = False


@dataclass(frozen=True)
class Panel:
    """A table of the report: the examples that some step records hold under `key`.

    `columns`: label and key of each column; a value that is a mapping has one column per name.
    """

    title: str
    key: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stall:
    """A logged share that is 1 in `steps` steps in a row when nothing is learned: its meaning, and what to do."""

    metric: str
    steps: int
    meaning: str
    action: str


@dataclass(frozen=True)
class Shows:
    """What progress, report and preview show about an objective."""

    unit: str = "supervised token"  # what its loss sums over
    size_unit: str = "token"  # what the sizes of its rows count
    headline: Headline = Headline()
    draws: str = ""  # if its model draws pictures: the key of their prompts in the objective's section
    panels: tuple[Panel, ...] = ()
    stalled: tuple[Stall, ...] = ()

    @property
    def units(self) -> str:
        """supervised tokens, pairs, labels."""
        return f"{self.unit}s"

    @property
    def sizes(self) -> str:
        """tokens, frames, pixels."""
        return f"{self.size_unit}s"


DEFAULT_SHOWS = Shows()


@dataclass(frozen=True)
class Refusal:
    """Why `train` would refuse: the recipe key, its line (None if not written), the message with its mend, the
    file of that line (the recipe, another input, or `command line`), and the exit code (4: too little memory)."""

    key: str
    line: int | None
    message: str
    file: str | None = None
    exit_code: int = 2


@dataclass(frozen=True)
class Target:
    """One adapted module of the base: `kind` is linear, conv1d, embedding or parameter."""

    name: str
    kind: str
    in_features: int
    out_features: int
    trainable_parameters: int
    r: int | None = None
    alpha: float | None = None
    experts: int | None = None  # of a fused 3-D parameter (experts, out, in)
    has_bias: bool = False
    transposed: bool = False  # of a fused parameter: stored as (experts, in, out)
    wrapped: int = 0  # of a fused parameter: how many adapted ones of the same module come after it


@dataclass(frozen=True)
class PeakBytes:
    """Predicted peak memory in bytes, by part; `total` is the peak of the whole step, not of each part alone."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int
    total: int


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of the sources; supervised tokens are loss tokens of one epoch."""

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
    """What the base is, resolved: never `auto`."""

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
    """Limits of a model that reads or writes text. The number of positions is None if the model declares none."""

    vocabulary_size: int
    positions: int | None


@dataclass(frozen=True)
class Choice:
    """How the run computes what the recipe asks for. `micro_batch_size` None: micro-batches are cut by tokens.

    `streaming`: where base weights wait: off (on the device), host, disk. `pass_micro_batches`: how many then pass a
    layer before the next. `streamed_head`: the output projection waits there too.
    """

    micro_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    logits_chunk_tokens: int = 0  # 0: as many as the vocabulary allows
    checkpointed_layers: int = 0
    streaming: str = "off"
    streamed_head: bool = False
    pass_micro_batches: int = 1
    activation_offload: str | bool = "auto"
    mlp_tile_tokens: int | None = None
    kernels: str = "none"
    compiled: bool = False


@dataclass(frozen=True)
class PlannedRows:
    """The rows that are trained on and evaluated, and how an epoch of them is cut; None where a stream has no end."""

    training: RowCounts
    evaluation: RowCounts | None
    packing: bool
    packing_reason: str
    micro_batches_per_epoch: int | None
    steps_per_epoch: int | None


@dataclass(frozen=True)
class Plan:
    """Everything decided before a weight is loaded; saved as plan.json and obeyed by train."""

    tunekit_version: str
    recipe: dict[str, dict[str, object]]
    model: ModelFacts
    text: TextFacts | None  # None: a family without text
    device: str
    targets: list[Target]
    trainable_parameters: int
    total_parameters: int
    steps: int
    warmup_steps: int
    supervised_tokens: int
    rows: PlannedRows
    choice: Choice
    peak_bytes: PeakBytes
    refusals: list[Refusal]
    notes: list[str] = field(default_factory=list)
    budget_bytes: int | None = None
    tries_longest_batch: bool = False  # before step 1
    trial_reason: str = ""

    @property
    def objective(self) -> str:
        """The name of the recipe's objective."""
        return str(self.recipe.get("objective", {}).get("method", "sft"))


@dataclass(frozen=True)
class Preparation:
    """Results of preparing a step: numbers to log, over all ranks; seconds by part; samples of the model."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, object]] = ()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as metrics.jsonl holds it; `loss` is the step's own token-weighted mean, unsmoothed."""

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
    metrics: dict[str, float] = field(default_factory=dict)  # means over the step of what its objective logs
    samples: list[Mapping[str, object]] | None = None  # of the model's completions, of some steps


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation: metrics by name (`loss` always), at a step; counts of each label where rows have some; where
    answers are generated, those to the first rows as {prompt, reference, answer}; of several sources the metrics of
    each one's rows, and how many `rows` it has."""

    step: int
    metrics: dict[str, float]
    classes: Mapping[str, object] | None = None
    samples: list[dict[str, str]] | None = None
    sources: dict[str, dict[str, float]] | None = None


@dataclass(frozen=True)
class Reaction:
    """What acted as plan announced: what was found and what was done, at which step (0 before the first)."""

    probe: str
    action: str
    step: int


@dataclass(frozen=True)
class ReportFacts:
    """What report.json holds; a value that was not measured is None and is left out of the file."""

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
    verdict: str | None  # in words: that the second is larger, or that the training loss rose or ended on a spike
    evaluations: list[dict[str, object]]
    reactions: list[Reaction]
    skipped_steps: int | None = None  # whose gradients overflowed in float16
    calibration: Mapping[str, object] | None = None
    budget_bytes: int | None = None
    headline: Mapping[str, float] = field(default_factory=dict)  # first_NAME and final_NAME, if it is not the loss
    classes: Mapping[str, object] | None = None  # of each label what the exported weights made of it


def calibration_text(facts: Mapping[str, object]) -> str:
    """What the pass over the data before step 1 was and cost, in a sentence."""
    backward = f" and {facts['backward_passes']:,} backward" if facts["backward_passes"] else ""
    return (
        f"start: {facts['start']} looked at {facts['micro_batches']:,} micro-batches ({facts['tokens']:,} tokens) "
        f"before step 1: {facts['forward_passes']:,} forward{backward} passes in {facts['seconds']:.1f} s"
    )


def skipped_text(steps: int) -> str:
    """That steps changed nothing, in a sentence."""
    return f"{steps:,} steps changed no weight: their gradients overflowed in float16"


def short_name(name: str) -> str:
    """What a module is called in its layer; of one in a list the number alone says nothing: to_out.0."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def bytes_text(count: float) -> str:
    """A number of bytes as a person reads it: 1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
