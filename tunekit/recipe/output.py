"""`output:` the run folder and the trackers."""

from typing import Literal

from pydantic import Field

from tunekit.recipe.bases.paths import NewPath
from tunekit.recipe.bases.section import Section, Several

Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "aim", "comet_ml", "clearml", "dvclive", "swanlab"
]  # names from accelerate


class OutputSection(Section):
    """The run folder, and trackers in addition to metrics.jsonl."""

    free_keys = ("dir", "report_to")

    dir: NewPath = Field(description="the run folder")
    report_to: Several[Tracker] = Field((), description="experiment trackers, in addition to metrics.jsonl")
