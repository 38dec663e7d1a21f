"""LoRA: the same training as in PEFT, on any mesh, in SFT and DPO runs that resume."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError, LoRAConfig
from mla_moe.checkpoint.base_reference import BaseReference
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.manager import CheckpointManager
from mla_moe.checkpoint.reader import load_arrays, open_adapter, open_checkpoint
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.console import Console
from mla_moe.training.dpo import train_dpo
from mla_moe.training.metrics import read_rows
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.sft import train_sft
from mla_moe.training.step import init_state, make_train_step

GOLDEN = Path(__file__).parents[1] / "golden"
TARGETS = {
    "attention": ("attention",),
    "shared": ("shared",),
    "experts": ("experts",),
    "all": ("attention", "shared", "experts", "dense", "router"),
}
CONSTANT = ScheduleConfig(peak_lr=0.01, warmup_fraction=0.0, decay_fraction=0.0)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("all", {}),
        pytest.param("all", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
        *(pytest.param(case, {}, marks=pytest.mark.slow) for case in ("attention", "shared", "experts")),
    ],
)
def test_training_is_that_of_peft(case, sizes):
    """20 steps of AdamW from the same adapters. The base stays as it is."""
    expected, source = np.load(GOLDEN / "lora" / "expected.npz"), open_checkpoint(GOLDEN / "lora" / "initial")
    mesh = make_mesh(MeshConfig(data=1, **sizes), jax.devices()[: 2 ** len(sizes)])
    model = AbstractModel(source.cfg, lora=LoRAConfig(rank=4, alpha=8.0, targets=TARGETS[case]))
    training = TrainingConfig(steps=20, batch_size=8, aux_loss_weight=0.0, router_bias_update_rate=0.0, loss_chunk=16)
    optimizer = OptimizerConfig(schedule=CONSTANT, weight_decay=0.0, max_grad_norm=1e9)
    tx = make_optimizer(optimizer, 20, model)
    arrays = load_arrays(source.unmerged(), model, mesh)
    base = {path: np.asarray(arrays[path]) for path in model.frozen_paths}
    state, step = init_state(model, tx, 0, mesh, arrays), make_train_step(model, tx, training, mesh)
    assert {path.split("/lora/")[1][-1] for path in state.params} == {"a", "b"}
    losses = []
    for tokens in expected["tokens"]:
        tokens = np.pad(tokens, ((0, 6), (0, 0)))  # eight sequences, for the mesh
        real = (np.arange(8) < 2)[:, None] * np.ones((8, 16), np.int32)
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": real, "positions": positions}
        state, metrics = step(state, {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()})
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses, expected[f"loss/{case}"], atol=1e-4, rtol=0)
    assert all(np.array_equal(state.frozen[path], base[path]) for path in base)
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments == 2 * sum(x.size for x in state.params.values())


def arrays_of(path):
    """The arrays of a checkpoint as they are stored, adapters apart."""
    source = open_checkpoint(path)
    return {name: np.asarray(source.array(name)) for name in source.paths}


@pytest.mark.slow
def test_a_run_stores_adapters_alone_resumes_and_is_converted(cfg, tmp_path, monkeypatch):
    """SFT, again from the checkpoint of step 3: bit for bit; then DPO, whose reference is where it starts."""
    monkeypatch.setattr("mla_moe.training.run_context.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
    model = dataclasses.replace(cfg, vocab_size=258, num_hidden_layers=2, num_nextn_predict_layers=0)
    base = mla_moe.Transformer(model, rngs=nnx.Rngs(0))
    mla_moe.save_pretrained(base, tmp_path / "base")
    pairs = [{"prompt": p, "chosen": c, "rejected": "no", "completion": c} for p, c in ("ab", "cd", "ef")]
    sft = [{name: pair[name] for name in ("prompt", "completion")} for pair in pairs]
    dpo = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    for name, rows in (("sft", sft), ("dpo", dpo)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    optimizer = OptimizerConfig(schedule=CONSTANT, weight_decay=0.0)
    common = {"batch_size": 2, "sequence_length": 32, "optimizer": optimizer}
    recipe = Recipe(
        run_dir=str(tmp_path / "run"),
        init_from=str(tmp_path / "base"),
        model=model,
        data=DataConfig(train=("nothing is read",), heldout=(), shuffle_buffer_size=2, prefetch=2),
        training=TrainingConfig(steps=0, loss_chunk=16),
        task=TaskConfig(template="{question}="),
        lora=LoRAConfig(rank=4, targets=("attention", "experts", "shared=2:8")),
        sft=SFTConfig(steps=6, data=(str(tmp_path / "sft.jsonl"),), **common),
        checkpoint=CheckpointConfig(every=3),
    )
    console = Console(enabled=False)
    train_sft(recipe, open_run_directory(recipe), console)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "sft")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    finished = arrays_of(tmp_path / "run")
    assert {name.rpartition("/lora/")[0] for name in finished if "/lora/" in name} == {
        "dense_layers/attention", "moe_layers/attention", "moe_layers/moe", "moe_layers/moe/shared",
    }  # fmt: skip
    again = dataclasses.replace(recipe, resume_step=3)
    train_sft(again, open_run_directory(again), console)
    resumed = arrays_of(tmp_path / "run")
    assert all(np.array_equal(resumed[name], finished[name]) for name in finished)

    tokens = jnp.arange(24)[None] + 40
    merged = mla_moe.load_pretrained(tmp_path / "run")
    logits = merged(tokens)
    assert np.abs(logits - base(tokens)).max() > 0.1
    convert(tmp_path / "run", tmp_path / "peft")
    convert(tmp_path / "run", tmp_path / "merged", merge_adapter=True)
    for path in ("peft", "merged"):
        np.testing.assert_allclose(mla_moe.load_pretrained(tmp_path / path)(tokens), logits, atol=1e-5)
    with pytest.raises(ConfigError, match=r"merge_adapter = True: .* has no adapters"):
        convert(tmp_path / "base", tmp_path / "other", merge_adapter=True)

    data = (str(tmp_path / "dpo.jsonl"),)
    then = dataclasses.replace(
        recipe, run_dir=str(tmp_path / "dpo"), init_from=str(tmp_path / "peft"), sft=SFTConfig(),
        dpo=DPOConfig(steps=2, data=data, heldout=data, beta=0.5, **common),
    )  # fmt: skip
    train_dpo(then, open_run_directory(then), console)
    losses = [row["eval/loss"] for row in read_rows(tmp_path / "dpo" / "metrics.jsonl") if "eval/loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[1] < losses[0]
    assert open_checkpoint(tmp_path / "dpo").base_name == str(tmp_path / "base")

    other = dataclasses.replace(then, run_dir=str(tmp_path / "other"), lora=LoRAConfig(rank=3))
    with pytest.raises(ConfigError, match=r"^lora = .* has adapters of other matrices or sizes"):
        train_dpo(other, open_run_directory(other), console)
    mla_moe.save_pretrained(mla_moe.Transformer(model, rngs=nnx.Rngs(1)), tmp_path / "new")
    (tmp_path / "base").rename(tmp_path / "old")
    with pytest.raises(ConfigError, match=r"^base = .*base.*: is the base of the adapters in .* cannot be opened"):
        open_checkpoint(tmp_path / "run")
    (tmp_path / "new").rename(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"^base = .* has changed since the adapters in .* were trained"):
        open_checkpoint(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^adapter = .*run': was trained with other weights, of .*; serve it with"):
        open_adapter(tmp_path / "run", open_checkpoint(tmp_path / "base"))
    with CheckpointManager(tmp_path / "run", "sft", recipe.checkpoint) as checkpoints:
        reference = checkpoints.base
    abstract, mesh = AbstractModel(model, lora=recipe.lora), make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"^base = .* has changed since the adapters in .* were trained"):
        reference.load(tmp_path / "run", abstract, mesh)
    changed = load_arrays(open_checkpoint(tmp_path / "base"), abstract, mesh, paths=abstract.frozen_paths)
    with pytest.raises(ConfigError, match=r"^base = .* has changed since the adapters in .* were trained"):
        BaseReference.create(tmp_path / "run", changed)

    (tmp_path / "base").rename(tmp_path / "new")
    (tmp_path / "old").rename(tmp_path / "base")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("run", "base"):
        (tmp_path / name).rename(elsewhere / name)
    assert open_checkpoint(elsewhere / "run").base_name == str(elsewhere / "base")
    with CheckpointManager(elsewhere / "run", "sft", recipe.checkpoint) as checkpoints:
        assert checkpoints.base.directory == str(elsewhere / "base")
