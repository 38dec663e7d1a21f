"""A disk without room: the run ends and says so, what was saved stays, and the same command goes on."""

import contextlib
import dataclasses
import errno
import os
import resource

import pytest

from mla_moe.checkpoint.manager import StreamsHandler
from mla_moe.training.console import Console
from mla_moe.training.loss_monitor import TrainingHaltedError
from mla_moe.training.metrics import MetricsWriter, read_rows
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory


def start(recipe, run_dir):
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir))
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


@contextlib.contextmanager
def no_file_beyond(size):
    """As good as full: the system refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Orbax's threads, which end so
def test_a_checkpoint_that_finds_no_room(recipe, tmp_path, monkeypatch):
    save = StreamsHandler.save

    def save_on_a_full_disk(self, directory, args):
        if "4" in directory.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, directory, args)

    with monkeypatch.context() as patch:
        patch.setattr(StreamsHandler, "save", save_on_a_full_disk)
        with pytest.raises(
            TrainingHaltedError, match=r"could not be saved \(.*No space left.*the same command goes on"
        ):
            start(recipe, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints" / "pretrain").iterdir() if p.name.isdigit()] == ["2"]
    start(recipe, tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def write(run_dir, count, size):
    """Rows, until one finds no room."""
    with no_file_beyond(size), MetricsWriter(run_dir, None, "sft") as rows:
        for step in range(count):
            rows.write(step, {"loss": 1.0, "lr": 0.5})


@pytest.mark.parametrize(("count", "size"), [(100, 2_000), (20, 1_300)], ids=["rows", "events"])
def test_rows_that_find_no_room(tmp_path, count, size):
    """The writer fails at once, where a thread of its own would let the run wait for ever; whole rows stay."""
    with pytest.raises(OSError, match="File too large"):
        write(tmp_path, count, size)
    kept = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert kept == list(range(len(kept)))
    assert len(kept) > 10
    with MetricsWriter(tmp_path, kept[-1], "sft") as rows:
        rows.write(kept[-1] + 1, {"loss": 1.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [*kept, kept[-1] + 1]
