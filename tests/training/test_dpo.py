"""Preference optimization: losses and gradients equal TRL's, on packed pairs."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.data import ChatEncoding, ChatRecords, PreferenceDataset, preference_eval_batches
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.console import Console
from mla_moe.training.dpo import train_dpo
from mla_moe.training.metrics import read_rows
from mla_moe.training.preferences import make_preference_step
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.step import init_state

GOLDEN = Path(__file__).parents[1] / "golden"
LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "dpo_norm": "sigmoid_norm"}
"""TRL's names."""


def ids(row):
    return [int(i) for i in row if i >= 0]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """TRL's results, and the pairs packed in two sequences, which two microbatches take. Token `i` is the character
    `i`; eos is added."""
    expected = np.load(GOLDEN / "dpo.npz")
    path = tmp_path_factory.mktemp("dpo") / "pairs.jsonl"
    spelled = {
        name: ["".join(map(chr, ids(row))) for row in expected[name]] for name in ("prompt", "chosen", "rejected")
    }
    rows = [dict(zip(spelled, row, strict=True)) for row in zip(*spelled.values(), strict=True)]
    path.write_text("\n".join(json.dumps(row | {k: row[k][:-1] for k in ("chosen", "rejected")}) for row in rows))
    encoding = ChatEncoding(lambda q: [ord(c) for c in q], lambda c: [ord(x) for x in c], 1, lambda c: [], False)
    pairs = PreferenceDataset(ChatRecords([str(path)], "dpo.data", encoding, 0.0, "preference"), 48)
    (batch,) = preference_eval_batches(pairs, batch_size=4, sequence_length=48)
    assert [len(set(row) - {0}) for row in batch["segment_ids"]] == [6, 4, 0, 0]
    return expected, batch


@pytest.mark.parametrize(
    "loss",
    [
        "dpo",
        pytest.param("ipo", marks=pytest.mark.slow),
        pytest.param("dpo_norm", marks=[pytest.mark.slow, pytest.mark.thorough]),
    ],
)
def test_losses_and_gradients_are_those_of_trl(golden, loss):
    expected, batch = golden
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    source = open_checkpoint(GOLDEN / "k2")
    model = AbstractModel(source.cfg)
    arrays, reference = (load_arrays(source, model, mesh) for _ in range(2))
    reference["head"] *= 0.75
    training = TrainingConfig(steps=1, gradient_accumulation_steps=2, batch_size=4, aux_loss_weight=0.0)
    # With a learning rate of 1 the update is the negative gradient.
    tx, before = optax.sgd(1.0), {name: np.asarray(x) for name, x in arrays.items()}
    step = make_preference_step(model, tx, training, DPOConfig(loss=loss, beta=0.3), mesh)
    state, metrics = step(init_state(model, tx, 0, mesh, arrays), reference, batch)
    np.testing.assert_allclose(metrics["loss"], expected[f"{LOSSES[loss]}/loss"], rtol=1e-5)
    rewards = [metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "accuracies", "margins")]
    np.testing.assert_allclose(rewards, expected["rewards"], rtol=1e-5, atol=1e-6)
    checked = 0
    for mapping in tensor_mappings(source.cfg):
        key = f"{LOSSES[loss]}/{mapping.name}"
        if key in expected:
            gradient = before[mapping.path] - np.asarray(state.params[mapping.path])
            ours = mapping.to_hf_tensor(gradient[mapping.index])
            np.testing.assert_allclose(ours, expected[key], rtol=1e-5, atol=1e-5 * np.abs(expected[key]).max())
            checked += 1
    assert checked == 6


ORDER = [
    ("red", "apple", "snow"),
    ("green", "pear", "night"),
    ("blue", "sky", "a very red rose"),
    ("white", "rice", "x"),
]


@pytest.mark.slow
def test_a_stage_learns_the_order_of_pairs(cfg, tmp_path, capsys, monkeypatch):
    """It starts from the reference policy, whose loss is log 2."""
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    shape = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "rope_scaling": None}
    model = dataclasses.replace(cfg, vocab_size=258, **shape)
    mla_moe.save_pretrained(mla_moe.Transformer(model, rngs=nnx.Rngs(0)), tmp_path / "base")
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in ORDER]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = (str(tmp_path / "pairs.jsonl"),)
    schedule = ScheduleConfig(peak_lr=3e-3, warmup_fraction=0.0, decay_fraction=0.0)
    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        init_from=str(tmp_path / "base"),
        model=model,
        data=DataConfig(train=("nothing is read",), heldout=(), shuffle_buffer_size=2, prefetch=2),
        training=TrainingConfig(steps=0, loss_chunk=16),
        task=TaskConfig(template="{question}="),
        dpo=DPOConfig(
            steps=12, data=data, heldout=data, batch_size=4, sequence_length=64, beta=0.5,
            optimizer=OptimizerConfig(schedule=schedule, weight_decay=0.0),
        ),
        checkpoint=CheckpointConfig(every=4),
    )  # fmt: skip

    def rows():
        names = ("step", "loss", "eval/loss", "eval/rewards/accuracies", "rewards/margins", "pairs")
        found = read_rows(tmp_path / "run" / "metrics.jsonl", "dpo")
        return [{name: row[name] for name in names if name in row} for row in found]

    train_dpo(recipe, open_run_directory(recipe), Console(enabled=True))
    first, *_, last = finished = rows()
    assert (first["step"], first["eval/loss"]) == (0, pytest.approx(np.log(2), abs=1e-6))
    assert finished[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert finished[1]["pairs"] >= 4
    assert (last["step"], last["eval/rewards/accuracies"]) == (12, 1)
    assert last["eval/loss"] < 0.5
    assert "4 records of the format preference" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "pairs.jsonl").write_text('{"question": "a", "completion": "b"}')
    with pytest.raises(ConfigError, match=r"^dpo.data = .*1 of 1 lines are malformed.*needs a list of messages"):
        train_dpo(
            dataclasses.replace(recipe, run_dir=str(tmp_path / "other")), tmp_path / "other", Console(enabled=False)
        )
