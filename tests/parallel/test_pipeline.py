"""A pipeline computes the losses and gradients of one device. test_meshes.py has its collectives, and another mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from mla_moe import ConfigError, LoRAConfig, ModelConfig
from mla_moe.config import MeshConfig, OptimizerConfig, Recipe, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.block import Remat
from mla_moe.nn.loss import LossSums, loss_counts
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.pipeline import merge_groups, run_pipeline, split_groups
from mla_moe.parallel.sharding import check_divisible
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import init_state, make_train_step

B, T = 16, 16
ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
TWO_STAGES = make_mesh(MeshConfig(pipeline=2, data=2), jax.devices()[:4])


def packed_batch() -> dict[str, np.ndarray]:
    """Two documents of random lengths, and padding at the end of most sequences."""
    random = np.random.default_rng(0)
    batch = {key: np.zeros((B, T), np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    for b in range(B):
        first, second = random.integers(2, 9, 2)
        text = random.integers(0, 64, first + second + 1)
        batch["tokens"][b, : first + second], batch["targets"][b, : first + second] = text[:-1], text[1:]
        batch["segment_ids"][b, : first + second] = np.repeat([1, 2], [first, second])
        batch["positions"][b, : first + second] = np.concatenate([np.arange(first), np.arange(second)])
    return batch


@pytest.mark.parametrize("groups", [1, 3])
def test_every_microbatch_passes_through_all_layers_in_order(groups: int) -> None:
    """Layers `x -> x · w + w` do not commute. Sums leave the bubble out, and gradients are those of a loop."""
    w_L = jnp.arange(1.0, 5.0) / 4
    x_BTD = jax.random.normal(jax.random.key(0), (4 * groups, 2, 3))
    factor_BT = jnp.broadcast_to(jnp.arange(4 * groups)[:, None] % 5, (4 * groups, 2))

    def stage(w_l: jax.Array, x_bTD: jax.Array, factor_bT: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        sums = []
        for w in w_l:
            sums.append((x_bTD * factor_bT[..., None]).sum())
            x_bTD = x_bTD * w + w * factor_bT[..., None]
        return x_bTD, jnp.stack(sums)

    def loss(run: Any, w_L: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        y_BTD, sums_L = run(stage, w_L, x_BTD, factor_BT, groups)
        return jnp.sin(y_BTD).sum() + (sums_L * jnp.arange(4.0)).sum(), (y_BTD, sums_L)

    def reference(stage: Any, w_L: jax.Array, x_BTD: jax.Array, factor_BT: jax.Array, _: int) -> Any:
        return stage(w_L, x_BTD, factor_BT, 0)

    def values(run: Any) -> Any:
        return jax.jit(jax.value_and_grad(functools.partial(loss, run), (0, 1), has_aux=True))(w_L, x_BTD)

    expected = values(reference)
    with jax.set_mesh(TWO_STAGES):
        found = values(run_pipeline)
        x_GnTD = jax.jit(split_groups, static_argnums=1)(x_BTD, groups)
        np.testing.assert_array_equal(jax.jit(merge_groups)(x_GnTD), x_BTD)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


LORA = LoRAConfig(
    rank=2,
    targets=("moe_layers/attention/q_b", "moe_layers/attention/kv_b", "moe_layers/moe/down", "dense_layers/mlp/down"),
)
"""Adapters of some matrices, so that the same programs have gradients of them and of all other parameters."""


def gradients(
    cfg: ModelConfig, mesh: Mesh, microbatches: int | None = None, remat: Remat = "none"
) -> tuple[tuple[Any, LossSums], Arrays]:
    """The losses and gradients of a batch."""
    abstract_model = AbstractModel(cfg, remat=remat, lora=LORA)
    arrays, random = abstract_model.init(0, mesh), np.random.default_rng(1)
    for path in abstract_model.adapter_paths:  # B is 0 at the start
        values = random.standard_normal(arrays[path].shape).astype(np.float32)
        arrays[path] = jax.device_put(0.1 * values, arrays[path].sharding)
    batch = jax.device_put(packed_batch(), NamedSharding(mesh, BATCH_SPEC))
    params = {path: arrays[path] for path in (*abstract_model.adapter_paths, *abstract_model.frozen_paths)}
    biases = {path: arrays[path] for path in abstract_model.bias_paths}

    def loss(params: Arrays, biases: Arrays, batch: Any) -> tuple[jax.Array, LossSums]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model, mtp = abstract_model.merge(params | biases), cfg.num_nextn_predict_layers > 0
            s, n = model.loss_sums(batch, chunk=8, mtp=mtp, microbatches=microbatches), loss_counts(batch)
        return s.nats / n.targets + 0.3 * s.mtp_nats / n.mtp_targets + 0.01 * s.aux_loss / n.sequences, s

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, biases, batch))


DSA = {"model_type": "deepseek_v32", "index_topk": 5, "index_n_heads": 6, "index_head_dim": 10}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "microbatches", "remat", "fields"),
    [
        pytest.param(MeshConfig(pipeline=2, data=1, fsdp=2, expert=2), 4, "none", {}, marks=pytest.mark.thorough),
        (MeshConfig(pipeline=2, data=2, context=2), 4, "stage", {}),
        (MeshConfig(pipeline=4, data=1, tensor=2), 8, "full", {}),
        pytest.param(MeshConfig(pipeline=2, data=4), 2, "dots", DSA, marks=pytest.mark.thorough),
        (MeshConfig(pipeline=2, data=1, fsdp=2, expert=2), 4, "full", {"num_hidden_layers": 6}),
    ],
    ids=str,
)
def test_losses_and_gradients_equal_those_of_one_device(
    cfg: ModelConfig, sizes: MeshConfig, microbatches: int, remat: Remat, fields: dict[str, Any]
) -> None:
    """Of a dense layer, four layers with experts, or five, of which one is left over, and an MTP module, of packed
    sequences; of adapters too."""
    cfg = dataclasses.replace(cfg, **{"num_hidden_layers": 5} | fields)
    (loss, s), grads = gradients(cfg, ONE_DEVICE)
    (other_loss, other), other_grads = gradients(cfg, make_mesh(sizes), microbatches, remat)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_array_equal(other.load_LE, s.load_LE)
    assert other.aux_loss == pytest.approx(s.aux_loss, rel=1e-5)
    adapters = [path for path in grads if "/lora/" in path]
    assert len(adapters) == 2 * len(LORA.targets)
    assert min(np.abs(grads[path]).max() for path in adapters) > 0
    for path, grad in grads.items():
        assert np.abs(other_grads[path] - grad).max() <= 1e-5 * np.abs(grad).max(), path


@pytest.mark.slow
@pytest.mark.thorough
def test_microbatches_of_a_pipeline_are_those_of_gradient_accumulation(cfg: ModelConfig) -> None:
    """The metrics and the router biases of a step with four of them."""
    model = AbstractModel(cfg)
    training = TrainingConfig(steps=4, batch_size=B, gradient_accumulation_steps=4, loss_chunk=8)
    found = []
    for mesh in (ONE_DEVICE, TWO_STAGES):
        tx = make_optimizer(OptimizerConfig("muon"), 4, model)
        batch = jax.device_put(packed_batch(), NamedSharding(mesh, BATCH_SPEC))
        state, metrics = make_train_step(model, tx, training, mesh)(init_state(model, tx, 0, mesh), batch)
        found.append(jax.device_get((metrics, state.biases, state.params)))
    (metrics, biases, params), (other_metrics, other_biases, other_params) = found
    for name in metrics:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    for path in biases:
        np.testing.assert_array_equal(other_biases[path], biases[path])
    for path in params:
        np.testing.assert_allclose(other_params[path], params[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_hidden_states_with_replayed_routing_equal_those_of_one_device(cfg: ModelConfig) -> None:
    """As RL's update has them; by default with one microbatch for each stage. One layer of three is left over."""
    cfg = dataclasses.replace(cfg, num_hidden_layers=4)
    model, batch = AbstractModel(cfg), packed_batch()
    shape = B, T, cfg.num_moe_layers, cfg.num_experts_per_tok
    replay = np.random.default_rng(0).integers(-1, cfg.n_routed_experts, shape).astype(np.int16)
    inputs = batch["tokens"], batch["segment_ids"], batch["positions"], replay
    hidden, found = jax.jit(lambda model, *inputs: model.hidden(*inputs)), []
    for mesh in (ONE_DEVICE, TWO_STAGES):
        with jax.set_mesh(mesh):
            found.append(hidden(model.merge(model.init(0, mesh)), *inputs))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[0][1].load_E, found[1][1].load_E)


