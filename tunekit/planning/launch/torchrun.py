"""A shell script that starts torchrun, on one machine or on each node of several."""

import shlex

from tunekit.planning.launch.job import PORT, WAIT, WAIT_SECONDS, LaunchJob

ENDING = ".torchrun.sh"
SCRIPT = """\
#!/bin/sh
# Trains {recipe} with {count} on {where}. Start it again after a stop: the run continues from its newest
# checkpoint.
{check}{cd}
# Seconds that torchrun waits for the checkpoint after Ctrl-C or SIGTERM. A second Ctrl-C ends the run at once.
export {wait}="${{{wait}:-{seconds}}}"
exec {python} -m torch.distributed.run {group} --nproc-per-node {processes} {command}
"""


def text(job: LaunchJob) -> str:
    """The script. On several nodes it reads HEAD, the host name of the first node."""
    several = job.nodes > 1
    group = f'--nnodes {job.nodes} --rdzv-backend c10d --rdzv-id {job.name} --rdzv-endpoint "$HEAD:${{PORT:-{PORT}}}"'
    return SCRIPT.format(
        recipe=job.recipe,
        processes=job.processes,
        count="1 process" if job.processes == 1 else f"{job.processes} processes",
        where=f"each of {job.nodes} nodes" if several else "one machine",
        check=': "${HEAD:?set HEAD to the host name of the first node}"\n' if several else "",
        cd=job.cd,
        wait=WAIT,
        seconds=WAIT_SECONDS,
        python=shlex.quote(job.python),
        group=group if several else "--standalone",
        command=job.command,
    )


def submit(job: LaunchJob, path: str) -> list[str]:
    """The command; on several nodes, the command of each node."""
    if job.nodes == 1:
        return [f"start it: sh {path}"]
    return [
        f"start it on each of the {job.nodes} nodes: HEAD=NAME_OF_THE_FIRST_NODE sh {path}",
        *job.shared(with_python=True),
    ]
