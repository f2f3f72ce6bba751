"""A batch script of SLURM. srun starts the processes itself, so that signals and exit codes reach tunekit and SLURM."""

import shlex

from tunekit.planning.launch.job import LaunchJob

ENDING = ".slurm.sh"
GRACE_SECONDS = 120  # for the checkpoint before the time limit
REQUEUED = 138  # 128 + SIGUSR1
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={processes}
{gpus}#SBATCH --signal=USR1@{grace}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
# SLURM sends USR1 {grace} seconds before the time limit. tunekit then saves a checkpoint and ends with exit code
# {code}, and the job is queued again. Each start continues from the newest checkpoint.
{cd}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
srun --kill-on-bad-exit=0 bash -c \\
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' tunekit \\
    {python} {command}
code=$?
if [ $code -eq {code} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def text(job: LaunchJob) -> str:
    """The script. All nodes see the working folder and the interpreter under the same paths, as usual on clusters."""
    return SCRIPT.format(
        name=job.name,
        nodes=job.nodes,
        processes=job.processes,
        gpus="" if job.on_cpu else f"#SBATCH --gpus-per-node={job.processes}\n",
        grace=GRACE_SECONDS,
        code=REQUEUED,
        cd=job.cd,
        python=shlex.quote(job.python),
        command=job.command,
    )


def submit(job: LaunchJob, path: str) -> list[str]:
    """The command, to which the user adds what the cluster requires."""
    how = "add --partition and --account if your cluster requires them"
    return [f"submit it: sbatch --time=4:00:00 {path}", how, *job.shared(with_python=True)]
