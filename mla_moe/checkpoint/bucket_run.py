"""A run in a bucket, as a local directory: a mirror of its files, without the arrays of its checkpoints.

Objects cannot be appended, locked or renamed, so a run writes its files here. They are uploaded at intervals, before a
checkpoint is committed, and at the end. Arrays never are in the mirror: they are read from the bucket and written there
by TensorStore (`orbax_layout`, `bucket_steps`).

Of several processes each has a mirror. The first one holds the run and writes almost all files; where the others read
what it has written since the start, `synchronize` brings it to them.
"""

import contextlib
import itertools
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Generator, Iterator, Set
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mla_moe.checkpoint.lease import Lease
from mla_moe.config import ConfigError
from mla_moe.config.hub import shown
from mla_moe.config.resume import STAGES
from mla_moe.config.storage import (
    copy_object,
    is_bucket,
    object_version,
    open_url,
    storage_errors,
    upload_object,
)

logger = logging.getLogger(__name__)
COMMIT = "_CHECKPOINT_METADATA"
"""The last object of a step. One without it is incomplete, and is not mirrored."""
LOCK = ".lock"
SYNC_SECONDS = 15.0
_LARGE_BYTES = 8 << 20
_GROWTH = 1.25
"""Larger files are uploaded at intervals only when they have grown by this factor since they last were, because each
upload is of the whole file."""
_UNREAD = ("tensorboard", "profile", "wandb")
"""Folders that a run writes and does not read."""
_METRICS = ("metrics.jsonl", "expert_load.jsonl", "samples.jsonl")
_STEP = re.compile(rf"(.*)/checkpoints/(?:{'|'.join(STAGES)})(?:/\d+)?")
_MIRRORS: dict[Path, "Mirror"] = {}
_BARRIER_MILLISECONDS = 3_600_000
"""A process that has ended is noticed by its heartbeats before that."""


@contextlib.contextmanager
def _during_run() -> Generator[None]:
    """During a run, report an error of the bucket as `ConnectionError` (status 1: a launcher restarts), not as invalid
    input (status 2; `cli.errors`)."""
    try:
        yield
    except ConfigError as error:
        raise ConnectionError(str(error)) from None


