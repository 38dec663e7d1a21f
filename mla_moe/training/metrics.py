"""Metrics of a run: `metrics.jsonl`, `expert_load.jsonl`, `samples.jsonl` and TensorBoard files.

A run that resumes at step N repeats the steps after N. A writer therefore first drops the rows of these steps, so that
the curves of a run that was killed are those of an uninterrupted run.
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

from mla_moe.config import FORMAT_VERSION, ConfigError
from mla_moe.config.migrations import migrate_row

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the rows of one stage. One process of a run may open it. Each row is flushed before the method returns."""

    def __init__(self, run_dir: Path, resume_step: int | None, stage: str):
        """`resume_step` is the step of the restored checkpoint: rows of the stage after it are dropped. None drops all
        rows of the stage."""
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
        with contextlib.ExitStack() as stack:  # closes all files, even if one raises because the disk is full
            for file in (self._metrics, self._load, self._samples, self._tensorboard):
                stack.callback(file.close)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row to `metrics.jsonl`, in full precision. NaN and infinity, which JSON does not have, become null
        and are counted in `non_finite`."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            finite["non_finite"] = len(values) - len(finite)
        row = {"format_version": FORMAT_VERSION, "step": step, "stage": self._stage, **dict.fromkeys(values), **finite}
        self._metrics.append(row)
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_load(self, step: int, load: np.ndarray) -> None:
        """Append a row to `expert_load.jsonl`: `load[layers, experts]`, in any unit, divided by the layer's mean."""
        load = np.asarray(load, np.float64)
        mean = load.mean(axis=1, keepdims=True)
        relative = np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)
        self._load.append({"step": step, "stage": self._stage, "load": relative.round(3).tolist()})

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `samples.jsonl`, each with `step`, `prompt` and `completion`; more keys are kept."""
        for row in rows:
            self._samples.append({"step": row["step"], "stage": self._stage, **row})


class NullWriter:
    """The writer of processes other than the first, which writes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, *_: object) -> None:
        pass

    write_load = append_samples = write


def read_rows(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, of one stage or of all; none if there is no file. A truncated last line, which a
    kill leaves, is dropped. Rows of `metrics.jsonl` of older format versions get the current metric names.

    Raises `ConfigError` for another line that is not JSON, and for a row of a newer format version.
    """
    rows = (row for _, row in _lines(path)) if path.exists() else ()
    if path.name == "metrics.jsonl":
        rows = (migrate_row(row, path.name) for row in rows)
    return [row for row in rows if stage is None or row["stage"] == stage]


def seconds_in_steps(rows: Iterable[Mapping[str, Any]], log_every: int) -> float:
    """Duration of a stage's steps, over all restarts: the sum over rows of seconds per step times the steps since the
    row before. For the first row these are `log_every` steps, since a run may continue the full state of another."""
    timed = [(row["step"], row["step_seconds"]) for row in rows if row.get("step_seconds") is not None]
    previous = [max(timed[0][0] - log_every, 0), *(step for step, _ in timed)] if timed else []
    return sum((step - last) * seconds for (step, seconds), last in zip(timed, previous, strict=False))


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
    """Each line of `path` with its value. The last line may be truncated, by a kill during a write; it is logged."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if next(file, None) is not None:
                    message = f"is not JSON ({error}); delete that line"
                    raise ConfigError("run_dir", f"{path}:{number}", message) from None
                logger.warning("%s:%d: the last line is truncated, as by a kill; dropped", path, number)
                return
            yield line, row


class _TensorBoard:
    """A TensorBoard file whose session start purges earlier files from `first_step` on.

    The purge holds for all files of a directory, so each stage has its own. File names have a resolution of a second,
    so they also get a number. Written without the thread of tensorboardX, which dies on a full disk and blocks the run.
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
        if time.monotonic() - self._flushed > 1:  # a flush waits for the disk
            self._writer.flush()
            self._flushed = time.monotonic()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        self._writer.close()
