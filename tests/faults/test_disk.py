"""A full disk: the run halts with an error, saved checkpoints stay, and the same command resumes."""

import contextlib
import dataclasses
import errno
import os
import resource

import pytest

from mla_moe.checkpoint.data_position import StreamsHandler
from mla_moe.checkpoint.files import CheckpointSaveError
from mla_moe.training.console import Console
from mla_moe.training.metrics import MetricsWriter, read_rows
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory


def start(recipe, run_dir):
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir))
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


@contextlib.contextmanager
def no_file_beyond(size):
    """Like a full disk: the system limits the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # in Orbax's threads
@pytest.mark.slow
def test_checkpoint_on_a_full_disk(recipe, tmp_path, monkeypatch):
    save = StreamsHandler.save

    def save_on_a_full_disk(self, directory, args):
        if "4" in directory.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, directory, args)

    with monkeypatch.context() as patch:
        patch.setattr(StreamsHandler, "save", save_on_a_full_disk)
        with pytest.raises(CheckpointSaveError, match=r"could not be saved \(.*No space left.*same command resumes"):
            start(recipe, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints" / "pretrain").iterdir() if p.name.isdigit()] == ["2"]
    start(recipe, tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def write(run_dir, count, size):
    """Write rows until one exceeds the limit."""
    with no_file_beyond(size), MetricsWriter(run_dir, None, "sft") as rows:
        for step in range(count):
            rows.write(step, {"loss": 1.0, "lr": 0.5})


@pytest.mark.parametrize(("count", "size"), [(100, 2_000), (20, 1_300)], ids=["rows", "events"])
def test_metrics_on_a_full_disk(tmp_path, count, size):
    """The writer fails at once (a writer thread would make the run wait forever); complete rows stay."""
    with pytest.raises(OSError, match="File too large"):
        write(tmp_path, count, size)
    kept = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert kept == list(range(len(kept)))
    assert len(kept) > 10
    with MetricsWriter(tmp_path, kept[-1], "sft") as rows:
        rows.write(kept[-1] + 1, {"loss": 1.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [*kept, kept[-1] + 1]
