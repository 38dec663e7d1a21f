import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.ops.cross_entropy import reference
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.loss import has_second_target, loss_counts, loss_sums
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, init_state, make_eval_step, make_train_step, update_router_biases

TRAINING = TrainingConfig(steps=10, batch_size=8, sequence_length=16, loss_chunk=8, router_bias_update_rate=0.5)
OPTIMIZER = OptimizerConfig("adamw", ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.0, decay_fraction=0.0))


def packed_batch(B=8, T=16, seed=0):
    """Documents of random lengths, and padding at the end of most rows."""
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


def with_prompts(batch):
    """The same batch, of which about half the targets count."""
    return batch | {"loss_mask": jnp.asarray(np.random.default_rng(1).integers(0, 2, batch["tokens"].shape), jnp.int32)}


def run(
    abstract_model, training=TRAINING, mesh_sizes=None, batches=(0,), optimizer=OPTIMIZER, change=lambda batch: batch
):
    mesh = make_mesh(mesh_sizes) if mesh_sizes else make_mesh(MeshConfig(), jax.devices()[:1])
    tx = make_optimizer(optimizer, training.steps, abstract_model)
    state = init_state(abstract_model, tx, 0, mesh)
    step = make_train_step(abstract_model, tx, training, mesh)
    for seed in batches:
        state, metrics = step(state, change(packed_batch(seed=seed)))
    return state, metrics


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for path in a.params:
        np.testing.assert_allclose(a.params[path], b.params[path], rtol=rtol, atol=atol, err_msg=path)
    for path in a.biases:
        np.testing.assert_array_equal(a.biases[path], b.biases[path])


def test_sums_are_the_plain_losses(cfg, abstract_model):
    model = abstract_model.merge(abstract_model.init(0, make_mesh(MeshConfig(), jax.devices()[:1])))
    batch = packed_batch()
    s, size = jax.jit(lambda m, b: loss_sums(m, b, chunk=4, mtp=True))(model, batch), loss_counts(batch)
    place = batch["segment_ids"], batch["positions"]
    h, stats = jax.jit(lambda m, *b: m.hidden(*b))(model, batch["tokens"], *place)
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    np.testing.assert_allclose(s.nats, reference(h, model.head[...], batch["targets"], real), rtol=1e-5)
    assert int(size.tokens) == int(real.sum())
    assert s.load_LE.shape == (3, cfg.n_routed_experts)
    assert (s.load_LE.sum(axis=1) == size.tokens * cfg.num_experts_per_tok).all()
    np.testing.assert_array_equal(s.load_LE[:2], stats.load_E)
    # the prediction module, document by document: its last token has no second target
    h2, _ = jax.jit(lambda m, *b: m.mtp_hidden(*b))(model, h, batch["targets"], *place)
    log_p = np.asarray(jax.nn.log_softmax(model.logits(h2)))
    nats = count = 0
    for b in range(8):
        for segment in range(1, int(batch["segment_ids"][b].max()) + 1):
            where = np.flatnonzero(np.asarray(batch["segment_ids"][b]) == segment)
            for i in where[:-1]:
                nats, count = nats - log_p[b, i, batch["targets"][b, i + 1]], count + 1
    assert int(size.mtp_tokens) == count == int(has_second_target(batch).sum())
    assert float(s.mtp_nats) == pytest.approx(nats, rel=1e-4)


