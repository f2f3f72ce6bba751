"""A task file of SkyPilot. It copies the working folder to the nodes, and repeats the command after a node is lost."""

import json

from tunekit.errors import RecipeError
from tunekit.planning.launch.job import PORT, WAIT, WAIT_SECONDS, LaunchJob

ENDING = ".skypilot.yaml"
TASK = """\
# SkyPilot copies `workdir` to each node. A lost node loses its checkpoints unless the run folder is in a bucket. Add
# file_mounts: {{/runs: {{source: s3://YOUR_BUCKET, mode: MOUNT}}}} here, and output.dir=/runs/{name} to the recipe.
# TUNEKIT_URL: a repository and a commit, so that a node that joins later gets the same version.
name: {name}
num_nodes: {nodes}
workdir: {folder}
envs:
  TUNEKIT_URL: null
  {wait}: "{seconds}"
setup: |
  pip install "tunekit @ git+$TUNEKIT_URL"
run: |
  torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" --nproc-per-node {processes} \\
    --master-addr "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --master-port {port} \\
    {command}
"""


def text(job: LaunchJob) -> str:
    """The task. JSON's text is YAML's too, without escapes of characters.

    Raises: RecipeError for paths that the nodes lack, because their copy of the working folder is in another place.
    """
    if job.problems_of_a_copy:
        raise RecipeError.of(job.problems_of_a_copy)
    return TASK.format(
        name=job.name,
        nodes=job.nodes,
        folder=json.dumps(str(job.folder), ensure_ascii=False),
        processes=job.processes,
        port=PORT,
        wait=WAIT,
        seconds=WAIT_SECONDS,
        command=job.command,
    )


def submit(job: LaunchJob, path: str) -> list[str]:
    """The command, in which the user names the kind of GPU."""
    wanted = "--cpus 4+" if job.on_cpu else f"--gpus L4:{job.processes}"
    return [
        f"submit it: sky jobs launch {wanted} --env TUNEKIT_URL=ADDRESS_OF_THE_REPOSITORY@COMMIT {path}",
        *job.copied(),
    ]
