"""Multi-process initialisation: `jax.distributed` from the cluster's environment or from flags."""

import argparse
import contextlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Generator, Mapping, Sequence

import jax

from mla_moe.config import ConfigError, require

_FLAGS = ("coordinator", "processes", "process")
_USAGE = "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I"
_CLUSTERS = {
    "OMPI_COMM_WORLD_SIZE": ": mpirun of Open MPI 4 sets OMPI_MCA_orte_hnp_uri too, later versions do not",
    "SLURM_STEP_NODELIST": ": srun sets SLURM_JOB_ID, SLURM_NTASKS, SLURM_PROCID and SLURM_LOCALID too",
    "SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "", "SLURM_PROCID": "",
    "JOB_COMPLETION_INDEX": ": an Indexed Job needs the package kubernetes and a service account that may list pods",
    "PMI_SIZE": ": only Open MPI's processes are recognised",
    "WORLD_SIZE": ": torchrun's processes are not recognised",
    "MEGASCALE_COORDINATOR_ADDRESS": "", "TPU_WORKER_HOSTNAMES": "",
}  # fmt: skip
"""Variables that tell of a cluster, and what JAX needs besides."""
_HEARTBEAT_TIMEOUT = 100
"""Seconds without a heartbeat after which a process counts as lost; a busy host may miss heartbeats for a while."""


def initialize(arguments: Sequence[str]) -> list[str]:
    """Call `jax.distributed.initialize` if this is one of several processes. Returns the arguments that are left.

    `--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I` set the cluster explicitly.
    Without them Slurm, Open MPI, Kubernetes indexed jobs and TPU pods are recognised by their environment variables,
    and JAX reads the rest from there; a single process initialises nothing. A process without a heartbeat for
    `--distributed.timeout SECONDS` counts as lost, and all others exit. Raises `ConfigError` for incomplete flags, and
    with what was given or found where JAX cannot join the other processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in _FLAGS:
        parser.add_argument(f"--distributed.{flag}", type=str if flag == "coordinator" else int)
    parser.add_argument("--distributed.timeout", type=int, default=_HEARTBEAT_TIMEOUT)
    known, rest = parser.parse_known_args(arguments)
    values = vars(known)
    given = {flag: values[f"distributed.{flag}"] for flag in _FLAGS}
    explicit = any(value is not None for value in given.values())
    coordinator, processes, process = given.values()
    if explicit:
        for flag, value in given.items():
            if value is None:
                raise ConfigError(f"distributed.{flag}", None, "give all three of --distributed." + ", .".join(_FLAGS))
        fix = "must be HOST:PORT of the host that runs process 0"
        _, colon, port = coordinator.rpartition(":")
        require(bool(colon) and port.isdecimal() and int(port) < 1 << 16, "distributed.coordinator", coordinator, fix)
        require(1 <= processes < 1 << 20, "distributed.processes", processes, "must be between 1 and 1,048,575")
        require(0 <= process < processes, "distributed.process", process, f"must be one of 0 to {processes - 1}")
    if explicit or in_cluster(os.environ):
        timeout, problem = values["distributed.timeout"], "JAX cannot join the other processes"
        require(1 <= timeout < 1 << 31, "distributed.timeout", timeout, "must be a number of seconds, at least 1")
        seen = given if explicit else {name: os.environ[name] for name in _CLUSTERS if name in os.environ}
        if not explicit and (launcher := _unknown_launcher(os.environ)):
            raise ConfigError("distributed", seen, f"{problem}{_CLUSTERS[launcher]}; give {_USAGE}")
        if not explicit and "OMPI_COMM_WORLD_SIZE" not in os.environ and _slurm_tasks(os.environ) > 1:
            processes = _slurm_tasks(os.environ)
        try:
            with warnings.catch_warnings(action="ignore"):  # JAX warns of a missing package, then raises an error
                jax.distributed.initialize(
                    coordinator, processes, process,
                    local_device_ids=None if explicit else _slurm_devices(os.environ),
                    heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=timeout,
                )  # fmt: skip
        except Exception as error:  # of whatever type: a cluster's libraries raise their own
            problem = f"{problem} ({' '.join(str(error).split())})"
            if explicit:
                fix = "check that all processes have the same coordinator and count, and can reach it"
            else:
                problem += next((hint for name, hint in _CLUSTERS.items() if hint and name in seen), "")
                fix = f"correct that, or give {_USAGE}"
            raise ConfigError("distributed", seen, f"{problem}; {fix}") from None
    return rest


@contextlib.contextmanager
def exit_on_error() -> Generator[None]:
    """Inside it an error in one of several processes ends that process at once, without an orderly shutdown: shutdown
    waits for the other processes, which wait for this one in a collective. They exit when its heartbeats stop."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, ConfigError | jax.errors.JaxRuntimeError):
            traceback.print_exc()
        process = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"error in {process}: {error}", file=sys.stderr)
        fix = "read its output; the same command in all processes resumes from the newest checkpoint"
        print(f"If another process is the cause, {fix}.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether these environment variables are those of one process among several."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return (
        _slurm_tasks(environment) > 1
        or _count(environment, "OMPI_COMM_WORLD_SIZE") > 1
        or _unknown_launcher(environment) is not None
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or len(hosts.split(",")) > 1
    )


def _unknown_launcher(environment: Mapping[str, str]) -> str | None:
    """The variable of a launcher of several processes that JAX does not know. Inside a Slurm step JAX would take the
    step's tasks for its processes, so unless they are as many, each would train alone or wait for ever."""
    if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return None
    names = ("PMI_SIZE", "WORLD_SIZE") if "RANK" in environment else ("PMI_SIZE",)
    known = (1, _slurm_tasks(environment))
    return next((name for name in names if _count(environment, name) not in known), None)


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Number of tasks of the step, which may have fewer than the job (JAX reads the job's); 1 outside a step."""
    if "SLURM_STEP_NODELIST" not in environment:
        return 1
    return _count(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of the host in a Slurm step of one task per host: JAX would give a task the one GPU of its number."""
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(_count(environment, "SLURM_GPUS_ON_NODE"))) if alone else None


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 1
