"""`sweep:` the values that `tunekit sweep` tries, each in a separate run."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunekit.recipe.bases.section import Count, Section, Several, Text
from tunekit.recipe.evaluation import check_best


class SweepSection(Section):
    """The values to try. Only `tunekit sweep` reads them; it trains one run per trial, in a folder below output.dir."""

    keys: dict[Text, Several[Any]] = Field(
        default_factory=dict, description="keys and their values, such as {training.learning_rate: [1e-4, 3e-4]}"
    )
    strategy: Literal["grid", "random", "halving"] = Field(
        "grid",
        description="grid: every combination of the values; random: some combinations, drawn at random; halving: all "
        "combinations start, and the worse half of the runs is stopped early, several times",
    )
    trials: Count | None = Field(
        None, description="number of combinations that the strategy random draws, with training.seed"
    )
    by: Annotated[str, BeforeValidator(check_best)] = Field(
        "eval.loss", description="compare the trials by this metric"
    )
    seeds: Count = Field(1, description="run every combination with this many seeds, starting with training.seed")
    folds: Annotated[Count, Field(ge=2)] | None = Field(
        None,
        description="cross-validation: divide the rows of data.train into this number of folds. Every combination runs "
        "once per fold: it trains on the other folds, and is evaluated on this fold instead of data.eval",
    )
    fold_group: Text | None = Field(
        None, description="a column of the rows (a speaker, a document): rows with equal values are in one fold"
    )
    leave_out: Literal["source"] | None = Field(
        None, description="source: for each source of data.train, also run every combination without this source"
    )

    @property
    def has_trials(self) -> bool:
        """Whether the section makes more than one run."""
        return bool(self.keys) or self.seeds > 1 or self.folds is not None or self.leave_out is not None
