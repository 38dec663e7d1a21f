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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mla_moe.config import FORMAT_VERSION, ConfigError, require
from mla_moe.config.migrations import migrate_row
from mla_moe.training.trackers import Trackers

logger = logging.getLogger(__name__)
_MAX_LINE_BYTES = 64 << 20


class MetricsWriter(contextlib.ExitStack[None]):
    """Writes the rows of one stage. One process of a run may open it. Each row is flushed before the method returns."""

    def __init__(self, run_dir: Path, resume_step: int | None, stage: str, trackers: Trackers | None = None):
        """`resume_step` is the step of the restored checkpoint: rows of the stage after it are dropped. None drops all
        rows of the stage. `trackers` get the rows too, and are closed with the writer."""
        super().__init__()  # closes all files, even if one raises because the disk is full
        self._run_dir, self._stage, self._trackers = run_dir, stage, trackers
        if trackers:
            self.push(trackers)
        self._files: dict[str, TextIO] = {}
        last_kept = -1 if resume_step is None else resume_step
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "expert_load.jsonl", "samples.jsonl"):
            _drop_rows(run_dir / name, stage, last_kept)
        self._tensorboard = _TensorBoard(run_dir / "tensorboard" / stage, last_kept + 1)
        self.callback(self._tensorboard.writer.close)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row to `metrics.jsonl`, in full precision. NaN and infinity, which JSON does not have, become null
        and are counted in `non_finite`."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            finite["non_finite"] = len(values) - len(finite)
        row = {"format_version": FORMAT_VERSION, "step": step, "stage": self._stage, **dict.fromkeys(values), **finite}
        self._append("metrics.jsonl", row)
        for name, value in finite.items():
            self._tensorboard.add(step, summary=scalar(name, value))
        if self._trackers:
            self._trackers.log(self._stage, step, {name: value for name, value in values.items() if name in finite})

    def write_load(self, step: int, load: np.ndarray) -> None:
        """Append a row to `expert_load.jsonl`: `load[layers, experts]`, in any unit, divided by the layer's mean."""
        load = np.asarray(load, np.float64)
        mean = load.mean(axis=1, keepdims=True)
        relative = np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)
        row = {"step": step, "stage": self._stage, "load": relative.round(3).tolist()}
        self._append("expert_load.jsonl", row)

    def append_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to `samples.jsonl`, each with `step`, `prompt` and `completion`; more keys are kept."""
        rows = list(rows)
        if self._trackers:
            self._trackers.log_samples(self._stage, rows)
        for row in rows:
            self._append("samples.jsonl", {"step": row["step"], "stage": self._stage, **row})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._files:  # a dense model has no expert load
            self._files[name] = self.enter_context((self._run_dir / name).open("a", encoding="utf-8"))
        self._files[name].write(json.dumps(row, allow_nan=False) + "\n")
        self._files[name].flush()


class NullWriter(contextlib.ExitStack[None]):
    """The writer of processes other than the first, which writes nothing."""

    def write(self, *_: object) -> None:
        pass

    write_load = append_samples = write


def read_rows(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, of one stage or of all; none if there is no file. A truncated last line, which a
    kill leaves, or one of null bytes, which a loss of power leaves, is dropped. Rows of `metrics.jsonl` of older format
    versions get the current metric names.

    Raises `ConfigError` for another line that is not JSON, for a row that no run writes into a file of this name, and
    for one of a newer format version.
    """
    rows = (row for _, row in _lines(path))
    if path.name == "metrics.jsonl":
        rows = (migrate_row(row, path.name) for row in rows)
    return [row for row in rows if stage is None or row["stage"] == stage]


