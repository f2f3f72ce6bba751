"""A Python script for Ray Train, whose workers are the processes of the run."""

from tunekit.errors import InputError, NumericsError
from tunekit.files.lock import WATCHING_SECONDS
from tunekit.planning.launch.job import LaunchJob

ENDING = ".ray.py"
RETRIES = 3
FINAL = (InputError.exit_code, NumericsError.exit_code)  # a further start would end in the same way
SCRIPT = '''\
"""Trains {name} with {count} workers of a Ray cluster. Each start continues from the newest checkpoint."""

import os
import sys
import time
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

FOLDER = {folder!r}  # all nodes see this folder
END = Path(FOLDER, ".{name}.ray.end")  # the exit code of a run that Ray must not start again


def train() -> None:
    if END.exists():
        return
    os.chdir(FOLDER)
    from tunekit.cli import main

    sys.argv = {words!r}
    try:
        main()
    except SystemExit as end:
        locked = bool(end.code) and is_locked()
        if end.code in {final!r} and not locked:
            END.write_text(str(end.code))
        elif end.code:
            time.sleep({wait} if locked else 0)
            raise RuntimeError(f"tunekit ended with exit code {{end.code}}") from None


def is_locked() -> bool:
    """Whether a process still holds the run's folder, such as a worker that Ray has lost."""
    from tunekit.errors import TunekitError
    from tunekit.files.lock import is_held
    from tunekit.recipe.load import load_recipe

    try:
        return is_held(Path(load_recipe({recipe!r}, {overrides!r}).recipe.output.dir))
    except TunekitError:
        return False


if __name__ == "__main__":
    END.unlink(missing_ok=True)
    TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers={count}, use_gpu={use_gpu}),
        run_config=RunConfig(name="{name}", failure_config=FailureConfig(max_failures={retries})),
    ).fit()
    if END.exists():
        code = int(END.read_text())
        END.unlink()
        sys.exit(code)
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
        final=FINAL,
        recipe=str(job.recipe),
        overrides=job.overrides,
        wait=WATCHING_SECONDS,
    )


def submit(job: LaunchJob, path: str) -> list[str]:
    """The command, on a node of the cluster."""
    return [f"start it on a node of the cluster: python {path}", *job.shared()]
