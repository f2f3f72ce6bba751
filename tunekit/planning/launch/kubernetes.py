"""A TrainJob of Kubeflow Trainer 2.2 and newer, which starts torchrun in the pods."""

import json
import shlex

from tunekit.planning.launch.job import WAIT, WAIT_SECONDS, LaunchJob

ENDING = ".kubernetes.yaml"
JOB = """\
# IMAGE: an image that contains tunekit. CLAIM: a volume claim that all pods can write; it is mounted at the recipe's
# folder, so that it has the recipe, the data and the run. Kubernetes kills a stopped pod after 30 seconds; a runtime
# with terminationGracePeriodSeconds: {seconds} leaves time for a checkpoint.
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: IMAGE
    command: [sh, -c, {command}]
    numNodes: {nodes}
    numProcPerNode: {processes}
{gpus}  runtimePatches:
    - manager: tunekit.launch/volume
      trainingRuntimeSpec:
        template:
          spec:
            replicatedJobs:
              - name: node
                template:
                  spec:
                    template:
                      spec:
                        volumes:
                          - name: work
                            persistentVolumeClaim:
                              claimName: CLAIM
                        containers:
                          - name: node
                            volumeMounts:
                              - name: work
                                mountPath: {folder}
"""
GPUS = """\
    resourcesPerNode:
      limits:
        nvidia.com/gpu: {processes}
"""


def text(job: LaunchJob) -> str:
    """The job. torchrun reads its settings from the variables PET_*, which Kubeflow sets."""
    command = f"cd {shlex.quote(str(job.folder))} && exec env {WAIT}={WAIT_SECONDS} torchrun {job.command}"
    return JOB.format(
        name=job.name,
        nodes=job.nodes,
        processes=job.processes,
        gpus="" if job.on_cpu else GPUS.format(processes=job.processes),
        folder=json.dumps(str(job.folder), ensure_ascii=False),
        seconds=WAIT_SECONDS,
        command=json.dumps(command, ensure_ascii=False),
    )


def submit(job: LaunchJob, path: str) -> list[str]:
    """The command, in which the user names an image and a volume claim."""
    image, claim = r"s#^\( *image:\) IMAGE$#\1 YOUR/IMAGE:1#", r"s#^\( *claimName:\) CLAIM$#\1 YOUR-CLAIM#"
    return [f"submit it: sed -e '{image}' -e '{claim}' {path} | kubectl apply -f -", *job.copied()]
