"""The lock of a run in a bucket, which has none: an object that its holder rewrites at short intervals."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_moe.config import ConfigError
from mla_moe.config.storage import storage_errors

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)
INTERVAL = 5.0
"""Seconds between two writes of the holder."""
WAIT = 4 * INTERVAL
"""After so many seconds without a write the holder counts as dead. No clocks are compared."""


class Lease:
    """Held by one process at a time. If the holder was killed, its own host detects it immediately, other hosts after
    `WAIT`. A holder that resumes later detects in `require_held` that it lost the lease, before it commits."""

    def __init__(self, fs: "AbstractFileSystem", path: str, url: str):
        self._fs, self._path, self._url = fs, path, url
        self._holder = {**_this_process(), "id": uuid.uuid4().hex}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        """Raises `ConfigError` if another process holds it, or the bucket rejects the request."""
        held = self._read()
        if held is not None and not _is_dead(held):
            logger.warning("%s: waiting up to %.0f s to see whether another process trains there", self._url, WAIT)
            end = time.monotonic() + WAIT
            while time.monotonic() < end and (now := self._read()) is not None:
                if now != held:
                    raise self._error("another process trains there; end it, or give another directory")
                time.sleep(INTERVAL / 5)
        self._write(0)
        self._thread.start()

    def follow(self) -> None:
        """Use the lease that process 0 of this run acquired, renews and releases."""
        self._holder["id"] = (self._read() or {}).get("id")

    def require_held(self) -> None:
        """Raises `ConfigError` if another run has taken it."""
        if (self._read() or {}).get("id") != self._holder["id"]:
            raise self._error("another process has taken over; end one of them")

    def release(self) -> None:
        """Remove the object. Where the bucket rejects that it stays, and another process waits until it counts as
        dead."""
        if not self._thread.is_alive():
            return
        self._closed.set()
        self._thread.join()
        try:
            if (self._read() or {}).get("id") == self._holder["id"]:
                with storage_errors("run_dir", self._url):
                    self._fs.rm_file(self._path)
        except (ConfigError, OSError) as error:  # no reason to hide another error, or to count as invalid input
            logger.warning("%s", error)

    def _renew(self) -> None:
        number = 0
        while not self._closed.wait(INTERVAL):
            number += 1
            try:
                self.require_held()
                self._write(number)
            except (ConfigError, OSError) as error:
                logger.warning("%s", error)

    def _write(self, number: int) -> None:
        with storage_errors("run_dir", self._url):
            self._fs.pipe_file(self._path, json.dumps(self._holder | {"number": number}).encode())

    def _read(self) -> dict[str, Any] | None:
        with storage_errors("run_dir", self._url):
            try:
                value = json.loads(self._fs.cat_file(self._path))
            except FileNotFoundError:
                return None
            except ValueError:  # of another program
                value = {}
        return value if isinstance(value, dict) else {}

    def _error(self, message: str) -> ConfigError:
        return ConfigError("run_dir", self._url, message)


def _this_process() -> dict[str, Any]:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid_namespace": os.readlink(namespace) if namespace.is_symlink() else "",  # another in each container
        "pid": os.getpid(),
    }


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this host that has ended. Of another host nothing is known."""
    here, pid = _this_process(), holder.get("pid")
    if any(holder.get(name) != here[name] for name in ("host", "boot", "pid_namespace")) or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user, or no number of a process
        pass
    return False
