"""Watchdog: ends the process when a step hangs, with the stacks of all threads, so that its launcher restarts it."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

_GRACE = 60.0
"""Seconds after which `faulthandler` ends a process whose interpreter is blocked too, such as by a thread in C code."""


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """Ends the process with status 1 unless `progress` is called every `minutes`. None never ends it."""

    def __init__(self, minutes: float | None, path: Path):
        """`path` gets the stacks, besides standard error."""
        self._seconds, self._path = None if minutes is None else minutes * 60, path
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.progress("start")
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True).start()
        return self

    def progress(self, doing: str) -> None:
        """Start to count now; `doing` is what the process does next, for the message."""
        self._doing, self._since = doing, time.monotonic()
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True)

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, seconds: float) -> None:
        while not self._closed.wait(max(self._since + seconds - time.monotonic(), 0.01)):
            if time.monotonic() - self._since >= seconds:
                self._end(seconds)

    def _end(self, seconds: float) -> None:
        print(
            f"error: {self._doing} did not finish in {seconds / 60:g} minutes (training.max_step_minutes); the stacks "
            f"of all threads follow and are in {self._path}; the same command resumes from the newest checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.stderr)
        try:
            with self._path.open("w") as file:
                faulthandler.dump_traceback(file)
        finally:  # also if the disk is full or hangs no longer
            os._exit(1)