def test_targets_that_are_not_learned_do_not_count(cfg, abstract_model):
    model = abstract_model.merge(abstract_model.init(0, make_mesh(MeshConfig(), jax.devices()[:1])))
    batch = with_prompts(packed_batch())
    size, s = loss_counts(batch), jax.jit(lambda m, b: loss_sums(m, b, chunk=4, mtp=True))(model, batch)
    place = batch["segment_ids"], batch["positions"]
    h, _ = jax.jit(lambda m, *b: m.hidden(*b))(model, batch["tokens"], *place)
    h2, _ = jax.jit(lambda m, *b: m.mtp_hidden(*b))(model, h, batch["targets"], *place)
    log_p, log_p2 = (np.asarray(jax.nn.log_softmax(model.logits(x))) for x in (h, h2))
    segments, targets, learned = (np.asarray(batch[key]) for key in ("segment_ids", "targets", "loss_mask"))
    nats = np.zeros(2)
    count = np.zeros(2, int)
    for b, t in np.ndindex(segments.shape):
        if segments[b, t] and learned[b, t]:
            nats[0], count[0] = nats[0] - log_p[b, t, targets[b, t]], count[0] + 1
        if t + 1 < segments.shape[1] and segments[b, t] == segments[b, t + 1] != 0 and learned[b, t + 1]:
            nats[1], count[1] = nats[1] - log_p2[b, t, targets[b, t + 1]], count[1] + 1
    assert 0 < count[0] < int(size.read) == int((segments > 0).sum())
    assert (int(size.tokens), int(size.mtp_tokens)) == tuple(count)
    np.testing.assert_allclose((s.nats, s.mtp_nats), nats, rtol=1e-4)