@pytest.mark.parametrize(
    ("training", "model", "message"),
    [
        ({}, {}, "training.gradient_accumulation_steps = 1: must be a multiple of 2: microbatches over the stages"),
        ({"gradient_accumulation_steps": 8}, {}, "training.batch_size = 16: must be a multiple of 32: gradient"),
        ({}, {"num_hidden_layers": 2}, "mesh.pipeline = 2: model has 1 MoE layers, .*; set at most 1"),
        ({}, DSA | {"model_type": "glm_moe_dsa", "indexer_types": ("full", "full", "shared")}, "share the keys"),
    ],
)
def test_what_does_not_fit_a_pipeline_is_refused(
    cfg: ModelConfig, training: dict[str, int], model: dict[str, Any], message: str
) -> None:
    training = {"batch_size": B, "sequence_length": 16, "gradient_accumulation_steps": 2 if model else 1} | training
    model_config = dataclasses.replace(cfg, vocab_size=258, **model)
    recipe = Recipe(run_dir="run", model=model_config, training=TrainingConfig(**training))
    with pytest.raises(ConfigError, match=message):
        check_divisible(recipe, make_mesh(MeshConfig(pipeline=2)))


def test_remat_of_a_stage_needs_a_pipeline(cfg: ModelConfig) -> None:
    recipe = Recipe(run_dir="run", model=cfg, training=TrainingConfig(remat="stage", sequence_length=16))
    with pytest.raises(ConfigError, match=r"training\.remat = 'stage': is for a pipeline; choose full"):
        check_divisible(recipe, ONE_DEVICE)
