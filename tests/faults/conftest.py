import dataclasses

import jax
import numpy as np
import pytest

from mla_moe.recipe import Checkpoint, Data, Mesh, Optimizer, Recipe, Sample, Schedule, Training
from mla_moe.sharding import make_mesh


@pytest.fixture(scope="session")
def recipe(cfg, tmp_path_factory):
    """A run of two seconds, on made-up words."""
    folder, random = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(16):
        words = random.choice(["ab", "cde", "fgh", "ij"], random.integers(20, 100))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, num_hidden_layers=2, vocab_size=258, num_nextn_predict_layers=0),
        data=Data(train=(f"{folder}/*.txt",), heldout=(), shuffle_window=8, prefetch=2),
        optimizer=Optimizer("adamw", Schedule(peak=5e-3, warmup=0.0)),
        mesh=Mesh(),
        training=Training(steps=8, batch_size=8, sequence_length=32, loss_chunk=32),
        checkpoint=Checkpoint(every=2, keep=3),
        sample=Sample(),
    )


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Which is quicker than eight on one core."""
    monkeypatch.setattr("mla_moe.training.setup.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
