"""Profiles, checkpoints by time, rewinding to a step, memory that runs out, and the watchdog."""

import dataclasses
import gzip
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mla_moe import ConfigError
from mla_moe.config import CheckpointConfig, DataConfig, MeshConfig, ModelConfig, ProfileConfig, Recipe, TrainingConfig
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training import next_token, watchdog
from mla_moe.training.checkpoint_schedule import CheckpointSchedule
from mla_moe.training.console import Console
from mla_moe.training.errors import InterruptedRun, TrainingHaltedError
from mla_moe.training.metrics import read_rows
from mla_moe.training.preemption import PreemptionSignals
from mla_moe.training.pretrain import PretrainTrainer, pretrain
from mla_moe.training.run_directory import open_run_directory


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Pretrain a tiny model, with changes to its recipe."""
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    model = ModelConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=32, first_k_dense_replace=1,
    )  # fmt: skip
    recipe = Recipe(
        run_dir=str(tmp_path / "run"), model=model, mesh=MeshConfig(),
        data=DataConfig(train=(str(tmp_path / "text.txt"),), heldout=(), shuffle_buffer_size=2, prefetch=1),
        training=TrainingConfig(steps=5, batch_size=2, sequence_length=16),
        checkpoint=CheckpointConfig(every=1, max_to_keep=2, keep_every=2),
    )  # fmt: skip

    def start(**changes):
        changed = dataclasses.replace(recipe, **changes)
        pretrain(changed, open_run_directory(changed), Console(enabled=True))

    return start


@pytest.mark.slow
def test_a_run_is_profiled_and_rewound_to_a_checkpoint(run, tmp_path, capsys, monkeypatch):
    """One run: traces two steps, writes its program, keeps every second checkpoint, and resumes from step 2 once."""
    run_dir, profile, counted = tmp_path / "run", ProfileConfig(steps="2:3", hlo=True), []
    monkeypatch.setattr(next_token, "train_flops_per_token", lambda *_, **__: counted.append(1) or 1e6)
    with pytest.raises(ConfigError, match=r"resume_step = 2: the last stage has no such checkpoint; there are: none"):
        run(resume_step=2)
    run(profile=profile)
    assert counted == [1], "counting FLOPs takes as long as some steps"
    (trace,) = run_dir.glob("profile/pretrain/plugins/profile/*/*.xplane.pb")
    steps = [event for event in events(trace) if event[0] == "train"]
    assert [dict(stats)["step_num"] for _, stats in steps] == [2, 3]
    stablehlo = (run_dir / "profile/pretrain/train_step.stablehlo.mlir").read_text()
    compiled = (run_dir / "profile/pretrain/train_step.compiled.hlo").read_text()
    for scope in ("attention", "mlp"):
        assert f"/{scope}/" in stablehlo, scope
        assert f"/{scope}/" in compiled, scope

    folder, first = run_dir / "checkpoints" / "pretrain", losses(run_dir)
    assert names(folder) == ["2", "4", "5"]
    with pytest.raises(ConfigError, match=r"resume_step = 3: .* there are: 2, 4, 5"):
        run(resume_step=3)
    run(resume_step=2)
    assert names(folder) == ["2", "4", "4.after_2", "5", "5.after_2"]
    assert "resumed from the checkpoint of step 2" in capsys.readouterr().out
    assert losses(run_dir) == first
    run(resume_step=2)
    assert "rewound to step 2 before" in capsys.readouterr().out
    assert names(folder) == ["2", "4", "4.after_2", "5", "5.after_2"]


@pytest.mark.slow
def test_a_run_that_says_it_is_stopped_is_saved(run, tmp_path, monkeypatch):
    """Also if the signal arrives once the loop has decided that nothing is due after step 1."""
    stop = PreemptionSignals.stop

    def then_signal(self, step):
        stopped = stop(self, step)
        if step == 1 and not stopped:
            signal.raise_signal(signal.SIGTERM)
        return stopped

    monkeypatch.setattr(PreemptionSignals, "stop", then_signal)
    with pytest.raises(InterruptedRun, match="stopped at step 2 by SIGTERM"):
        run(checkpoint=CheckpointConfig(every=100))
    assert names(tmp_path / "run" / "checkpoints" / "pretrain") == ["2"]


@pytest.mark.slow
def test_memory_that_runs_out_is_explained(run, tmp_path, monkeypatch):
    def step(self, number, state, batch):
        return state, {"load_LE": jnp.zeros((1 << 47,), jnp.uint8)}

    monkeypatch.setattr(PretrainTrainer, "step", step)
    names = r"out of memory: a device needs \S+ KiB of parameters, \S+ KiB of optimizer, \S+ \w+ of temporaries; "
    with pytest.raises(TrainingHaltedError, match=names) as error:
        run()
    profile = Path(re.search(r"what it held is in (\S+)", str(error.value))[1])
    assert b"cpu:0" in gzip.decompress(profile.read_bytes()).lower()


def events(trace):
    data = jax.profiler.ProfileData.from_file(str(trace))
    return [(event.name, list(event.stats)) for plane in data.planes for line in plane.lines for event in line.events]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def losses(run_dir):
    return [(row["step"], row["loss"]) for row in read_rows(run_dir / "metrics.jsonl")]


def test_checkpoints_by_time_are_asked_for_rarely():
    """Two seconds per step, every minute: saved after each 30 steps, with few questions. As in a run, the first step is
    dispatched in no time."""
    now, asked, saved = 0.0, 0, []

    def clock():
        nonlocal asked
        asked += 1
        return now

    schedule = CheckpointSchedule(CheckpointConfig(every=1000, every_minutes=1.0), 0, clock)
    for step in range(1, 301):
        now += 2.0 if step > 1 else 0.0
        if schedule.is_due(step):
            saved.append(step)
            schedule.saved(step)
    assert saved == list(range(31, 301, 30))
    assert asked < 100
    by_steps = CheckpointSchedule(CheckpointConfig(every=7), 10)
    assert [step for step in range(11, 30) if by_steps.is_due(step)] == [14, 21, 28]


HANG = """
import sys, threading
from pathlib import Path
from watchdog import Watchdog
def collective_that_never_ends():
    threading.Event().wait()
with Watchdog(0.5 / 60, Path(sys.argv[1])) as watchdog:
    watchdog.progress("step 7 of pretrain")
    collective_that_never_ends()
"""


def test_a_step_that_hangs_ends_the_process_with_its_stacks(tmp_path):
    command = [sys.executable, "-c", HANG, str(tmp_path / "stacks.txt")]
    environment = os.environ | {"PYTHONPATH": str(Path(watchdog.__file__).parent)}  # alone: JAX takes seconds to import
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 1
    assert "error: step 7 of pretrain did not finish" in done.stderr
    for text in (done.stderr, (tmp_path / "stacks.txt").read_text()):
        assert "in collective_that_never_ends" in text
        assert "in _watch" in text
