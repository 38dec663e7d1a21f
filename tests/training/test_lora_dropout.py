"""Dropout of adapters' inputs: that of a plain computation with the same masks, on any mesh and with any remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, LoRAConfig, MLAttention, MoE, Transformer, add_adapters
from mla_moe.config import MeshConfig, OptimizerConfig, Recipe, ScheduleConfig, SFTConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.lora import DropoutKey, LoRA, adapter, seed_dropout
from mla_moe.nn.rope import rotary, rotate, softmax_scale
from mla_moe.ops.dropout import FeatureDropout, token_numbers
from mla_moe.parallel.mesh import make_mesh
from mla_moe.parallel.sharding import check_divisible
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import init_state, make_train_step

RATE, B, T = 0.4, 8, 6
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("attention", "dense", "shared", "experts", "router"), dropout=RATE)


def test_features_are_dropped_with_the_rate_and_the_mean_is_kept():
    """A part of the tokens and features has the masks of the whole."""
    drop = FeatureDropout(jnp.asarray([3, 5], jnp.uint32), token_numbers(40, 50), rate=RATE)
    y = np.asarray(drop(jnp.ones((40, 50, 4, 5))))
    assert set(np.unique(y)) == {0.0, np.float32(1 / (1 - RATE))}
    assert abs((y == 0).mean() - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / y.size)
    for axis in range(4):  # neighbours are independent
        assert (np.diff(y, axis=axis) != 0).mean() == pytest.approx(2 * RATE * (1 - RATE), abs=0.02)
    part = dataclasses.replace(drop, rows=drop.rows[7:9, 3:], first=10)
    np.testing.assert_array_equal(part(jnp.ones((2, 47, 2, 5))), y[7:9, 3:, 2:])


def adapted(module, seed=1):
    """The module with an adapter of each matrix, B too from a normal distribution, and dropout on."""
    random = np.random.default_rng(seed)
    for path, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Param) and node.get_metadata("role", None) == "matrix":
            *parents, name = path
            parent = module
            for key in parents:
                parent = getattr(parent, key)
            if not hasattr(parent, "lora"):
                parent.lora = nnx.Dict()
            lora = LoRA(node, 3, 2.0, dropout=RATE, rngs=nnx.Rngs(seed))
            lora.b[...] = jnp.asarray(random.standard_normal(lora.b.shape), jnp.float32)
            parent.lora[name] = lora
    seed_dropout(module, jax.random.key(seed))
    return module


def compare(module, reference):
    """Outputs of `module(x)` and `reference(module, x)`, and gradients of the adapters and of the input."""
    x = jax.random.normal(jax.random.key(2), (2, T, 12))
    graph, adapters, rest = nnx.split(module, nnx.All(nnx.Param, lambda path, _: "lora" in path), ...)
    found = []
    for run in (lambda module, x: module(x), reference):
        loss = lambda adapters, x: jnp.sin(run(nnx.merge(graph, adapters, rest), x)).sum()  # noqa: B023, E731
        found.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(adapters, x))
    for ours, wanted in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())


def dropped(module, name, x):
    """The input of an adapter, of tokens in the first two axes."""
    return adapter(module, name).feature_dropout(token_numbers(2, T))(x)


def test_experts_drop_the_inputs_of_their_adapters():
    """Every expert applied to every token; its experts' adapters drop the same features of a token."""

    def reference(moe, x):
        router, up, down = adapter(moe.router, "weight"), adapter(moe, "gate_up"), adapter(moe, "down")
        logits = x @ moe.router.weight[...] + 2 * dropped(moe.router, "weight", x) @ router.a[...] @ router.b[...]
        scores, chosen = jax.lax.top_k(jax.nn.sigmoid(logits), 2)
        weights = scores / scores.sum(axis=-1, keepdims=True) * moe.cfg.routed_scaling_factor
        h = jnp.einsum("btd,edgf->btegf", x, moe.gate_up[...])
        h += 2 * jnp.einsum("btd,edr,ergf->btegf", dropped(moe, "gate_up", x), up.a[...], up.b[...])
        h = jax.nn.silu(h[:, :, :, 0]) * h[:, :, :, 1]
        mask = dropped(moe, "down", jnp.ones((2, T, 8)))[:, :, None]
        y = jnp.einsum("btef,efd->bted", h, moe.down[...])
        y += 2 * jnp.einsum("btef,efr,erd->bted", h * mask, down.a[...], down.b[...])
        of_chosen = jnp.take_along_axis(y, chosen[..., None], axis=2)
        return (of_chosen * weights[..., None]).sum(axis=2)

    moe = MoE(hidden_size=12, num_experts=6, moe_intermediate_size=8, initializer_range=0.3, rngs=nnx.Rngs(0))
    compare(adapted(moe), reference)


