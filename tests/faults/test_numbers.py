"""Non-finite updates and loss spikes."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from mla_moe.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from mla_moe.data import Batches
from mla_moe.training import loss_monitor
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun, LossSpikeError, TrainingHaltedError
from mla_moe.training.loss_monitor import LossMonitor
from mla_moe.training.metrics import read_rows
from mla_moe.training.pretrain import pretrain
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.trainer import StepMetrics


def start(recipe, run_dir, **changes):
    recipe = dataclasses.replace(recipe, run_dir=str(run_dir), **changes)
    pretrain(recipe, open_run_directory(recipe), Console(enabled=True))


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row}


@pytest.mark.slow
def test_non_finite_updates_halt_the_run_and_save_the_batch(recipe, tmp_path):
    training = dataclasses.replace(recipe.training, max_skipped_steps=3)
    optimizer = OptimizerConfig("adamw", ScheduleConfig(peak_lr=1e38, warmup_fraction=0.0))
    with pytest.raises(
        TrainingHaltedError, match=r"not finite in 3 updates in a row \(training.max_skipped_steps\), up to step 4"
    ):
        start(recipe, tmp_path, training=training, optimizer=optimizer)
    assert [row["skipped"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 1, 1]
    with np.load(tmp_path / "skipped_pretrain_4.0.npz") as batch:
        assert batch["tokens"].shape == (8, 32)
        assert set(batch) == {"tokens", "targets", "segment_ids", "positions"}


def test_only_consecutive_skipped_updates_count(tmp_path):
    monitor = LossMonitor(TrainingConfig(max_skipped_steps=2), tmp_path, "rl", None)
    for step, skipped in enumerate([1, 0, 1, 0]):
        monitor.check(step, {"skipped": skipped, "loss": 1.0}, dict)
    with pytest.raises(TrainingHaltedError):
        monitor.check(4, {"skipped": 2, "loss": 1.0}, dict)


@pytest.fixture
def corrupted(monkeypatch):
    """Replaces the targets of the batches with these numbers by a byte that the data do not have."""

    def corrupt(numbers):
        taken, take = [], Batches.__next__

        def take_next(self):
            batch = take(self)
            taken.append(batch)
            if len(taken) in numbers:
                batch = batch | {"targets": np.full_like(batch["targets"], 200)}
            return batch

        monkeypatch.setattr(Batches, "__next__", take_next)
        return taken

    monkeypatch.setattr(loss_monitor, "WINDOW", 3)
    return corrupt


@pytest.mark.slow
def test_loss_spike_rewinds_to_the_newest_checkpoint(recipe, tmp_path, corrupted, capsys):
    taken = corrupted({7})
    start(recipe, tmp_path, training=dataclasses.replace(recipe.training, loss_spike_threshold=1.0))
    assert "rewinding to the newest checkpoint" in capsys.readouterr().out
    assert list(losses(tmp_path)) == list(range(1, 9))
    assert losses(tmp_path)[7] < losses(tmp_path)[6] + 1
    assert [row for row in read_rows(tmp_path / "metrics.jsonl") if "rewound" in row] == [
        {"step": 7, "stage": "pretrain", "rewound": 1}
    ]
    assert len(taken) == 10  # batches 7 and 8 (dispatched before the loss of 7 was known) are not read again


@pytest.mark.thorough
def test_repeated_loss_spikes_halt_the_run(recipe, tmp_path, corrupted):
    corrupted(range(7, 99))
    with pytest.raises(TrainingHaltedError, match="again after 3 rewinds to step 6"):
        start(recipe, tmp_path, training=dataclasses.replace(recipe.training, loss_spike_threshold=1.0))


def test_loss_spike_is_detected_after_a_restart_too(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_monitor, "WINDOW", 3)
    rows = [f'{{"step": {i}, "stage": "sft", "loss": {i}.0, "skipped": 0}}\n' for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    monitor = LossMonitor(TrainingConfig(loss_spike_threshold=2.0), tmp_path, "sft", 4)  # the mean of 2, 3 and 4
    monitor.check(5, {"skipped": 0, "loss": 5.0}, dict)
    with pytest.raises(LossSpikeError, match=r"loss spike in step 6: 6.001, from a mean of 4.000"):
        monitor.check(6, {"skipped": 0, "loss": 6.001}, dict)


@pytest.mark.slow
def test_signal_in_the_last_step_interrupts(recipe, tmp_path, monkeypatch):
    record = StepMetrics.record

    def then_stop(self, number, metrics, batch):
        record(self, number, metrics, batch)
        if number == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepMetrics, "record", then_stop)
    with pytest.raises(InterruptedRun, match="stopped at step 8 by SIGTERM"):
        start(recipe, tmp_path)
    assert (tmp_path / "checkpoints" / "pretrain" / "8").is_dir()
