"""The directory of a run: its recipe, its lock, and what may change in the recipe when the run resumes."""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mla_moe.checkpoint.bucket_run import close_run, open_run, synchronize
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.config import ConfigError, Recipe, load_recipe, require
from mla_moe.config.files import read_json_object
from mla_moe.config.resume import STAGES
from mla_moe.training.metrics import read_rows, write_atomically
from mla_moe.training.resume_changes import record_changes, require_steps_of_one_size, stated_changes

logger = logging.getLogger(__name__)


def open_run_directory(recipe: Recipe) -> Path:
    """Create the run's directory, or open it to resume the run in it, and write `recipe.json`. For a bucket's URL it is
    a mirror, which `checkpoint.bucket_run.close_run` uploads at last.

    Raises `ConfigError` if the directory has a run with another value of a field that a run keeps (`config.resume`),
    files with the names of a run's that are no run's, and while another process trains in it.
    """
    require(recipe.run_dir != "", "run_dir", "", "name a directory; the run's files would be mixed with those here")
    odd = set("*?[") & set(os.path.abspath(recipe.run_dir))
    # Orbax reads the directory's name as a glob pattern when it commits a checkpoint, and would not find it.
    require(not odd, "run_dir", recipe.run_dir, f"checkpoints cannot be written below a name with {' '.join(odd)}")
    run_dir = open_run(recipe.run_dir)
    try:
        _prepare(recipe, run_dir)
    except BaseException:
        close_run(run_dir, failed=True)
        raise
    return run_dir


def _prepare(recipe: Recipe, run_dir: Path) -> None:
    path, stages = run_dir / "recipe.json", started_stages(run_dir)
    read_summary(run_dir)  # now, rather than when the first stage has finished
    former = load_recipe(path) if path.exists() else None
    changes = stated_changes(former, recipe, stages) if former and stages else {}  # a failed start leaves no rows
    require_steps_of_one_size(run_dir, recipe)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "name a directory that can be written"
        raise ConfigError("run_dir", recipe.run_dir, f"cannot be created: {error.strerror}; {fix}") from None
    if jax.process_index() == 0:
        _lock(run_dir)
        if former and changes:
            record_changes(run_dir, former, changes, stages)
        write_atomically(path, recipe.to_json())
        if former and not stages and recipe.data.tokenizer.startswith("bpe:"):
            (run_dir / "tokenizer.json").unlink(missing_ok=True)  # of a start that failed, perhaps on other text
    synchronize(run_dir, "run_dir")


def started_stages(run_dir: Path) -> set[str]:
    """The stages that have written metrics or a checkpoint; rejection sampling also once its training data are
    written."""
    stages = {row["stage"] for row in read_rows(run_dir / "metrics.jsonl")}
    stages |= {stage for stage in STAGES if _has_checkpoint(run_dir, stage)}
    return stages | ({"rejection"} if (run_dir / "rejection.jsonl").exists() else set())


def later_stage_has_checkpoint(run_dir: Path, stage: str) -> bool:
    """Whether a stage after this one resumes from its own checkpoint, and so needs none of this stage."""
    return any(_has_checkpoint(run_dir, later) for later in STAGES[STAGES.index(stage) + 1 :])


def _has_checkpoint(run_dir: Path, stage: str) -> bool:
    return any(path.name.isdecimal() for path in (run_dir / "checkpoints" / stage).glob("*"))


def rewind(checkpoints: CheckpointManager, run_dir: Path, step: int, log: Callable[[str], None]) -> None:
    """Rename the checkpoints after `step`, so that the stage resumes from it. `resume_step.json` remembers the step:
    the same command again, as of a launcher that restarts it, resumes from the newest checkpoint that is left. Raises
    `ConfigError` if the step has no checkpoint."""
    path = run_dir / "resume_step.json"
    if path.exists() and read_json_object(path, "run_dir").get("step") == step:
        log(f"rewound to step {step} before ({path}); resuming from the newest checkpoint")
        return
    saved = ", ".join(map(str, checkpoints.steps)) or "none"
    require(
        step in checkpoints.steps, "resume_step", step, f"the last stage has no such checkpoint; there are: {saved}"
    )
    checkpoints.rewind(step)
    if jax.process_index() == 0:
        write_atomically(path, json.dumps({"step": step}) + "\n")
    multihost_utils.sync_global_devices("rewound")  # no process reads the file before all have decided


def _lock(run_dir: Path) -> None:
    """Hold a lock until the process ends: two processes in one directory would overwrite each other's files."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        message = "another process trains there; end it, or give another directory"
        raise ConfigError("run_dir", str(run_dir), message) from None
    except OSError as error:
        message = "%s: the file system has no locks (%s); do not start a second process there"
        logger.warning(message, run_dir, error.strerror)


def add_summary(run_dir: Path, rows: Mapping[str, str]) -> None:
    """Add names and formatted values to `summary.json`, the first table of the report."""
    write_atomically(run_dir / "summary.json", json.dumps(read_summary(run_dir) | dict(rows), indent=2) + "\n")


def read_summary(run_dir: Path) -> dict[str, str]:
    """The names and formatted values in `summary.json`; empty if there is none. Raises `ConfigError` for another file
    of that name."""
    path = run_dir / "summary.json"
    if not path.exists():
        return {}
    summary = read_json_object(path, "run_dir")
    ok = all(isinstance(value, str) for value in summary.values())
    require(ok, "run_dir", str(path), "is no summary of a run, which has texts by name; restore or remove it")
    return summary
