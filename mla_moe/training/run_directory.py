"""A run's directory: its recipe, and the signals that end it early."""

import dataclasses
import fcntl
import json
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from mla_moe.config import ConfigError, Recipe, require
from mla_moe.training.metrics import read_rows

logger = logging.getLogger(__name__)

# What may change between two starts of one run: how it computes, shows and saves, not what it learns.
FREE = (
    "run_dir",
    "mesh",
    "kernels.attention",
    "kernels.grouped_matmul",
    "kernels.dispatch",
    "checkpoint",
    "sample",
    "data.prefetch",
    "training.loss_chunk",
    "training.remat",
    "training.max_skipped_steps",
    "training.loss_spike_threshold",
    "training.log_every",
    "training.eval_every",
    "rl.micro_batch_size",
    "rl.max_num_seqs",
    "rl.eval_every",
)

# Sections that the first stage does not read. They may change until one of these stages has begun.
LATER = {
    "task": {"sft", "rl", "rejection"},
    "sft": {"sft", "rl", "rejection"},
    "rl": {"rl", "rejection"},
    "rejection": {"rejection"},
}


def open_run_directory(recipe: Recipe) -> Path:
    """Make the run's directory, or go on with the one there. `recipe.json` in it is complete and can be run again.

    Raises `ConfigError` when the directory holds a run whose recipe learns something else, and while another process
    trains there.
    """
    run_dir = Path(recipe.run_dir)
    path, stages = run_dir / "recipe.json", started_stages(run_dir)
    # Orbax takes the directory's name for a pattern when it finishes a checkpoint, and finds nothing.
    odd = set("*?[") & set(os.path.abspath(run_dir))
    require(not odd, "run_dir", recipe.run_dir, f"checkpoints cannot be written below a name with {' '.join(odd)}")
    if path.exists() and stages:  # a start that was refused leaves no rows
        old, new = (_flat(dataclasses.asdict(r)) for r in (Recipe.from_json(path.read_text()), recipe))
        for field in old | new:
            settled = stages & LATER.get(field.partition(".")[0], stages)
            if old.get(field) != new.get(field) and settled and not field.startswith(FREE):
                fix = f"{run_dir} holds a run with {old.get(field)!r}; keep that value or give another --run-dir"
                raise ConfigError(field, new.get(field), fix)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", recipe.run_dir, f"cannot be made: {error.strerror}") from None
    if jax.process_index() == 0:
        _lock(run_dir)
        write_atomically(path, recipe.to_json())
        if not stages and recipe.data.tokenizer.startswith("bpe:"):
            (run_dir / "tokenizer.json").unlink(missing_ok=True)  # of a start that was refused, perhaps of other text
    multihost_utils.sync_global_devices("run_dir")
    return run_dir


def started_stages(run_dir: Path) -> set[str]:
    """The stages of a run that have left rows, or chosen answers to learn."""
    stages = {row["stage"] for row in read_rows(run_dir / "metrics.jsonl")}
    return stages | ({"rejection"} if (run_dir / "rejection.jsonl").exists() else set())


def _lock(run_dir: Path) -> None:
    """Two processes that train in one directory would write over each other's rows and checkpoints."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)  # held until the process ends
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ConfigError("run_dir", str(run_dir), "another process trains there; end it, or give another") from None
    except OSError as error:
        logger.warning("%s: the file system has no locks (%s); start no second process there", run_dir, error.strerror)


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a run that is killed now, finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def add_summary(run_dir: Path, rows: Mapping[str, str]) -> None:
    """Put names and figures into `summary.json`, with which the report begins."""
    path = run_dir / "summary.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    write_atomically(path, json.dumps(before | dict(rows), indent=2) + "\n")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class PreemptionSignals:
    """Within this context Ctrl-C and SIGTERM do not break a step: they ask to stop after it. A second one does break.

    Of many processes any may be told; all stop after the same step, which JAX's coordination service settles.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._stopped_at: int | None = None

    def __enter__(self) -> Self:
        # With many processes SIGTERM belongs to the coordination service, which has taken it at its start.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in every process."""
        if jax.process_count() == 1:
            return self.received is not None
        if self._stopped_at is None and multihost_utils.reached_preemption_sync_point(step):
            self._stopped_at = step
        return self._stopped_at is not None

    @property
    def name(self) -> str:
        return (self.received or signal.SIGTERM).name

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
