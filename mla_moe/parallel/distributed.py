"""Multi-process initialisation: `jax.distributed` from the cluster's environment or from flags."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Generator, Mapping, Sequence

import jax

from mla_moe.config import ConfigError, require

_FLAGS = ("coordinator", "processes", "process")
_HEARTBEAT_TIMEOUT = 100
"""Seconds without a heartbeat after which a process counts as lost; a busy host may miss heartbeats for a while."""


def initialize(arguments: Sequence[str]) -> list[str]:
    """Call `jax.distributed.initialize` if this is one of several processes. Returns the arguments that are left.

    `--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I` set the cluster explicitly.
    Without them Slurm, Open MPI, Kubernetes indexed jobs and TPU pods are recognised by their environment variables,
    and JAX reads the rest from there; a single process initialises nothing. A process without a heartbeat for
    `--distributed.timeout SECONDS` counts as lost, and all others exit. Raises `ConfigError` for incomplete flags.
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
        require(bool(colon) and port.isdigit(), "distributed.coordinator", coordinator, fix)
        require(processes >= 1, "distributed.processes", processes, "must be at least 1")
        require(0 <= process < processes, "distributed.process", process, f"must be one of 0 to {processes - 1}")
    if explicit or in_cluster(os.environ):
        timeout = values["distributed.timeout"]
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=timeout
        )
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

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 1

    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return (
        ("SLURM_STEP_NODELIST" in environment and count("SLURM_NTASKS") > 1)  # set by srun, not in a batch script
        or count("OMPI_COMM_WORLD_SIZE") > 1
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or len(hosts.split(",")) > 1
    )