class Mirror:
    """The files of a directory of a bucket, in a temporary directory that ends with the process."""

    def __init__(self, url: Any, field: str):
        self.url, self._field = shown(url).rstrip("/"), field
        self._fs, self._root = open_url(url, field)
        self._temporary = tempfile.TemporaryDirectory(prefix="mla_moe-run-")
        self.directory = Path(self._temporary.name).resolve() / self._root.rpartition("/")[2]
        self.directory.mkdir()
        self._uploaded: dict[str, tuple[int, int]] = {}
        """Time of change and size of each file that is in the bucket."""
        self._downloaded: dict[str, tuple[Any, ...]] = {}
        """The version of each object that this process has read."""
        self._holds = False
        self._lease = Lease(self._fs, f"{self._root}/{LOCK}", self.url)
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._upload_at_intervals, name="mirror", daemon=True)
        _MIRRORS[self.directory] = self

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of a run. Readers must not read it: it initializes the JAX backend."""
        return jax.process_index() == 0

    def url_of(self, path: Path) -> str:
        """The URL of a file or folder of the mirror."""
        return f"{self.url}/{path.relative_to(self.directory)}".removesuffix("/.")

    def object_of(self, path: Path) -> str:
        """The path of a file or folder of the mirror, for the bucket's client."""
        return f"{self._root}/{path.relative_to(self.directory)}".removesuffix("/.")

    def download(self, without: Collection[str] = _UNREAD) -> None:
        """Download what is in the bucket, except for arrays and for files and folders of the names `without`. Again, it
        downloads what has changed there, and removes what is gone."""
        found = dict(self._objects("", {*without, ".", ".."}))  # an object may have any name
        for name, info in found.items():
            path = self.directory / name
            if self._downloaded.get(name) != object_version(info):
                path.parent.mkdir(parents=True, exist_ok=True)
                copy_object(self._fs, info, path, self._field, self.url)
                self._downloaded[name], self._uploaded[name] = object_version(info), _state(path)
        for name in self._downloaded.keys() - found.keys():
            (self.directory / name).unlink(missing_ok=True)
            del self._downloaded[name]
            self._uploaded.pop(name, None)

    def _objects(self, folder: str, without: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        prefix = f"{folder}/" if folder else ""
        is_step = re.search(r"(^|/)checkpoints/[^/]+/[^/]+$", folder) is not None
        entries = {e["name"].rstrip("/").rpartition("/")[2]: e for e in self._list(f"{self._root}/{folder}")}
        if is_step and COMMIT not in entries:
            return
        for name, info in entries.items():
            if info["type"] == "directory":
                if name not in without and folder.rpartition("/")[2] != "state":  # which has the arrays
                    yield from self._objects(prefix + name, without)
            elif name not in without and name != LOCK and not info["name"].endswith("/"):  # of a web page's folder
                yield prefix + name, info

    def _list(self, folder: str) -> list[dict[str, Any]]:
        with storage_errors(self._field, self.url):
            try:
                return self._fs.ls(folder.rstrip("/"), detail=True)
            except FileNotFoundError:
                return []

    @_during_run()
    def upload(self, at_most: int | None = None) -> None:
        """Upload the files that have changed, and remove those that are gone. Of files of more than `at_most` bytes, if
        given, only those that have grown by `_GROWTH`. Checkpoints are left to `bucket_steps`. Raises `ConnectionError`
        if the bucket rejects the request, or another process has taken over the run."""
        with self._lock:
            self.require_held()
            self._upload(at_most)

    @_during_run()
    def _upload(self, at_most: int | None = None) -> None:
        found = {str(path.relative_to(self.directory)): path for path in self._files()}
        for name, path in found.items():
            try:
                state = _state(path)
                before = self._uploaded.get(name, (0, 0))
                waits = at_most is not None and at_most < state[1] < _GROWTH * before[1]
                if before == state or waits:
                    continue
                with tempfile.TemporaryDirectory(prefix="mla_moe-upload-") as folder:
                    copy = shutil.copyfile(path, Path(folder) / path.name)  # the file may grow during the upload
                    upload_object(self._fs, copy, f"{self._root}/{name}", self._field, self.url)
            except FileNotFoundError:  # replaced or removed meanwhile
                continue
            self._uploaded[name] = state
        for name in self._uploaded.keys() - found.keys():
            if not name.startswith("checkpoints/") and not (self.directory / name).exists():
                self.remove(f"{self._root}/{name}")
                del self._uploaded[name]

    @_during_run()
    def upload_file(self, path: Path) -> None:
        """Upload one file of the mirror."""
        upload_object(self._fs, path, self.object_of(path), self._field, self.url)

    def _files(self) -> Iterator[Path]:
        """What is uploaded as it is. Folders may disappear meanwhile."""
        for folder, folders, names in os.walk(self.directory):
            without = (".", "checkpoints") if Path(folder) == self.directory else (".",)
            folders[:] = [name for name in folders if not name.startswith(without)]
            paths = (Path(folder, name) for name in names if not name.startswith("."))
            yield from (path for path in paths if path.suffix != ".tmp" and path.is_file() and not path.is_symlink())

    @_during_run()
    def remove(self, target: str) -> None:
        """Remove an object or a folder, if it exists. Of a step the commit goes first."""
        with storage_errors(self._field, self.url), contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{target}/{COMMIT}")
            self._fs.rm(target, recursive=True)

    @_during_run()
    def move(self, source: str, target: str) -> None:
        """Move a step's folder, by copies within the bucket. A kill leaves it complete at its source or its target."""
        self.remove(target)  # what a kill has left of an earlier move
        with storage_errors(self._field, self.url):
            names = [name.removeprefix(source) for name in self._fs.find(source)]
            copied = [name for name in names if name != f"/{COMMIT}"]
            self._fs.copy([source + name for name in copied], [target + name for name in copied])
            self._fs.copy(f"{source}/{COMMIT}", f"{target}/{COMMIT}")
        self.remove(source)

    @_during_run()
    def require_held(self) -> None:
        """Raises `ConnectionError` if another process has taken over the run."""
        self._lease.require_held()

    @_during_run()
    def remove_incomplete(self, stage: Path, complete: Set[str]) -> None:
        """Remove what a kill during a save or a removal has left: the steps of a stage that are not `complete`."""
        for name in self.names(stage) - complete:
            if name.isdecimal():
                self.remove(self.object_of(stage / name))

    def names(self, folder: Path) -> set[str]:
        """Names of the objects and folders below a folder. Raises `ConfigError` if the bucket rejects the
        request."""
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in self._list(self.object_of(folder))}

    def start(self) -> None:
        """Acquire the run's lease and download its files: as the run's own mirror, not a reader's. Raises `ConfigError`
        if another process trains there. Of several processes each calls it."""
        self._barriers = Barriers()
        if self.is_first:
            self._lease.acquire()
        self._barriers.wait()
        try:
            if not self.is_first:
                self._lease.follow()
            self.download()
        except BaseException:
            self._lease.release()
            raise
        self._barriers.wait()  # an object that changed meanwhile would be an error
        self._holds = True
        if self.is_first:
            self._thread.start()

    @_during_run()
    def synchronize(self) -> None:
        """Bring what the first process has written to the others. All call it at the same point of the run."""
        with self._lock:  # nothing changes in the bucket while the others read
            if self.is_first:
                self.upload()
            self._barriers.wait()
            if not self.is_first:
                self.download()
            self._barriers.wait()

    def close(self) -> None:
        """Upload what is left and release the lease."""
        if self._holds:
            self._holds = False
            self._closed.set()
            if self.is_first:
                self._thread.join()
            try:
                self.upload() if self.is_first else self._upload()  # the first may have released it
            finally:
                self._lease.release()

    def discard(self) -> None:
        """Remove the directory."""
        del _MIRRORS[self.directory]
        self._temporary.cleanup()

    def _upload_at_intervals(self) -> None:
        while not self._closed.wait(SYNC_SECONDS):
            try:
                self.upload(_LARGE_BYTES)
            except OSError as error:
                logger.warning("%s; it is tried again, and has to succeed before a checkpoint is saved", error)


