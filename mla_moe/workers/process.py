"""Worker process: runs a service whose calls may hang, crash, fork or use too much memory. A worker that
does not reply in time is ended; the caller restarts it.

A service is a file with `open_service(loading, *arguments)`, which returns a function and any content. The function
takes the arguments of a call and returns the kind of a reply, `"value"` or another, and its content, for JSON. The
service calls `loading(name)` to tell what it is loading.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from mla_moe.workers import child

_START_SECONDS = 120.0  # imports from a slow disk, on a busy machine
_SEND_SECONDS = 5  # without progress
_END_SECONDS = 5.0
ENDED = ("unable", "hung", "died")
"""Kinds of replies after which a worker has to be restarted."""

Reply = tuple[str, Any]
"""The kind of a reply and its content: of the service, or one of

- `"ready"`: the service is loaded; its content. `"unable"`: it cannot be loaded; why.
- `"raised"`: the call raised an exception; its type and text.
- `"hung"`, `"died"`: there was no reply before the deadline, or a wrong one, or none will come; a message."""


class WorkerProcess:
    """A worker process that runs a service, one call at a time.

    It has its own interpreter without JAX, its own session, and a channel that processes started by the service do not
    have. Its output goes to standard error. A reply has the number of its call, and is JSON: anything else ends the
    worker. It ends with all its processes after `end`, with the interpreter, and if the parent is killed
    (`child.supervise`).
    """

    def __init__(
        self, service: Path, arguments: Iterable[Any], *, max_reply_bytes: int, memory_bytes: int | None = None
    ):
        """`arguments`, picklable, are those of `open_service`. `memory_bytes`: what calls may allocate, on Linux."""
        start_message = (sys.path, str(service), tuple(arguments), memory_bytes, max_reply_bytes)
        self._start_message = ForkingPickler.dumps(start_message)
        self._max_reply_bytes = max_reply_bytes
        self._start()

    def _start(self) -> None:
        self.ready, self.loading = False, ""
        """Whether the service is loaded, and what it is loading."""
        self._number, self._buffer = 0, bytearray()
        self._await_reply(_START_SECONDS)
        self.channel, theirs = socket.socketpair()
        """For `multiprocessing.connection.wait`: readable if `poll` may have a reply."""
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", child.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a service prints goes to stderr: stdout is the run's
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a service that imports JAX must not use the accelerator
                start_new_session=True,
            )
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        self._finalize = weakref.finalize(self, _end, self._process, self.channel)
        self._send(self._start_message)

    def restart(self) -> None:
        """End the process, even during a call, and start another."""
        self.end()
        self._start()

    def call(self, seconds: float, *arguments: Any) -> Reply:
        """The reply to a call, once the service is loaded; why that failed otherwise."""
        if self.ready and self.busy:  # an exception, such as an interrupt, has ended the last call
            self.restart()
        if not self.ready and (reply := self.wait())[0] != "ready":
            return reply
        self.submit(seconds, *arguments)
        return self.wait()

    def wait(self) -> Reply:
        """The reply to the call, or to the start of the service."""
        while (reply := self.poll()) is None:
            wait([self.channel], self.seconds_left)
        return reply

    def submit(self, seconds: float, *arguments: Any) -> None:
        """Start a call, with a deadline. Requires a ready, idle worker and picklable arguments. Raises
        `RecursionError` for arguments that are nested too deeply; the worker stays ready."""
        message = ForkingPickler.dumps((self._number + 1, arguments))
        self._number += 1
        self._await_reply(seconds)
        self._send(message)

    def _await_reply(self, seconds: float) -> None:
        self.busy = True
        self._limit, self._deadline = seconds, time.monotonic() + seconds

    def _send(self, message: memoryview) -> None:
        sender = Connection(os.dup(self.channel.fileno()), readable=False)
        with contextlib.suppress(OSError), sender:  # the process ended or does not read: `poll` reports that
            sender.send_bytes(message)

    @property
    def seconds_left(self) -> float:
        """Until the deadline of the call, or of loading."""
        return max(0.0, self._deadline - time.monotonic())

    def poll(self) -> Reply | None:
        """The reply to the call, or to the start of the service; None if there is none yet."""
        reply = self._read()
        if reply is None and not self.seconds_left:
            reply = "hung", f"no reply within {self._limit:g} s"
        if reply is not None:
            self.busy, self.ready = False, reply[0] not in ENDED
            if not self.ready:
                self.end()
        return reply

    def _read(self) -> Reply | None:
        with contextlib.suppress(BlockingIOError):
            while data := self._receive():
                first, *others = data.split(b"\n")
                self._buffer += first
                if len(self._buffer) > self._max_reply_bytes:
                    return "died", f"ended, because its reply has more than {self._max_reply_bytes} bytes"
                for line in others:
                    reply, self._buffer = _parse(self._buffer, self._number), bytearray(line)
                    if reply[0] != "loading":
                        return reply  # what follows it belongs to no call, and is dropped or a wrong reply to the next
                    self.loading = printable(str(reply[1]))
            return "died", f"exit code {self.end()}"
        return None

    def _receive(self) -> bytes:
        """Raises `BlockingIOError` if nothing has arrived; empty at the end."""
        try:
            return self.channel.recv(1 << 16, socket.MSG_DONTWAIT)
        except ConnectionError:
            return b""

    def end(self) -> int:
        """End the process and all that it has started, and return its exit code. Idempotent."""
        self._finalize()
        return self._process.returncode


def _parse(line: bytes | bytearray, expected: int) -> Reply:
    try:
        number, kind, content = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return "died", f"ended, because it sent {printable(repr(bytes(line[:100])))}"
    if number != expected or not isinstance(kind, str):
        return "died", f"ended, because it sent a reply to call {number!r:.20} instead of {expected}"
    return kind, content


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)  # the supervisor sees that, kills the service and its processes, and ends
    channel.close()
    process.send_signal(signal.SIGCONT)  # the service may have stopped it
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:  # a process cannot be killed; the service ends with its supervisor
        process.kill()
        process.wait()


def printable(text: str) -> str:
    """One line of at most `child.MAX_ERROR_CHARACTERS`, without characters that control a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[: child.MAX_ERROR_CHARACTERS])
