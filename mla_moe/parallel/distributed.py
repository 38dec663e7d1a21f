"""Many processes as one program: found from the cluster's environment, or told by flags."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Generator, Mapping, Sequence

import jax

from mla_moe.config import ConfigError, require

_FLAGS = ("coordinator", "processes", "process")
_SILENCE = 100
"""Seconds without a sign of life after which a process counts as lost: a busy host may be silent for a while."""


def initialize(arguments: Sequence[str]) -> list[str]:
    """Join the other processes, if there are any, and give back the arguments that are not about that.

    `--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I` say it outright. Without
    them Slurm, Open MPI, Kubernetes' indexed jobs and TPU pods are recognised by their variables, and JAX reads the
    rest from there. A process that is alone joins nobody. `--distributed.timeout SECONDS` says after which silence a
    process counts as lost, and all others end. Raises `ConfigError` for flags that are not complete.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in _FLAGS:
        parser.add_argument(f"--distributed.{flag}", type=str if flag == "coordinator" else int)
    parser.add_argument("--distributed.timeout", type=int, default=_SILENCE)
    known, rest = parser.parse_known_args(arguments)
    values = vars(known)
    timeout = values["distributed.timeout"]
    how = {"heartbeat_timeout_seconds": timeout, "shutdown_timeout_seconds": timeout}
    given = {flag: values[f"distributed.{flag}"] for flag in _FLAGS}
    if any(value is not None for value in given.values()):
        for flag, value in given.items():
            if value is None:
                raise ConfigError(f"distributed.{flag}", None, "give all three of --distributed." + ", .".join(_FLAGS))
        coordinator, processes, process = given.values()
        fix = "HOST:PORT, of the host that runs process 0"
        _, colon, port = coordinator.rpartition(":")
        require(bool(colon) and port.isdigit(), "distributed.coordinator", coordinator, fix)
        require(processes >= 1, "distributed.processes", processes, "at least 1")
        require(0 <= process < processes, "distributed.process", process, f"one of 0 to {processes - 1}")
        jax.distributed.initialize(coordinator, processes, process, **how)
    elif in_cluster(os.environ):
        jax.distributed.initialize(**how)
    return rest


@contextlib.contextmanager
def ending_together() -> Generator[None]:
    """Within it an error of one process among several ends that process at once, and thereby the others: an orderly end
    would wait for them, while they wait for it."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, ConfigError | jax.errors.JaxRuntimeError):
            traceback.print_exc()
        who = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"error in {who}: {error}", file=sys.stderr)
        fix = "its own output says why; the same command, in all, goes on from the newest checkpoint"
        print(f"If another process is the cause, {fix}.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one process among several."""

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 1

    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return (
        ("SLURM_STEP_NODELIST" in environment and count("SLURM_NTASKS") > 1)  # srun's; a batch script is alone
        or count("OMPI_COMM_WORLD_SIZE") > 1
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or len(hosts.split(",")) > 1
    )
