"""A Python script for Ray Train, whose workers are the processes of the run."""

from tunekit.planning.launch.job import LaunchJob

ENDING = ".ray.py"
RETRIES = 3
SCRIPT = '''\
"""Trains {name} with {count} workers of a Ray cluster. Each start continues from the newest checkpoint."""

import os
import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train() -> None:
    os.chdir({folder!r})  # all nodes see this folder
    from tunekit.cli import main

    sys.argv = {words!r}
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"tunekit ended with exit code {{end.code}}") from None


if __name__ == "__main__":
    TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers={count}, use_gpu={use_gpu}),
        run_config=RunConfig(name="{name}", failure_config=FailureConfig(max_failures={retries})),
    ).fit()
'''


def text(job: LaunchJob) -> str:
    """The script. Ray sets the variables of torchrun in each worker."""
    return SCRIPT.format(
        count=job.nodes * job.processes,
        folder=str(job.folder),
        words=["tunekit", *job.words],
        use_gpu=not job.on_cpu,
        name=job.name,
        retries=RETRIES,
    )


def submit(job: LaunchJob, path: str) -> list[str]:
    """The command, on a node of the cluster."""
    return [f"start it on a node of the cluster: python {path}", *job.shared()]
