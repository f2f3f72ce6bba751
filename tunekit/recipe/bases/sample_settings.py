"""What the objectives that learn from the model's own samples have in common: how they are drawn, and their reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tunekit.recipe.bases.paths import CodePath, FolderPath
from tunekit.recipe.bases.section import (
    Count,
    CountOrZero,
    Expression,
    NotNegative,
    Number,
    ObjectiveSettings,
    Positive,
    PublishedRate,
    Section,
    Several,
    Text,
    Whole,
)
from tunekit.records import Headline, Panel, Shows, Stall

KINDS = ("function", "regex", "exact_match", "model")
REWARDED = ("reward", "completions_mean_length", "completions_clipped_ratio")  # what an evaluation sums up
ANSWERS = (("prompt", "prompt"), ("the row's answer", "answer"), ("completion", "completion"), ("ended", "ended"))
SCORES = (("reward", "rewards"), ("advantage", "advantage"))
SILENT_STEPS = 20  # in a row, without a single reward: an error
SHOWS = Shows(
    unit="completion",
    headline=Headline("reward", "Mean reward of what the model sampled", rises=True),
    panels=(Panel("Completions that the model learnt from", "samples", (*ANSWERS, *SCORES)),),
    stalled=(
        Stall(
            "frac_reward_zero_std",
            20,
            "all completions of each prompt had equal rewards or no rewards",
            "training goes on, but nothing is learnt of them; look at the rewards with `tunekit reward check`, at the "
            "prompts (too easy, too hard), or raise objective.num_generations or objective.temperature",
        ),
        Stall(
            "frac_reward_none",
            1,
            "no completion of the step has a reward: the reward returned None or NaN for each",
            f"nothing is learnt of this step, and {SILENT_STEPS} such steps in a row end the run; mend the reward, or "
            "leave rows out that it cannot judge",
        ),
        Stall(
            "completions_clipped_ratio",
            5,
            "every completion reached max_completion_length before it ended",
            "training goes on; raise objective.max_completion_length, or begin with a model that ends its answers",
        ),
    ),
)


class RewardSource(Section):
    """One of what gives completions their reward; its weight in their sum."""

    function: CodePath | None = Field(
        None,
        description="FILE.py:NAME, called as TRL does: NAME(prompts, completions, completion_ids, **columns) -> "
        "numbers; each argument only if the function takes it",
    )
    allow_code: bool = Field(False, description="of function: run the file; its code can do whatever you can")
    regex: Expression | None = Field(None, description="1 where the expression is found in the completion, else 0")
    exact_match: Text | None = Field(
        None,
        description="1 where the completion is this column's text, blanks at the ends aside; answer: the row's own",
    )
    extract: Expression | None = Field(
        None, description="of exact_match: the first group of this expression in the completion is compared"
    )
    model: FolderPath | None = Field(
        None, description="folder of a reward model: a run of objective: reward, or its adapter"
    )
    weight: Number = Field(1.0, description="of this reward in the sum of all")
    limit_seconds: Positive | None = Field(
        None,
        description="of function, regex and extract: how long one call may take, for all completions of a step; null: "
        "120 in training, 20 in `tunekit reward check`",
    )

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def code_file(self) -> Path:
        """The file of a function."""
        return Path(str(self.function).rpartition(":")[0])

    @property
    def function_name(self) -> str:
        """The name after the file."""
        return str(self.function).rpartition(":")[2]

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSource:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            which = " and ".join(given) or "none"
            raise ValueError(f"must have one of {', '.join(KINDS)}, and has {which}")
        if self.function is not None and not (self.function_name.isidentifier() and self.code_file.suffix == ".py"):
            raise ValueError("function must be FILE.py:NAME, such as rewards.py:score")
        if self.function is not None and not self.allow_code:
            raise ValueError("allow_code is false, and a function is code; read the file, then write allow_code: true")
        if self.extract is not None and self.exact_match is None:
            raise ValueError("extract is read by exact_match alone; remove it")
        if self.limit_seconds is not None and self.model is not None:
            raise ValueError("limit_seconds is not for a reward model; remove it")
        if self.allow_code and self.function is None:
            raise ValueError("allow_code is read by function alone; remove it")
        return self


def _listed(value: object) -> object:
    return (value,) if isinstance(value, dict) else value


def _weighted(rewards: tuple[RewardSource, ...]) -> tuple[RewardSource, ...]:
    if rewards and not any(reward.weight for reward in rewards):
        raise ValueError("every weight is 0, so that all rewards are equal; give one reward a weight")
    return rewards


RewardList = Annotated[Several[RewardSource], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_weighted)]


def reward_names(rewards: Sequence[RewardSource]) -> list[str]:
    """What each is called in what is logged: a function by its name, others by their kind; numbered where equal."""
    plain = [each.function_name if each.kind == "function" else each.kind for each in rewards]
    return [name if plain.count(name) == 1 else f"{name}_{at + 1}" for at, name in enumerate(plain)]


def several(value: int) -> int:
    """Refuse a group of one."""
    if value < 2:
        raise ValueError("must be at least 2: a completion is compared with the others of its prompt")
    return value


class SampleSettings(ObjectiveSettings):
    """TRL's names. Each row is a prompt, to which the model writes a group of completions."""

    example = "prompt"
    shows = SHOWS
    sums = ("loss", "units", *REWARDED)
    samples = True
    needs_recipe = True
    required: ClassVar[Mapping[str, str]] = {
        "reward": "write reward: [{function: FILE.py:NAME, allow_code: true}], or {exact_match: answer}, regex or model"
    }
    default_learning_rate = PublishedRate(
        1e-5, "huggingface/trl 1.16, docs/source/peft_integration.md: ten times that of full training"
    )

    reward: RewardList = Field(
        (), description="required: what gives a completion its reward; several are added up by their weights"
    )
    num_generations: Annotated[Whole, Field(le=10**6), AfterValidator(several)] = Field(
        8, description="completions of one prompt: its group"
    )
    max_completion_length: Count = Field(256, description="tokens of one completion, at most")
    temperature: Positive = Field(1.0, description="of sampling; log-probabilities are those at this temperature")
    top_p: Annotated[Number, Field(gt=0, le=1)] = Field(1.0, description="draw from the likeliest that sum to it")
    top_k: CountOrZero = Field(0, description="draw from the likeliest so many; 0: of all")
    num_iterations: Annotated[Whole, Field(ge=1, le=1000)] = Field(
        1, description="steps in a row that learn from the same completions; ratios and clipping matter from 2 on"
    )
    sampling_batch_size: Count = Field(
        64, description="completions that are sampled side by side; only memory and speed"
    )
    epsilon: NotNegative = Field(0.2, description="a ratio below 1 - epsilon is clipped")
    epsilon_high: NotNegative | None = Field(None, description="a ratio above 1 + epsilon_high is; null: as epsilon")
    unusable_rows: Literal["error", "drop"] = Field(
        "error", description="a row without a prompt: stop, or leave it out"
    )
    mask_truncated_completions: bool = Field(False, description="leave completions that did not end out of the loss")
    beta: NotNegative = Field(0.0, description="weight of the KL from the model at step 0; 0 needs no reference")

    @property
    def clip_high(self) -> float:
        """By how much more than 1 a ratio may be."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
