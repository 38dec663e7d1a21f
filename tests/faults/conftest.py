import dataclasses

import jax
import numpy as np
import pytest

from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    SampleConfig,
    ScheduleConfig,
    TrainingConfig,
)
from mla_moe.parallel.mesh import make_mesh


@pytest.fixture(scope="session")
def recipe(cfg, tmp_path_factory):
    """A run of two seconds on random words."""
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(16):
        words = random.choice(["ab", "cde", "fgh", "ij"], random.integers(20, 100))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=258, num_nextn_predict_layers=0),
        data=DataConfig(train=(f"{folder}/*.txt",), heldout=(), shuffle_buffer_size=8, prefetch=2),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(peak_lr=5e-3, warmup_fraction=0.0)),
        mesh=MeshConfig(),
        training=TrainingConfig(steps=8, batch_size=8, sequence_length=32, loss_chunk=32),
        checkpoint=CheckpointConfig(every=2, max_to_keep=3),
        sample=SampleConfig(),
    )


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Faster than eight virtual devices on one core."""
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
