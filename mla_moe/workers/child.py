"""Main program of a worker process, which `process.py` runs by its path: a fresh interpreter, without JAX.

It is two processes. The second one runs the service. The first one, its supervisor, only waits: when the service ends,
or the parent closes the channel or is killed, it kills every process that the service has left. On Linux these are all,
whatever their session: a daemon becomes a child of the supervisor when the process that started it ends.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MAX_ERROR_CHARACTERS = 1000
"""Longest text of an exception that is sent."""
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)
_IS_LINUX = sys.platform == "linux"


def supervise(channel: int) -> None:
    """Start the service in a child process, wait until it or the parent ends, and kill what is left."""
    os.set_inheritable(channel, False)  # programs that the service starts do not get it
    _on_stop_signals(signal.SIG_IGN)  # the parent finishes its step, and ends its workers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wakeup, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    service = os.fork()
    if service == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(wakeup)
        os.close(signalled)
        _on_stop_signals(lambda *_: None)  # programs that it starts would inherit SIG_IGN
        os.register_at_fork(after_in_child=lambda: _on_stop_signals(signal.SIG_DFL))
        os.setsid()  # a service that signals its process group does not reach the supervisor
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        with contextlib.suppress(EOFError, OSError):  # the parent has ended
            _serve(Connection(channel))
        os._exit(0)
    poll = select.poll()
    poll.register(channel, 0)  # no data, only that the parent has closed its end
    poll.register(wakeup, select.POLLIN)
    status = None
    while status is None:
        ready = [file for file, _ in poll.poll(None if _IS_LINUX else 1000)]
        if channel in ready or not (_IS_LINUX or _is_open(channel)):
            break
        if wakeup in ready:
            os.read(wakeup, 1 << 10)
        status = dict(_reap(os.WNOHANG)).get(service)
    _kill_descendants(service)
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:  # ends as the service did
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _on_stop_signals(handler: Callable[..., None] | signal.Handlers) -> None:
    """Set the handler of SIGINT and SIGTERM, which a scheduler may send to all processes of a job."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def _is_open(channel: int) -> bool:
    """Whether the parent has its end open. Other systems than Linux may not report that to a poll for no events."""
    try:
        with socket.socket(fileno=os.dup(channel)) as ours:
            return bool(ours.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:  # it is, and has sent nothing
        return True
    except OSError:
        return False


def _prctl(option: int, value: int) -> None:
    if _IS_LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _reap(options: int) -> Iterator[tuple[int, int]]:
    """Process ids and statuses of children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, options))[0]:
            yield ended


def _kill_descendants(service: int) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        while pids := children.read_text().split():  # those of a killed process become children of this one
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            next(_reap(0), None)
    except FileNotFoundError:  # not Linux: the service's session, without processes that have left it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(service, signal.SIGKILL)


def _serve(channel: Connection) -> None:
    """Load the service, then answer calls until the parent ends.

    The parent sends pickles, and gets lines of JSON: the number of the call, the kind of the reply (`"value"`,
    `"raised"`, or one of the service's) and its content. While loading, number 0, they are `("loading", name)`, then
    `("ready", content)` or `("unable", message)`.
    """
    os.register_at_fork(after_in_child=channel.close)  # a copy of this process that returns here cannot answer
    sys.path[:], file, arguments, memory_bytes, max_reply_bytes = channel.recv()
    with contextlib.suppress(OSError):  # on Linux: if the host runs out of memory, the worker is killed and not the run
        Path("/proc/self/oom_score_adj").write_text("1000")

    def reply(number: int, kind: str, content: Any) -> None:
        try:
            line = json.dumps([number, kind, content]).encode()
            if len(line) >= max_reply_bytes:
                raise ValueError(f"the result has {len(line)} bytes, and may have {max_reply_bytes}")
        except Exception as error:
            line = json.dumps([number, "raised", describe(error)]).encode()
        data = memoryview(line + b"\n")
        while data:
            data = data[os.write(channel.fileno(), data) :]

    try:
        call, content = _load(file).open_service(lambda name: reply(0, "loading", name), *arguments)
    except BaseException as error:  # including SystemExit
        return reply(0, "unable", describe(error))
    if memory_bytes is not None:
        limit, hard = memory_bytes + _data_bytes(), resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    reply(0, "ready", content)
    while True:
        number, arguments = channel.recv()
        try:
            kind, content = call(*arguments)
        except BaseException as error:
            kind, content = "raised", describe(error)
        reply(number, kind, content)


def _load(file: str) -> Any:
    """Import a service by its path: importing it from the package would import JAX."""
    spec = importlib.util.spec_from_file_location("_mla_moe_service", file)  # no module of a user has this name
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _data_bytes() -> int:
    """Private memory of this process, of which threads that imports have started reserve much on a host with many
    CPUs."""
    if not _IS_LINUX:
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


def describe(error: BaseException) -> str:
    """The type and the text of an exception, whose text may fail too."""
    with contextlib.suppress(Exception):
        return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]
    return type(error).__name__


if __name__ == "__main__":
    supervise(int(sys.argv[1]))
