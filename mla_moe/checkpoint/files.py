"""Errors, JSON files, atomic directories and a progress bar, shared by all readers and writers of checkpoints."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mla_moe.config import ConfigError
from mla_moe.config.errors import require_local
from mla_moe.config.files import MAX_JSON_BYTES, read_json_object


class CheckpointError(ConfigError):
    """A checkpoint, or a file of it, that cannot be read or written as requested."""


class CheckpointSaveError(OSError):
    """A run's checkpoint could not be saved. The message names the directory and a remedy."""


def check(ok: bool, field: str, value: Any, message: str) -> None:
    """Raise `CheckpointError` unless `ok`."""
    if not ok:
        raise CheckpointError(field, value, message)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A file's JSON object. Raises `CheckpointError` for anything else, and for more than `max_bytes`."""
    try:
        return read_json_object(path, "checkpoint", max_bytes)
    except ConfigError as error:
        raise CheckpointError(error.field, error.value, error.message) from None


@contextlib.contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """A temporary directory beside `path`, renamed to `path` when the block succeeds and removed when it fails."""
    require_local("path", path)
    check(not os.path.lexists(path), "path", str(path), "exists already; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        yield Path(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, path)  # nothing is left to remove


def write_side_files(directory: Path, config: dict[str, Any], files: Mapping[str, Path]) -> None:
    """The files beside the weights: `config.json`, and copies of `files` by name."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, file in files.items():
        shutil.copyfile(file, directory / name)


def flush_to_disk(file: int) -> None:
    """Flush a file to disk and drop it from the page cache. It is not read again, and a file larger than the host's
    memory would evict everything else."""
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def progress_bar(description: str, total_bytes: int) -> Generator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal. Yields a function that adds bytes to those done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda count: bar.advance(task, count)