def test_prompts_give_no_gradient(abstract_model):
    """Other targets where they do not count change no loss and no gradient. (The prediction module reads them.)"""
    arrays = abstract_model.init(0, make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = with_prompts(packed_batch())
    other = batch | {"targets": jnp.where(batch["loss_mask"] != 0, batch["targets"], (batch["targets"] + 7) % 64)}
    params = {path: arrays[path] for path in abstract_model.param_paths}

    @jax.jit
    def grad(params, batch):
        def loss(params):
            return loss_sums(abstract_model.merge(arrays | params), batch, chunk=8, mtp=False).nats

        return jax.value_and_grad(loss)(params)

    for a, b in zip(*(jax.tree.leaves(grad(params, b)) for b in (batch, other)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "how",
    [
        {"training": dataclasses.replace(TRAINING, gradient_accumulation_steps=2)},
        {"mesh_sizes": MeshConfig(data=1, fsdp=4, tensor=2)},
    ],
)
def test_learned_targets_add_up_over_parts_and_devices(abstract_model, how):
    _, m = run(abstract_model, change=with_prompts)
    _, n = run(abstract_model, change=with_prompts, **how)
    for name in ("loss", "mtp_loss", "grad_norm", "tokens", "load_LE"):
        np.testing.assert_allclose(m[name], n[name], rtol=1e-4, err_msg=name)


@pytest.mark.smoke
def test_training_learns_and_moves_everything(abstract_model):
    state, first = run(abstract_model)
    start = init_state(
        abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), 0, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    later, last = run(abstract_model, batches=(0,) * 10)
    assert last["loss"] < 0.8 * first["loss"]
    assert last["mtp_loss"] < first["mtp_loss"]
    assert int(later.step) == 10
    for path in state.params:
        assert jnp.abs(state.params[path] - start.params[path]).max() > 0, path
    for path in state.biases:
        assert jnp.abs(state.biases[path]).max() == 0.5, path


@pytest.mark.parametrize("gradient_accumulation_steps", [pytest.param(2, marks=pytest.mark.thorough), 8])
def test_accumulation_is_one_large_batch(abstract_model, gradient_accumulation_steps):
    whole, m = run(abstract_model)
    parts, n = run(
        abstract_model, dataclasses.replace(TRAINING, gradient_accumulation_steps=gradient_accumulation_steps)
    )
    for name in ("loss", "mtp_loss", "grad_norm", "aux_loss", "load_LE"):
        np.testing.assert_allclose(m[name], n[name], rtol=1e-4, err_msg=name)
    assert_close(whole, parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "sizes",
    [  # of more meshes test_meshes.py has every gradient
        *(
            pytest.param(loss_counts, marks=pytest.mark.thorough)
            for loss_counts in (MeshConfig(), MeshConfig(data=2, fsdp=4))
        ),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    ],
    ids=str,
)
def test_a_mesh_of_eight_computes_what_one_device_does(abstract_model, sizes):
    one, m = run(abstract_model)
    eight, n = run(abstract_model, mesh_sizes=sizes)
    for name in ("loss", "mtp_loss", "grad_norm", "load_LE"):
        np.testing.assert_allclose(m[name], n[name], rtol=1e-5, err_msg=name)
    # Adam's first step is a sign, which rounding decides where a gradient is nearly 0: compare gradients' moments.
    moments = [jax.tree.leaves(s.optimizer) for s in (one, eight)]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_state_lies_where_the_table_says(abstract_model):
    sizes = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    state, _ = run(abstract_model, mesh_sizes=sizes, optimizer=dataclasses.replace(OPTIMIZER, name="muon"))
    abstract = abstract_state(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), make_mesh(sizes))
    path = "moe_layers/moe/gate_up"
    assert abstract.params[path].sharding.shard_shape(abstract.params[path].shape) == (2, 4, 16, 2, 8)
    for keys, x in jax.tree_util.tree_leaves_with_path(state.optimizer):
        if getattr(keys[-1], "key", None) == path:
            assert x.sharding.shard_shape(x.shape) == (2, 4, 16, 2, 8)


def test_biases_move_against_the_load():
    biases = {"moe_layers/moe/router/bias": jnp.zeros((2, 3)), "mtp/block/moe/router/bias": jnp.ones(3)}
    load = jnp.array([[9, 0, 3], [4, 4, 4], [0, 1, 11]])
    moved = update_router_biases(biases, load, 0.25)
    assert moved["moe_layers/moe/router/bias"].tolist() == [[-0.25, 0.25, 0.25], [0, 0, 0]]
    assert moved["mtp/block/moe/router/bias"].tolist() == [1.25, 1.25, 0.75]


def test_a_prediction_module_that_is_not_run_stays_as_it_is(abstract_model):
    start = init_state(
        abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), 0, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    state, _ = run(abstract_model, dataclasses.replace(TRAINING, mtp_loss_weight=0.0))
    before, after = (s.params | s.biases for s in (start, state))
    for path in before:
        assert bool((before[path] == after[path]).all()) == path.startswith("mtp/"), path


def test_a_model_without_expert_layers_trains(cfg):
    dense = AbstractModel(dataclasses.replace(cfg, num_hidden_layers=1, first_k_dense_replace=1))
    _, metrics = run(dense, dataclasses.replace(TRAINING, mtp_loss_weight=0.0))
    assert int(metrics["skipped"]) == 0


def test_biases_freeze_at_the_end(abstract_model):
    training = dataclasses.replace(TRAINING, router_bias_freeze_fraction=0.8)
    two, ten = run(abstract_model, training, batches=range(2))[0], run(abstract_model, training, batches=range(10))[0]
    for path in two.biases:
        np.testing.assert_array_equal(two.biases[path], ten.biases[path])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(abstract_model):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = make_optimizer(OPTIMIZER, 10, abstract_model)
    good = init_state(abstract_model, tx, 0, mesh)
    broken = good._replace(params=good.params | {"norm/scale": good.params["norm/scale"].at[0].set(jnp.nan)})
    before = jax.tree.map(np.asarray, broken)
    after, metrics = make_train_step(abstract_model, tx, TRAINING, mesh)(broken, packed_batch())
    assert int(metrics["skipped"]) == 1
    assert int(after.step) == 1
    for a, b in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_is_the_sum_of_nats(abstract_model):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), 0, mesh)
    nats = make_eval_step(abstract_model, 8, mesh)(state, packed_batch())
    _, metrics = make_train_step(abstract_model, make_optimizer(OPTIMIZER, 10, abstract_model), TRAINING, mesh)(
        state, packed_batch()
    )
    np.testing.assert_allclose(nats / metrics["tokens"].astype(jnp.float32), metrics["loss"], rtol=1e-5)
