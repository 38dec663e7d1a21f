"""What a run writes about itself: `metrics.jsonl`, `expert_load.jsonl`, `samples.jsonl` and TensorBoard files.

A run that resumes at step N repeats the steps after N, so opening a writer first drops the rows that were written for
them. Curves of a run that was killed ten times are therefore the curves of one that never was.
"""

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mla_moe.config import ConfigError

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the rows of one stage of a run. Only one process of a run may open it; every row is on disk at return.

    `resume_step` is the last step whose result was restored, and None when the stage starts from its beginning: then
    nothing an earlier attempt wrote for this stage is kept.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, stage: str):
        self._stage = stage
        last_kept = -1 if resume_step is None else resume_step
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _RowFile(run_dir / "metrics.jsonl", stage, last_kept)
        self._load = _RowFile(run_dir / "expert_load.jsonl", stage, last_kept)
        self._samples = _RowFile(run_dir / "samples.jsonl", stage, last_kept)
        self._tensorboard = _TensorBoard(run_dir / "tensorboard" / stage, last_kept + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.ExitStack() as all_of_them:  # even where one finds the disk full
            for file in (self._metrics, self._load, self._samples, self._tensorboard):
                all_of_them.callback(file.close)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl`, in full precision. JSON has no NaN: it becomes null, counted in `non_finite`."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            finite["non_finite"] = len(values) - len(finite)
        self._metrics.append({"step": step, "stage": self._stage, **dict.fromkeys(values), **finite})
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_load(self, step: int, load: np.ndarray) -> None:
        """A row of `expert_load.jsonl`: `load[layers, experts]`, in any unit, as multiples of its layer's mean."""
        load = np.asarray(load, np.float64)
        mean = load.mean(axis=1, keepdims=True)
        relative = np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)
        self._load.append({"step": step, "stage": self._stage, "load": relative.round(3).tolist()})

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of `samples.jsonl`: each with `step`, `prompt`, `completion`, and what else is worth keeping."""
        for row in rows:
            self._samples.append({"step": row["step"], "stage": self._stage, **row})


class NullWriter:
    """The writer of processes other than the first."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, *_):
        return None

    write_load = append_samples = write


def read_rows(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, of one stage or of all, none if there is no file. A last line cut short by a kill
    is left out."""
    rows = [row for _, row in _lines(path)] if path.exists() else []
    return [row for row in rows if stage is None or row["stage"] == stage]


def seconds_in_steps(rows: Iterable[Mapping[str, Any]], log_every: int) -> float:
    """What a stage's steps took, whichever start did them: each row's seconds, times the steps since the row before.
    Before the first row that is `log_every`, for a run may begin where another stood."""
    timed = [(row["step"], row["step_seconds"]) for row in rows if row.get("step_seconds") is not None]
    before = [max(timed[0][0] - log_every, 0), *(step for step, _ in timed)] if timed else []
    return sum((step - last) * seconds for (step, seconds), last in zip(timed, before, strict=False))


class _RowFile:
    """A JSON-lines file open for appending, without the stage's rows after `last_kept`."""

    def __init__(self, path: Path, stage: str, last_kept: int):
        if path.exists():
            _drop_rows(path, stage, last_kept)
        self._path = path
        self._file = None

    def append(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _drop_rows(path: Path, stage: str, last_kept: int) -> None:
    """Rewrite `path` without the stage's rows after `last_kept`, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    dropped = 0
    with temporary.open("w", encoding="utf-8") as file:
        for line, row in _lines(path):
            if row["stage"] == stage and row["step"] > last_kept:
                dropped += 1
            else:
                file.write(line.rstrip("\n") + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if dropped:
        logger.info("%s: dropped %d rows of stage %s after step %d", path, dropped, stage, last_kept)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of `path` with its value. Only the last line may be broken: a write was interrupted there."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if next(file, None) is not None:
                    fix = f"is not JSON ({error}); delete that line"
                    raise ConfigError("run_dir", f"{path}:{number}", fix) from None
                logger.warning("%s:%d: the last line was cut short by a kill; left out", path, number)
                return
            yield line, row


class _TensorBoard:
    """A TensorBoard file that hides what earlier ones hold from `first_step` on.

    TensorBoard does that for a whole directory, hence one a stage. It names a file by the second, which two attempts
    may share; the number of files before keeps the names apart. Written by this thread: the one that tensorboardX has
    for it dies on a full disk, and leaves the run waiting for ever.
    """

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        earlier = len(list(directory.glob("*.tfevents.*")))
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{earlier:04d}"
        self._writer, self._flushed = RecordWriter(str(directory / name)), time.monotonic()
        self._add(0, file_version="brain.Event:2")
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > 1:  # which waits for the disk
            self._writer.flush()
            self._flushed = time.monotonic()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.write(Event(step=step, wall_time=time.time(), **what).SerializeToString())

    def close(self) -> None:
        self._writer.close()
