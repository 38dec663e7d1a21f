"""The directory of a run: its recipe, its lock, and what may change in the recipe when the run resumes."""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mla_moe.config import ConfigError, Recipe, require
from mla_moe.config.resume import leaves
from mla_moe.training.metrics import read_rows

logger = logging.getLogger(__name__)


def open_run_directory(recipe: Recipe) -> Path:
    """Create the run's directory, or open it to resume the run in it, and write `recipe.json`.

    Raises `ConfigError` if the directory has a run with another value of a field that a run keeps (`config.resume`),
    and while another process trains in it.
    """
    run_dir = Path(recipe.run_dir)
    path, stages = run_dir / "recipe.json", started_stages(run_dir)
    # Orbax reads the directory's name as a glob pattern when it commits a checkpoint, and would not find it.
    odd = set("*?[") & set(os.path.abspath(run_dir))
    require(not odd, "run_dir", recipe.run_dir, f"checkpoints cannot be written below a name with {' '.join(odd)}")
    if path.exists() and stages:  # a start that failed leaves no rows
        old, new = leaves(Recipe.from_json(path.read_text())), leaves(recipe)
        for name in old | new:  # fields of an optional section may be in one of them only
            before, after = (side[name].value if name in side else None for side in (old, new))
            if before != after and not (new | old)[name].may_change(stages):
                message = f"{run_dir} holds a run with {before!r}; keep that value or give another --run-dir"
                raise ConfigError(name, after, message)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", recipe.run_dir, f"cannot be created: {error.strerror}") from None
    if jax.process_index() == 0:
        _lock(run_dir)
        write_atomically(path, recipe.to_json())
        if not stages and recipe.data.tokenizer.startswith("bpe:"):
            (run_dir / "tokenizer.json").unlink(missing_ok=True)  # of a start that failed, perhaps on other text
    multihost_utils.sync_global_devices("run_dir")
    return run_dir


def started_stages(run_dir: Path) -> set[str]:
    """The stages that have written metrics; rejection sampling also once its training data are written."""
    stages = {row["stage"] for row in read_rows(run_dir / "metrics.jsonl")}
    return stages | ({"rejection"} if (run_dir / "rejection.jsonl").exists() else set())


def _lock(run_dir: Path) -> None:
    """Hold a lock until the process ends: two processes in one directory would overwrite each other's files."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        message = "another process trains there; end it, or give another directory"
        raise ConfigError("run_dir", str(run_dir), message) from None
    except OSError as error:
        logger.warning(
            "%s: the file system has no locks (%s); do not start a second process there", run_dir, error.strerror
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, also after a kill, finds either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def add_summary(run_dir: Path, rows: Mapping[str, str]) -> None:
    """Add names and formatted values to `summary.json`, the first table of the report."""
    path = run_dir / "summary.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write_atomically(path, json.dumps(before | dict(rows), indent=2) + "\n")
