import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mla_moe.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.loss import loss_counts, mtp_target_mask
from mla_moe.ops.cross_entropy import reference
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, init_state, make_eval_step, make_train_step, update_router_biases

TRAINING = TrainingConfig(
    steps=10, batch_size=8, sequence_length=16, loss_chunk=8, router_z_loss_weight=0.1, router_bias_update_rate=0.5
)
ROUTER = "moe_layers/moe/router/weight"
OPTIMIZER = OptimizerConfig("adamw", ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.0, decay_fraction=0.0))


def packed_batch(B=8, T=16, seed=0):
    """Packed sequences: documents of random lengths, and padding at the end of most sequences."""
    random = np.random.default_rng(seed)
    batch = {key: np.zeros((B, T), np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    for b in range(B):
        start = segment = 0
        while start < T - 2 and segment < 3:
            n, segment = min(int(random.integers(1, 9)), T - start), segment + 1
            document = random.integers(0, 64, n + 1)
            batch["tokens"][b, start : start + n], batch["targets"][b, start : start + n] = document[:-1], document[1:]
            batch["segment_ids"][b, start : start + n] = segment
            batch["positions"][b, start : start + n] = np.arange(n)
            start += n
    return {key: jnp.asarray(x) for key, x in batch.items()}


@pytest.fixture(scope="module")
def abstract_model(cfg):
    return AbstractModel(cfg)


def with_loss_mask(batch):
    """The same batch, with a `loss_mask` by which about half of the targets count."""
    return batch | {"loss_mask": jnp.asarray(np.random.default_rng(1).integers(0, 2, batch["tokens"].shape), jnp.int32)}


ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def compiled(abstract_model, training, mesh, optimizer):
    """The optimizer and the training step, shared between tests."""
    tx = make_optimizer(optimizer, training.steps, abstract_model)
    return tx, make_train_step(abstract_model, tx, training, mesh)


@functools.cache
def run(abstract_model, training=TRAINING, sizes=None, batches=(0,), optimizer=OPTIMIZER, change=lambda batch: batch):
    """State and last metrics after a step on each batch, from the same initial state."""
    mesh = make_mesh(sizes) if sizes else ONE_DEVICE
    tx, step = compiled(abstract_model, training, mesh, optimizer)
    state = init_state(abstract_model, tx, 0, mesh)
    for seed in batches:
        state, metrics = step(state, change(packed_batch(seed=seed)))
    return state, metrics


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for path in a.params:
        np.testing.assert_allclose(a.params[path], b.params[path], rtol=rtol, atol=atol, err_msg=path)
    for path in a.biases:
        np.testing.assert_array_equal(a.biases[path], b.biases[path])


def test_loss_sums_equal_the_reference(cfg, abstract_model):
    model = abstract_model.merge(abstract_model.init(0, ONE_DEVICE))
    batch = packed_batch()
    s, counts = jax.jit(lambda m, b: m.loss_sums(b, chunk=4, mtp=True))(model, batch), loss_counts(batch)
    sequences = batch["segment_ids"], batch["positions"]
    h, stats = jax.jit(lambda m, *b: m.hidden(*b))(model, batch["tokens"], *sequences)
    weights = (batch["segment_ids"] > 0).astype(jnp.float32)
    log_p, _ = reference(h, model.head[...], batch["targets"])
    np.testing.assert_allclose(s.nats, -(weights * log_p).sum(), rtol=1e-5)
    assert int(counts.targets) == int(weights.sum())
    assert s.load_LE.shape == (3, cfg.n_routed_experts)
    assert (s.load_LE.sum(axis=1) == counts.targets * cfg.num_experts_per_tok).all()
    np.testing.assert_array_equal(s.load_LE[:2], stats.load_E)
    # The MTP module, document by document: the last token of a document has no target.
    h2, _ = jax.jit(lambda m, *b: m.mtp_hidden(*b))(model, h, batch["targets"], *sequences)
    log_p = np.asarray(jax.nn.log_softmax(model.logits(h2)))
    nats = count = 0
    for b in range(8):
        for segment in range(1, int(batch["segment_ids"][b].max()) + 1):
            where = np.flatnonzero(np.asarray(batch["segment_ids"][b]) == segment)
            for i in where[:-1]:
                nats, count = nats - log_p[b, i, batch["targets"][b, i + 1]], count + 1
    assert int(counts.mtp_targets) == count == int(mtp_target_mask(batch).sum())
    assert float(s.mtp_nats) == pytest.approx(nats, rel=1e-4)


def test_masked_targets_do_not_count(cfg, abstract_model):
    model = abstract_model.merge(abstract_model.init(0, ONE_DEVICE))
    batch = with_loss_mask(packed_batch())
    counts, s = loss_counts(batch), jax.jit(lambda m, b: m.loss_sums(b, chunk=4, mtp=True))(model, batch)
    sequences = batch["segment_ids"], batch["positions"]
    h, _ = jax.jit(lambda m, *b: m.hidden(*b))(model, batch["tokens"], *sequences)
    h2, _ = jax.jit(lambda m, *b: m.mtp_hidden(*b))(model, h, batch["targets"], *sequences)
    log_p, log_p2 = (np.asarray(jax.nn.log_softmax(model.logits(x))) for x in (h, h2))
    segments, targets, mask = (np.asarray(batch[key]) for key in ("segment_ids", "targets", "loss_mask"))
    nats = np.zeros(2)
    count = np.zeros(2, int)
    for b, t in np.ndindex(segments.shape):
        if segments[b, t] and mask[b, t]:
            nats[0], count[0] = nats[0] - log_p[b, t, targets[b, t]], count[0] + 1
        if t + 1 < segments.shape[1] and segments[b, t] == segments[b, t + 1] != 0 and mask[b, t + 1]:
            nats[1], count[1] = nats[1] - log_p2[b, t, targets[b, t + 1]], count[1] + 1
    assert 0 < count[0] < int(counts.tokens_without_padding) == int((segments > 0).sum())
    assert (int(counts.targets), int(counts.mtp_targets)) == tuple(count)
    np.testing.assert_allclose((s.nats, s.mtp_nats), nats, rtol=1e-4)


def test_masked_targets_have_no_gradient(abstract_model):
    """Other values of masked targets change neither loss nor gradient. Without MTP, whose inputs they are."""
    arrays = abstract_model.init(0, ONE_DEVICE)
    batch = with_loss_mask(packed_batch())
    other = batch | {"targets": jnp.where(batch["loss_mask"] != 0, batch["targets"], (batch["targets"] + 7) % 64)}
    params = {path: arrays[path] for path in abstract_model.param_paths}

    @jax.jit
    def grad(params, batch):
        def loss(params):
            return abstract_model.merge(arrays | params).loss_sums(batch, chunk=8, mtp=False).nats

        return jax.value_and_grad(loss)(params)

    for a, b in zip(*(jax.tree.leaves(grad(params, b)) for b in (batch, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"training": dataclasses.replace(TRAINING, gradient_accumulation_steps=2)},
        {"sizes": MeshConfig(data=1, fsdp=4, tensor=2)},
    ],
)
@pytest.mark.slow
def test_masked_loss_adds_up_over_microbatches_and_devices(abstract_model, kwargs):
    _, m = run(abstract_model, change=with_loss_mask)
    _, n = run(abstract_model, change=with_loss_mask, **kwargs)
    for name in ("loss", "mtp_loss", "grad_norm", "tokens", "load_LE"):
        np.testing.assert_allclose(m[name], n[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.smoke
def test_training_lowers_the_loss_and_updates_every_parameter(abstract_model):
    state, first = run(abstract_model)
    start = init_state(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), 0, ONE_DEVICE)
    later, last = run(abstract_model, batches=(0,) * 10)
    assert last["loss"] < 0.8 * first["loss"]
    assert last["mtp_loss"] < first["mtp_loss"]
    assert int(later.step) == 10
    for path in state.params:
        assert jnp.abs(state.params[path] - start.params[path]).max() > 0, path
    for path in state.biases:
        assert jnp.abs(state.biases[path]).max() == 0.5, path


@pytest.mark.slow
def test_the_router_z_loss_is_added_with_its_weight(abstract_model):
    """To the gradient, of which Adam's first moment is a tenth: the mean over tokens, added over layers."""
    optimizer = dataclasses.replace(OPTIMIZER, beta1=0.9, max_grad_norm=1e9)
    without = dataclasses.replace(TRAINING, router_z_loss_weight=0.0)
    (state, m), (other, n) = (run(abstract_model, t, optimizer=optimizer) for t in (TRAINING, without))
    batch = packed_batch()
    counts, arrays = loss_counts(batch), abstract_model.init(0, ONE_DEVICE)

    @jax.jit
    def gradient(weight):
        def z_loss(weight):
            model = abstract_model.merge(arrays | {ROUTER: weight})
            return model.loss_sums(batch, chunk=8, mtp=True).z_loss / counts.tokens_without_padding

        return jax.value_and_grad(z_loss)(weight)

    z_loss, expected = gradient(arrays[ROUTER])
    assert float(z_loss) > 1
    np.testing.assert_allclose(m["router_z_loss"], z_loss / len(m["load_LE"]), rtol=1e-5)
    np.testing.assert_allclose(n["router_z_loss"], m["router_z_loss"], rtol=1e-5)
    moments = [optax.tree.get_all_with_path(s.optimizer, "mu")[0][1][ROUTER] for s in (state, other)]
    difference = 10 * (moments[0] - moments[1])
    np.testing.assert_allclose(difference, 0.1 * expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_accumulation_steps", [pytest.param(2, marks=pytest.mark.thorough), 8])
def test_gradient_accumulation_equals_the_full_batch(abstract_model, gradient_accumulation_steps):
    full, m = run(abstract_model)
    training = dataclasses.replace(TRAINING, gradient_accumulation_steps=gradient_accumulation_steps)
    accumulated, n = run(abstract_model, training)
    for name in ("loss", "mtp_loss", "grad_norm", "aux_loss", "router_z_loss", "load_LE"):
        np.testing.assert_allclose(m[name], n[name], rtol=1e-4, err_msg=name)
    assert_close(full, accumulated, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "sizes",
    [  # test_meshes.py compares every gradient on more meshes
        *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in (MeshConfig(), MeshConfig(data=2, fsdp=4))),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_step_on_eight_devices_equals_one_device(abstract_model, sizes):
    one, m = run(abstract_model)
    eight, n = run(abstract_model, sizes=sizes)
    for name in ("loss", "mtp_loss", "grad_norm", "router_z_loss", "load_LE"):
        np.testing.assert_allclose(m[name], n[name], rtol=1e-5, err_msg=name)
    # Adam's first update is the gradient's sign, which depends on rounding near 0: compare the moments instead.
    moments = [jax.tree.leaves(s.optimizer) for s in (one, eight)]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_state_is_sharded_by_the_rules(abstract_model):
    sizes = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    state, _ = run(abstract_model, sizes=sizes, optimizer=dataclasses.replace(OPTIMIZER, name="muon"))
    abstract = abstract_state(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), make_mesh(sizes))
    path = "moe_layers/moe/gate_up"
    assert abstract.params[path].sharding.shard_shape(abstract.params[path].shape) == (2, 4, 16, 2, 8)
    for keys, x in jax.tree_util.tree_leaves_with_path(state.optimizer):
        if getattr(keys[-1], "key", None) == path:
            assert x.sharding.shard_shape(x.shape) == (2, 4, 16, 2, 8)


def test_router_bias_update_goes_against_the_load():
    biases = {"moe_layers/moe/router/bias": jnp.zeros((2, 3)), "mtp/block/moe/router/bias": jnp.ones(3)}
    load = jnp.array([[9, 0, 3], [4, 4, 4], [0, 1, 11]])
    updated = update_router_biases(biases, load, 0.25)
    assert updated["moe_layers/moe/router/bias"].tolist() == [[-0.25, 0.25, 0.25], [0, 0, 0]]
    assert updated["mtp/block/moe/router/bias"].tolist() == [1.25, 1.25, 0.75]


@pytest.mark.slow
def test_an_mtp_module_without_loss_is_not_updated(abstract_model):
    start = init_state(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), 0, ONE_DEVICE)
    state, _ = run(abstract_model, dataclasses.replace(TRAINING, mtp_loss_weight=0.0))
    before, after = (s.params | s.biases for s in (start, state))
    for path in before:
        assert bool((before[path] == after[path]).all()) == path.startswith("mtp/"), path


def test_a_model_without_moe_layers_trains(cfg):
    dense = AbstractModel(dataclasses.replace(cfg, num_hidden_layers=1, first_k_dense_replace=1))
    _, metrics = run(dense, dataclasses.replace(TRAINING, mtp_loss_weight=0.0))
    assert int(metrics["skipped"]) == 0


@pytest.mark.slow
def test_router_biases_freeze_at_the_end(abstract_model):
    training = dataclasses.replace(TRAINING, router_bias_freeze_fraction=0.8)
    two, ten = run(abstract_model, training, batches=range(2))[0], run(abstract_model, training, batches=range(10))[0]
    for path in two.biases:
        np.testing.assert_array_equal(two.biases[path], ten.biases[path])


def test_an_update_that_is_not_finite_is_skipped_and_counted(abstract_model):
    tx, step = compiled(abstract_model, TRAINING, ONE_DEVICE, OPTIMIZER)
    good = init_state(abstract_model, tx, 0, ONE_DEVICE)
    broken = good._replace(params=good.params | {"norm/scale": good.params["norm/scale"].at[0].set(jnp.nan)})
    before = jax.tree.map(np.asarray, broken)
    after, metrics = step(broken, packed_batch())
    assert int(metrics["skipped"]) == 1
    assert int(after.step) == 1
    for a, b in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_eval_step_is_the_summed_cross_entropy(abstract_model):
    state = init_state(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), 0, ONE_DEVICE)
    nats = make_eval_step(abstract_model, 8, ONE_DEVICE)(state, packed_batch())
    _, metrics = run(abstract_model)
    np.testing.assert_allclose(nats / metrics["tokens"].astype(jnp.float32), metrics["loss"], rtol=1e-5)