class Barriers:
    """Barriers of all processes without their devices, so that a thread may wait there beside steps. All processes use
    one from the same thread, in the same order."""

    _created = itertools.count()

    def __init__(self):
        self._name, self._numbers = f"mla_moe_bucket.{next(self._created)}", itertools.count()

    def wait(self) -> None:
        """Raises an error if another process has ended, or after an hour."""
        key = f"{self._name}.{next(self._numbers)}"
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_BARRIER_MILLISECONDS)


def synchronize(run_dir: Path, name: str) -> None:
    """A barrier of all processes, after which each reads in `run_dir` what the first has written before."""
    multihost_utils.sync_global_devices(name)
    if mirror := mirror_of(run_dir):
        mirror.synchronize()


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a path is in; None for a path of this host alone."""
    path = path.absolute()
    return next((_MIRRORS[folder] for folder in (path, *path.parents) if folder in _MIRRORS), None)


def location(path: Path) -> str:
    """A path as the user knows it: in a mirror its URL."""
    mirror = mirror_of(path)
    return str(path) if mirror is None else mirror.url_of(path.absolute())


def open_run(run_dir: str) -> Path:
    """The directory of a run that trains: `run_dir`, or for a URL its mirror, with the run's lease. Raises
    `ConfigError` as `Mirror.start` does."""
    if not is_bucket(run_dir):
        return Path(run_dir)
    mirror = Mirror(run_dir, "run_dir")
    mirror.start()
    return mirror.directory


def close_run(run_dir: Path, *, failed: bool = False) -> None:
    """Upload what a run in a bucket has written. Raises `ConnectionError` if the bucket rejects it; of a run that has
    `failed`, whose own error is the one to report, that is logged."""
    if mirror := mirror_of(run_dir):
        try:
            mirror.close()
        except OSError as error:
            if not failed:
                raise
            logger.warning("%s", error)


def read_run(url: Any, field: str, *, metrics: bool = False) -> Path | None:
    """The local directory of a run in a bucket, or of its stage or step if the URL is of one, with its metrics if
    asked for; None if there is no run. Raises `ConfigError` on `field` if the bucket rejects the
    request."""
    text = shown(url).rstrip("/")
    within = _STEP.fullmatch(text)
    mirror = Mirror(within[1] if within else text, field)
    names = mirror.names(mirror.directory)
    if not names & {"recipe.json", "checkpoints"} and not {"state", "model"} <= names:
        mirror.discard()
        return None
    mirror.download(without=_UNREAD if metrics else (*_UNREAD, *_METRICS))
    return mirror.directory / text.removeprefix(mirror.url).lstrip("/")