def test_attention_drops_the_inputs_of_its_adapters():
    """Also of kv_b, whose adapter is added to its matrix where there is no dropout."""

    def reference(attention, x):
        def project(equation, x, name):
            weight, lora = getattr(attention, name)[...], adapter(attention, name)
            delta = (lora.a[...].reshape(-1, 3) @ lora.b[...].reshape(3, -1)).reshape(weight.shape)
            return jnp.einsum(equation, x, weight) + 2 * jnp.einsum(equation, dropped(attention, name, x), delta)

        cos_sin = rotary(attention.cfg, jnp.broadcast_to(jnp.arange(T), (2, T)))
        turn = lambda x: rotate(x, *cos_sin, interleaved=attention.cfg.rope_interleave)  # noqa: E731
        q = project("btq,qha->btha", attention.q_a_norm(project("btd,dq->btq", x, "q_a")), "q_b")
        q = jnp.concatenate([q[..., :4], turn(q[..., 4:])], axis=-1)
        both = project("btd,dc->btc", x, "kv_a")
        kv = project("btc,chk->bthk", attention.kv_a_norm(both[..., :6]), "kv_b")
        k_pe = jnp.broadcast_to(turn(both[:, :, None, 6:]), (2, T, 2, 2))
        k = jnp.concatenate([kv[..., :4], k_pe], axis=-1)
        scores = jnp.einsum("btha,bsha->bhts", q, k) * softmax_scale(attention.cfg)
        scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
        return project("bthv,hvd->btd", jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), kv[..., 4:]), "o")

    sizes = {"hidden_size": 12, "num_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 6}
    heads = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
    compare(adapted(MLAttention(**sizes, **heads, rngs=nnx.Rngs(0))), reference)


@pytest.fixture(scope="module")
def small(cfg):
    return dataclasses.replace(cfg, num_nextn_predict_layers=0)


def test_each_adapter_of_each_layer_has_a_key_of_its_own(small):
    model = Transformer(small, rngs=nnx.Rngs(0))
    add_adapters(model, LORA, rngs=nnx.Rngs(0))
    seed_dropout(model, jax.random.key(0))
    keys = np.concatenate([x.reshape(-1, 2) for x in jax.tree.leaves(nnx.state(model, DropoutKey))])
    assert len(keys) == len(np.unique(keys, axis=0)) == 7 + 2 * 10


@pytest.mark.slow
def test_steps_are_the_same_on_a_mesh_and_under_remat(small):
    """With two microbatches, whose losses are those of the model with their keys, and other masks in each step."""
    small = dataclasses.replace(small, num_hidden_layers=2)
    training = TrainingConfig(
        steps=2, batch_size=B, gradient_accumulation_steps=2, aux_loss_weight=0.0, router_bias_update_rate=0.0
    )
    schedule = ScheduleConfig(peak_lr=0.01, warmup_fraction=0.0, decay_fraction=0.0)
    tokens = np.random.default_rng(0).integers(0, 64, (B // 2, T + 1), np.int32)
    tokens = np.concatenate([tokens, tokens])  # the microbatches differ in their masks alone
    ones, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": positions}
    losses = []
    for settings, kept in (({}, "none"), ({"expert": 2, "tensor": 2, "context": 2}, "full")):
        mesh = make_mesh(MeshConfig(**{"data": 1} | settings), jax.devices()[: 2 ** len(settings)])
        model = AbstractModel(small, lora=LORA, remat=kept)
        arrays = model.init(0, mesh)
        random = np.random.default_rng(1)
        for path in model.adapter_paths:
            drawn = 0.3 * random.standard_normal(arrays[path].shape).astype(np.float32)
            arrays[path] = jax.device_put(drawn, arrays[path].sharding)
        one = model.merge(arrays) if not settings else one
        tx = make_optimizer(OptimizerConfig(schedule=schedule, weight_decay=0.0), 2, model)
        own = jax.tree.map(jnp.copy, arrays)
        state, step = init_state(model, tx, 0, mesh, own), make_train_step(model, tx, training, mesh, 5)
        values = []
        for _ in range(2):
            state, metrics = step(state, {name: jnp.asarray(x) for name, x in batch.items()})
            values.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        losses.append(values)
    np.testing.assert_allclose(*losses, rtol=2e-5)

    @jax.jit
    def loss(state, key, batch):
        model = nnx.merge(graph, state)
        seed_dropout(model, key)
        return model.loss_sums(batch, chunk=T, mtp=False).nats

    graph, state = nnx.split(one)
    half = {name: jnp.asarray(x[: B // 2]) for name, x in batch.items()}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 2)
    of_keys = [float(loss(state, key, half)) for key in keys]
    assert abs(of_keys[0] - of_keys[1]) > 1e-3
    assert losses[0][0][0] == pytest.approx(sum(of_keys) / (B * T), rel=1e-5)


def test_dropout_that_no_stage_has_is_refused(small):
    """And that of a pipeline."""
    common = {"run_dir": "", "model": small, "training": TrainingConfig(steps=0), "lora": LORA}
    with pytest.raises(ConfigError, match=r"^lora.dropout = 0.4: is for SFT and the fine-tuning of rejection"):
        Recipe(**common)
    recipe = Recipe(**common, sft=SFTConfig(steps=1, data=("x",), sequence_length=8))
    with pytest.raises(ConfigError, match=r"^lora.dropout = 0.4: has no key for each microbatch of a pipeline"):
        check_divisible(recipe, make_mesh(MeshConfig(pipeline=2)))


def test_dropout_without_adapters_is_refused():
    with pytest.raises(ConfigError, match=r"^lora.dropout = 0.1: needs adapters; set lora.rank"):
        LoRAConfig(dropout=0.1)
    with pytest.raises(ConfigError, match=r"^lora.dropout = 1.0: must be a probability below 1"):
        LoRAConfig(rank=1, dropout=1.0)
