"""Errors, JSON files, atomic directories and a progress bar, shared by all readers and writers of checkpoints."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mla_moe.config import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint, or a file of it, that cannot be read or written as requested."""


class CheckpointSaveError(OSError):
    """A run's checkpoint could not be saved. The message names the directory and a remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises `CheckpointError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("checkpoint", str(path), "no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint", str(path), f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError("checkpoint", str(path), "must hold a JSON object")
    return value


@contextlib.contextmanager
def atomic_directory(path: Path) -> Generator[Path]:
    """A temporary directory beside `path`, renamed to `path` when the block succeeds and removed when it fails."""
    if os.path.lexists(path):
        raise CheckpointError("path", str(path), "exists already; choose another or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def flush_to_disk(file: int) -> None:
    """Flush a file to disk and drop it from the page cache. It is not read again, and a file larger than the host's
    memory would evict everything else."""
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def progress_bar(description: str, total_bytes: int) -> Generator[Callable[[int], None]]:
    """A progress bar on standard error, hidden unless that is a terminal. Yields a function that adds a number of bytes
    to those done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda count: bar.advance(task, count)
