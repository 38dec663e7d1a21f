"""Slurm: a batch script with one task per host, which Slurm queues again until the run has ended."""

import shlex

from mla_moe.config import require
from mla_moe.launch.job import GPUS, RESTARTS, Hosts, Job


def batch_script(job: Job, hosts: Hosts) -> str:
    """The script for `sbatch`, submitted from the folder that has `.venv`. JAX reads the processes from the step's
    variables. Tasks get SIGTERM five minutes before the time limit, and save."""
    fix = f"is a TPU; slurm launches GPUs only: write {'|'.join(GPUS)}:HOSTSxGPUS, or use gke or tpu-vm"
    require(hosts.kind in GPUS, "topology", f"{hosts.kind}:{hosts.shape}", fix)
    return f"""\
#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={hosts.count}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={hosts.chips_per_host}
#SBATCH --exclusive
#SBATCH --output={job.name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300

srun --kill-on-bad-exit=1 {shlex.join([".venv/bin/mla-moe", *job.train])}
status=$?
# The job runs again, and resumes, after an error or a preemption; not after invalid input (2).
if [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {RESTARTS} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
