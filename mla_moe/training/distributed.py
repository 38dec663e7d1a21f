"""Many processes as one program: found from the cluster's environment, or told by flags."""

import argparse
import os
from collections.abc import Mapping, Sequence

import jax

from mla_moe.config import ConfigError

_FLAGS = ("coordinator", "processes", "process")


def initialize(arguments: Sequence[str]) -> list[str]:
    """Join the other processes, if there are any, and give back the arguments that are not about that.

    `--distributed.coordinator HOST:PORT --distributed.processes N --distributed.process I` say it outright. Without
    them Slurm, Open MPI, Kubernetes' indexed jobs and TPU pods are recognised by their variables, and JAX reads the
    rest from there. A process that is alone joins nobody. Raises `ConfigError` for flags that are not complete.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in _FLAGS:
        parser.add_argument(f"--distributed.{flag}", type=str if flag == "coordinator" else int)
    known, rest = parser.parse_known_args(arguments)
    values = vars(known)
    given = {flag: values[f"distributed.{flag}"] for flag in _FLAGS}
    if any(value is not None for value in given.values()):
        for flag, value in given.items():
            if value is None:
                raise ConfigError(f"distributed.{flag}", None, "give all three of --distributed." + ", .".join(_FLAGS))
        jax.distributed.initialize(given["coordinator"], given["processes"], given["process"])
    elif in_cluster(os.environ):
        jax.distributed.initialize()
    return rest


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one process among several."""

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 1

    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return (
        ("SLURM_JOB_ID" in environment and count("SLURM_NTASKS") > 1)
        or count("OMPI_COMM_WORLD_SIZE") > 1
        or ("KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment)
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or len(hosts.split(",")) > 1
    )