def seconds_in_steps(rows: Iterable[Mapping[str, Any]], log_every: int) -> float:
    """Duration of a stage's steps, over all restarts: the sum over rows of seconds per step times the steps since the
    row before. For the first row these are `log_every` steps, since a run may continue the full state of another."""
    timed = [(row["step"], row["step_seconds"]) for row in rows if row.get("step_seconds") is not None]
    previous = [max(timed[0][0] - log_every, 0), *(step for step, _ in timed)] if timed else []
    return sum((step - last) * seconds for (step, seconds), last in zip(timed, previous, strict=False))


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a text or its parts to a file, so that a reader, also after a kill, finds the old or the new file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _drop_rows(path: Path, stage: str, last_kept: int) -> None:
    """Remove the stage's rows after `last_kept` from `path`, if there is such a file."""
    dropped = 0

    def kept() -> Iterator[str]:
        nonlocal dropped
        for line, row in _lines(path):
            if row["stage"] == stage and row["step"] > last_kept:
                dropped += 1
            else:
                yield line.rstrip("\n") + "\n"

    if path.exists():
        write_atomically(path, kept())
    if dropped:
        logger.info("%s: dropped %d rows of stage %s after step %d", path, dropped, stage, last_kept)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of `path` with its value. The last line may be truncated, by a kill during a write, or null bytes,
    by a loss of power; it is logged."""
    if not path.exists():
        return
    require(path.is_file(), "run_dir", str(path), "is not a file; move it out of the run's directory")
    is_row, number = _IS_ROW.get(path.name, lambda row: True), 0
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            fits = len(line) < _MAX_LINE_BYTES
            require(fits, "run_dir", where, f"is a line of {_MAX_LINE_BYTES >> 20} MB or more; move the file away")
            try:
                row = json.loads(text := line.decode())
            except (ValueError, RecursionError) as error:
                if file.read(1) or not b'{"'.startswith(line.strip(b"\0 \r\n")[:2]):
                    raise ConfigError("run_dir", where, f"is not JSON ({error}); delete that line") from None
                logger.warning("%s: the last line is truncated, as by a kill; dropped", where)
                return
            fix = f"is not a row of {path.name}, but damaged or of another program; delete it, or move the file away"
            require(isinstance(row, dict) and is_row(row), "run_dir", where, fix)
            yield text, row


def _has_step(row: Mapping[str, Any]) -> bool:
    step = row.get("step")
    return type(step) is int and 0 <= step < 1 << 53 and isinstance(row.get("stage"), str)


def _is_metrics(row: Mapping[str, Any]) -> bool:
    others = (value for name, value in row.items() if name != "stage")
    return _has_step(row) and all(value is None or _is_number(value) for value in others)


def _is_load(row: Mapping[str, Any]) -> bool:
    layers = row.get("load")
    if not _has_step(row) or not isinstance(layers, list) or not all(isinstance(layer, list) for layer in layers):
        return False
    same = len({len(layer) for layer in layers}) == 1 and len(layers[0]) > 0
    return same and all(_is_number(load) and math.isfinite(load) for layer in layers for load in layer)


def _is_sample(row: Mapping[str, Any]) -> bool:
    evaluated = "kind" in row
    texts = [row.get(name) for name in ("prompt", "completion", *["answer"] * evaluated)]
    numbers = [row.get(name) for name in ("length", "accuracy") if evaluated]
    return _has_step(row) and all(isinstance(text, str) for text in texts) and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


_IS_ROW: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "metrics.jsonl": _is_metrics, "expert_load.jsonl": _is_load, "samples.jsonl": _is_sample
}  # fmt: skip


class _TensorBoard:
    """A TensorBoard file whose session start purges earlier files from `first_step` on.

    The purge holds for all files of a directory, so each stage has its own. File names have a resolution of a second,
    so they also get a number. Written without the thread of tensorboardX, which dies on a full disk and blocks the run.
    """

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        earlier = len(list(directory.glob("*.tfevents.*")))
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{earlier:04d}"
        self.writer, self._flushed = RecordWriter(str(directory / name)), time.monotonic()
        self.add(0, file_version="brain.Event:2")
        self.add(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        self.writer.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())
        if time.monotonic() - self._flushed > 1:  # a flush waits for the disk
            self.writer.flush()
            self._flushed = time.monotonic()
