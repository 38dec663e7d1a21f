"""Kubernetes, as on GKE: a JobSet with one Job per TPU slice, or one for all hosts with GPUs."""

import json
import shlex

from mla_moe.config import require
from mla_moe.launch.job import COORDINATOR_PORT, GPUS, RESTARTS, TPUS, Hosts, Job

_ONE_SLICE_PER_NODE_POOL = """
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"""


def job_set(job: Job, hosts: Hosts, image: str) -> str:
    """The JobSet (jobset.x-k8s.io/v1alpha2), as YAML.

    The JobSet's controller creates the headless service by which hosts find each other, and recreates all Jobs when one
    fails, so that the run resumes; not for invalid input. GKE tells TPU hosts of each other in environment variables
    that JAX reads; hosts with GPUs get the coordinator's name, and their number from the index of the Job.
    """
    fix = "name the container image that has mla_moe, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/mla_moe"
    require(image != "", "image", image, fix)
    command, annotations = shlex.join(["mla-moe", *job.train]), ""
    if hosts.kind in TPUS:
        selector = {"gke-tpu-accelerator": TPUS[hosts.kind].gke, "gke-tpu-topology": hosts.shape}
        resource = "google.com/tpu"
        annotations = _ONE_SLICE_PER_NODE_POOL
    else:
        selector, resource = {"gke-accelerator": GPUS[hosts.kind]}, "nvidia.com/gpu"
        # Also for one host: an Indexed Job without them is several processes for `parallel.distributed`.
        process = f'--distributed.processes {hosts.count} --distributed.process "$JOB_COMPLETION_INDEX"'
        command += f' --distributed.coordinator "$COORDINATOR" {process}'
    # In `command` Kubernetes replaces $(NAME), and $$ by $: all of it is for the shell.
    labels = "\n".join(f'                cloud.google.com/{key}: "{value}"' for key, value in selector.items())
    return f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {job.name}{annotations}
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: {RESTARTS}
    rules:
      - name: invalid-input
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: hosts
      replicas: {hosts.slices}
      template:
        spec:
          completionMode: Indexed
          completions: {hosts.per_slice}
          parallelism: {hosts.per_slice}
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300  # SIGTERM saves a checkpoint
              nodeSelector:
{labels}
              containers:
                - name: train
                  image: {json.dumps(image)}
                  command: [bash, -c, {json.dumps("exec " + command.replace("$", "$$"))}]
                  env:
                    - name: COORDINATOR
                      value: "{job.name}-hosts-0-0.{job.name}:{COORDINATOR_PORT}"
                  ports:
                    - containerPort: {COORDINATOR_PORT}
                  resources:
                    limits:
                      {resource}: {hosts.chips_per_host}
"""
