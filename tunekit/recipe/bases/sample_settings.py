"""Settings shared by the objectives that train on the model's samples: sampling and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tunekit.basics import Headline, Panel, Shows, Stall
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

KINDS = ("function", "regex", "exact_match", "model")
REWARDED = ("reward", "completions_mean_length", "completions_clipped_ratio")  # sums of an evaluation
ANSWERS = (("prompt", "prompt"), ("reference answer", "answer"), ("completion", "completion"), ("ended", "ended"))
SCORES = (("reward", "rewards"), ("advantage", "advantage"))
SILENT_STEPS = 20  # consecutive steps without any reward that end a run with an error
SHOWS = Shows(
    unit="completion",
    headline=Headline("reward", "Mean reward of the model's samples", rises=True),
    panels=(Panel("Completions used for training", "samples", (*ANSWERS, *SCORES)),),
    stalled=(
        Stall(
            "frac_reward_zero_std",
            20,
            "for every prompt, all completions got the same reward or no reward",
            "training continues, but the model learns nothing from these steps; check the rewards (`tunekit reward "
            "check`) and the prompts (too easy, too hard), or raise objective.num_generations or objective.temperature",
        ),
        Stall(
            "frac_reward_none",
            1,
            "no completion of the step has a reward: every reward was None or NaN",
            f"the model learns nothing from this step, and {SILENT_STEPS} consecutive such steps end the run; repair "
            "the reward, or leave out rows that the reward cannot judge",
        ),
        Stall(
            "completions_clipped_ratio",
            5,
            "every completion reached max_completion_length before it ended",
            "training continues; raise objective.max_completion_length, or start from a model that ends its answers",
        ),
    ),
)


class RewardSource(Section):
    """One reward, and its weight in the sum of all rewards."""

    function: CodePath | None = Field(
        None,
        description="FILE.py:NAME, called as in TRL: NAME(prompts, completions, completion_ids, **columns) -> numbers; "
        "the function gets only the arguments that its signature has",
    )
    allow_code: bool = Field(
        False,
        description="allow tunekit to run the function's file, or the code of the reward model's base; the code runs "
        "with all your permissions",
    )
    regex: Expression | None = Field(
        None, description="a regular expression; the reward is 1 if it matches anywhere in the completion, else 0"
    )
    exact_match: Text | None = Field(
        None,
        description="a column; the reward is 1 if the completion equals the row's text in this column (without "
        "spaces at the ends), else 0. The column `answer` is the reference answer",
    )
    extract: Expression | None = Field(
        None,
        description="with exact_match: a regular expression; only its first group is compared, not the whole "
        "completion",
    )
    model: FolderPath | None = Field(
        None, description="a reward model: the folder of a run with objective: reward, or its adapter folder"
    )
    weight: Number = Field(1.0, description="weight of this reward in the sum")
    limit_seconds: Positive | None = Field(
        None,
        description="for function, regex and extract: the time limit of one call for all completions of a step; null: "
        "120 s in training, 20 s in `tunekit reward check`",
    )

    @property
    def kind(self) -> str:
        """The kind of the reward, one of KINDS."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def code_file(self) -> Path:
        """The file of the function."""
        return Path(str(self.function).rpartition(":")[0])

    @property
    def function_name(self) -> str:
        """The name of the function."""
        return str(self.function).rpartition(":")[2]

    @model_validator(mode="after")
    def _one_kind(self) -> RewardSource:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            which = " and ".join(kinds) or "none"
            raise ValueError(f"must have exactly one of {', '.join(KINDS)}, but has {which}")
        if self.function is not None and not (self.function_name.isidentifier() and self.code_file.suffix == ".py"):
            raise ValueError("function must be FILE.py:NAME, such as rewards.py:score")
        if self.function is not None and not self.allow_code:
            raise ValueError("function needs allow_code: true, because tunekit runs its file; read the file first")
        if self.extract is not None and self.exact_match is None:
            raise ValueError("extract needs exact_match; remove it")
        if self.limit_seconds is not None and self.model is not None:
            raise ValueError("limit_seconds has no effect on a reward model; remove it")
        if self.allow_code and self.function is None and self.model is None:
            raise ValueError("allow_code needs function or model; remove it")
        return self


def _listed(value: object) -> object:
    return (value,) if isinstance(value, dict) else value


def _weighted(rewards: tuple[RewardSource, ...]) -> tuple[RewardSource, ...]:
    if rewards and not any(reward.weight for reward in rewards):
        raise ValueError("all weights are 0, so all rewards are equal; set at least one other weight")
    return rewards


RewardList = Annotated[Several[RewardSource], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_weighted)]


def reward_names(rewards: Sequence[RewardSource]) -> list[str]:
    """The names of the rewards in logs: the function's name, or the kind. Equal names are numbered."""
    plain = [each.function_name if each.kind == "function" else each.kind for each in rewards]
    return [name if plain.count(name) == 1 else f"{name}_{at + 1}" for at, name in enumerate(plain)]


def several(value: int) -> int:
    """Checks the number of completions of a prompt, and returns it. Raises: ValueError if it is below 2."""
    if value < 2:
        raise ValueError("must be at least 2 (each completion is compared with the others of its prompt)")
    return value


class SampleSettings(ObjectiveSettings):
    """Settings of objectives that train on samples. The names are TRL's. Each row is a prompt, for which the model
    writes a group of completions."""

    example = "prompt"
    shows = SHOWS
    sums = ("loss", "units", *REWARDED)
    samples = True
    needs_recipe = True
    required: ClassVar[Mapping[str, str]] = {
        "reward": "write reward: [{function: FILE.py:NAME, allow_code: true}]; or a reward with exact_match, regex "
        "or model"
    }
    default_learning_rate = PublishedRate(
        1e-5, "huggingface/trl 1.16, docs/source/peft_integration.md: ten times the rate of full fine-tuning"
    )

    reward: RewardList = Field(
        (), description="required: the reward of a completion; several rewards are added with their weights"
    )
    num_generations: Annotated[Whole, Field(le=10**6), AfterValidator(several)] = Field(
        8, description="number of completions of each prompt (its group)"
    )
    max_completion_length: Count = Field(256, description="the maximum number of tokens in a completion")
    temperature: Positive = Field(1.0, description="the temperature of sampling, also used for log-probabilities")
    top_p: Annotated[Number, Field(gt=0, le=1)] = Field(
        1.0, description="sample from the most likely tokens with this total probability"
    )
    top_k: CountOrZero = Field(0, description="sample from this many most likely tokens; 0: from all")
    num_iterations: Annotated[Whole, Field(ge=1, le=1000)] = Field(
        1,
        description="number of consecutive steps that use the same completions; with 1, all probability ratios are 1 "
        "and nothing is clipped",
    )
    sampling_batch_size: Count = Field(
        64, description="number of completions that are sampled together; affects only memory and speed"
    )
    epsilon: NotNegative = Field(0.2, description="probability ratios below 1 - epsilon are clipped")
    epsilon_high: NotNegative | None = Field(
        None, description="probability ratios above 1 + epsilon_high are clipped; null: the value of epsilon"
    )
    unusable_rows: Literal["error", "drop"] = Field(
        "error", description="for a row without a prompt. error: stop; drop: leave the row out"
    )
    mask_truncated_completions: bool = Field(
        False, description="exclude completions that reached the length limit from the loss"
    )
    beta: NotNegative = Field(
        0.0, description="weight of the KL divergence from the model at step 0; 0 needs no reference model"
    )

    @property
    def clip_high(self) -> float:
        """The maximum of a probability ratio, minus 1."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
