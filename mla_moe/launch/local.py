"""Rehearsal on this machine: the processes of a pod, each with some of its CPU devices."""

import contextlib
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator

from mla_moe.config import MeshConfig, require
from mla_moe.launch.job import COORDINATOR_PORT, Job
from mla_moe.parallel.mesh import MESH_AXES, mesh_shape

_SECONDS_TO_END = 30.0
"""Seconds after one process fails until the others, blocked in a collective, are killed."""


def devices_per_process(mesh: MeshConfig, processes: int) -> int:
    """CPU devices of each process, so that together they have those of the mesh; the smallest number of devices where
    the mesh takes all there are. Raises `ConfigError` if the processes cannot share them."""
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    given = math.prod(size for size in sizes if size != -1)
    total = math.lcm(given, processes) if -1 in sizes else given
    mesh_shape(mesh, total)
    fix = f"must divide the {total} devices of the mesh; choose another number of processes or another mesh"
    require(total % processes == 0, "processes", processes, fix)
    return total // processes


def commands(job: Job, processes: int, port: int) -> list[list[str]]:
    """The command of each process."""
    train = [sys.executable, "-m", "mla_moe", *job.train]
    return [
        [*train, f"--distributed.coordinator=localhost:{port}", f"--distributed.processes={processes}",
         f"--distributed.process={process}"]
        for process in range(processes)
    ]  # fmt: skip


def environment(devices: int) -> dict[str, str]:
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def printed(job: Job, processes: int) -> str:
    """The processes as lines of a shell."""
    variables = " ".join(f"{k}={v}" for k, v in environment(devices_per_process(job.recipe.mesh, processes)).items())
    lines = [f"{variables} {shlex.join(command)} &" for command in commands(job, processes, COORDINATOR_PORT)]
    return "\n".join([*lines, "wait", ""])


def run(job: Job, processes: int) -> int:
    """Run the processes until all have ended. Returns the first status other than 0, else 0; that of a
    process that a signal ended is 128 and the signal, as in a shell. After SIGTERM or Ctrl-C
    they save and end; a second signal kills them."""
    devices = devices_per_process(job.recipe.mesh, processes)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = os.environ | environment(devices)
    started: list[subprocess.Popen[bytes]] = []
    with _forwarded_signals(started):
        try:
            for command in commands(job, processes, port):
                # Not in the terminal's group: Ctrl-C would end several processes without a checkpoint, unlike SIGTERM.
                started.append(subprocess.Popen(command, env=variables, start_new_session=True))
            status = _wait(started)
            return status if status >= 0 else 128 - status
        finally:
            for process in started:
                process.kill()
                process.wait()


def _wait(started: list["subprocess.Popen[bytes]"]) -> int:
    failed_at, status = None, 0
    while any(process.poll() is None for process in started):
        failed = [process.returncode for process in started if process.returncode]
        if failed and failed_at is None:
            failed_at, status = time.monotonic(), failed[0]
        if failed_at is not None and time.monotonic() - failed_at > _SECONDS_TO_END:
            break
        time.sleep(0.2)
    return status or next((process.returncode for process in started if process.returncode), 0)


@contextlib.contextmanager
def _forwarded_signals(started: list["subprocess.Popen[bytes]"]) -> Generator[None]:
    stopping = False

    def forward(_number: int, _frame: object) -> None:
        nonlocal stopping
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL if stopping else signal.SIGTERM)
        stopping = True

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
