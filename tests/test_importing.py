"""The modules in other frameworks: the host's own training step, for 20 steps, against the same model in plain NNX."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import mla_moe

STEPS, VOCAB_SIZE, WIDTH = 20, 11, 16
OPTIMIZER = mla_moe.OptimizerConfig(weight_decay=0.1)


@pytest.fixture(scope="module")
def small(cfg):
    return dataclasses.replace(cfg, hidden_size=WIDTH, num_nextn_predict_layers=0)


class Host(nnx.Module):
    """The model that every framework builds: its own embedding, norm and head around our attention and experts."""

    def __init__(self, cfg: mla_moe.ModelConfig, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB_SIZE, WIDTH, rngs=rngs)
        self.attention = mla_moe.MLAttention(cfg, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.moe = mla_moe.MoE(cfg, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB_SIZE, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.embed(tokens)
        x += self.attention(x)
        y, stats = self.moe.with_stats(self.norm(x))
        return self.head(x + y), stats.load_E


class LinenHost(nn.Module):
    cfg: mla_moe.ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.Embed(VOCAB_SIZE, WIDTH, name="embed")(tokens)
        x += nnx.bridge.to_linen(mla_moe.MLAttention, self.cfg, name="attention")(x)
        moe = nnx.bridge.to_linen(mla_moe.MoE, self.cfg, name="moe")
        y, stats = moe(nn.RMSNorm(name="norm")(x), nnx_method="with_stats")
        return nn.Dense(VOCAB_SIZE, name="head")(x + y), stats.load_E


def batches() -> list[jax.Array]:
    return [jax.random.randint(jax.random.key(i), (4, 6), 0, VOCAB_SIZE) for i in range(STEPS)]


def mean_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, 1:], tokens[:, :-1]).mean()


def updated_bias(bias: jax.Array, load_E: jax.Array) -> jax.Array:
    load_E = load_E.astype(jnp.float32)
    return bias + 1e-3 * jnp.sign(load_E.mean() - load_E)


class Run(NamedTuple):
    model: Host
    losses: list[float]
    params: dict[str, Any]


@pytest.fixture(scope="module")
def ours(small) -> Run:
    """Plain NNX: `nnx.jit`, `nnx.value_and_grad`, `nnx.Optimizer`."""
    start = Host(small, nnx.Rngs(0))
    model = nnx.clone(start)
    optimizer = nnx.Optimizer(model, mla_moe.grouped_optimizer(model, OPTIMIZER, steps=STEPS), wrt=nnx.Param)

    @nnx.jit
    def step(model: Host, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
        def loss(model: Host) -> tuple[jax.Array, jax.Array]:
            logits, load_E = model(tokens)
            return mean_loss(logits, tokens), load_E

        (value, load_E), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        model.moe.router.bias[...] = updated_bias(model.moe.router.bias[...], load_E)
        return value

    losses = [float(step(model, optimizer, tokens)) for tokens in batches()]
    assert losses[-1] < losses[0]
    return Run(start, losses, nnx.to_pure_dict(nnx.state(model)))


def assert_same_run(run: Run, losses: list[float], after: Any, before: Any) -> None:
    np.testing.assert_allclose(losses, run.losses, rtol=0, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), after, run.params)
    unchanged = [
        jax.tree_util.keystr(path)
        for path, same in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.array_equal, before, after))
        if same
    ]
    assert not unchanged


def test_linen_has_every_weight_in_params(small):
    variables = jax.eval_shape(LinenHost(small).init, jax.random.key(0), batches()[0])
    assert set(variables) == {"params", "router_bias"}
    groups = nnx.traversals.flatten_mapping(mla_moe.parameter_groups(variables["params"]), sep="/")
    assert groups["moe/gate_up"] == groups["attention/q_b"] == "matrix"
    assert groups["embed/embedding"] == groups["head/kernel"] == "decayed"
    assert groups["attention/kv_a_norm/scale"] == groups["norm/scale"] == groups["head/bias"] == "undecayed"
    assert mla_moe.parameter_groups(variables["router_bias"])["moe"]["router"]["bias"] == "frozen"


@pytest.mark.slow
class LinenDropout(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = dict(hidden_size=8, num_heads=1, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)
        attention = nnx.bridge.to_linen(mla_moe.MLAttention, **sizes, dropout=0.5, initializer_range=1.0)
        return attention(x, rngs=self.make_rng("dropout")) if self.train else attention(x, deterministic=True)


def test_linen_gives_dropout_its_key():
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    variables = LinenDropout(train=False).init(jax.random.key(0), x)
    outputs = [LinenDropout(train=True).apply(variables, x, rngs={"dropout": jax.random.key(i)}) for i in (1, 2, 1)]
    assert bool((outputs[0] == outputs[2]).all())
    assert bool((outputs[0] != outputs[1]).any())


def test_linen_through_the_bridge(small, ours):
    host, start = LinenHost(small), nnx.to_pure_dict(nnx.state(ours.model))
    variables = jax.eval_shape(host.init, jax.random.key(0), batches()[0])
    assert set(variables) == {"params", "router_bias"}
    start["embed"] = {"embedding": start["embed"]["embedding"]}

    def with_our_values(tree: Any, values: Any) -> Any:
        if isinstance(tree, dict):
            return {key: with_our_values(node, values[key]) for key, node in tree.items()}
        return tree.replace_boxed(jnp.array(values)) if isinstance(tree, nn.meta.AxisMetadata) else jnp.array(values)

    params, biases = (with_our_values(variables[name], start) for name in ("params", "router_bias"))
    tx = mla_moe.grouped_optimizer(params, OPTIMIZER, steps=STEPS)
    state = TrainState.create(apply_fn=host.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState, biases: Any, tokens: jax.Array) -> tuple[TrainState, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits, load_E = state.apply_fn({"params": params, "router_bias": biases}, tokens)
            return mean_loss(logits, tokens), load_E

        (value, load_E), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), jax.tree.map(partial(updated_bias, load_E=load_E), biases), value

    losses = []
    for tokens in batches():
        state, biases, value = step(state, biases, tokens)
        losses.append(float(value))

    def merged(params: Any, biases: Any) -> Any:
        params = nn.unbox(params)
        params["moe"]["router"]["bias"] = nn.unbox(biases)["moe"]["router"]["bias"]
        return params

    assert_same_run(ours, losses, merged(state.params, biases), start)


@pytest.mark.slow
def test_pure_functions(ours):
    """`nnx.split`, then arrays alone: `jax.jit`, `jax.value_and_grad`, Optax."""
    graph, params, rest = nnx.split(ours.model, nnx.Param, ...)
    tx = mla_moe.grouped_optimizer(params, OPTIMIZER, steps=STEPS)

    @jax.jit
    def step(params: Any, rest: Any, moments: Any, tokens: jax.Array) -> tuple[Any, Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits, load_E = nnx.merge(graph, params, rest)(tokens)
            return mean_loss(logits, tokens), load_E

        (value, load_E), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        rest = jax.tree.map(partial(updated_bias, load_E=load_E), rest)
        return optax.apply_updates(params, updates), rest, moments, value

    moments, losses = tx.init(params), []
    for tokens in batches():
        params, rest, moments, value = step(params, rest, moments, tokens)
        losses.append(float(value))
    after = nnx.to_pure_dict(nnx.merge_state(params, rest))
    assert_same_run(ours, losses, after, nnx.to_pure_dict(nnx.state(ours.model)))


@pytest.mark.slow
def test_equinox_style_partition(ours):
    """The module is a tree itself. As `equinox.partition(model, equinox.is_inexact_array)` does, every float array is
    trainable, the router bias too: its gradient is 0, and its parameter group is frozen."""
    model = nnx.clone(ours.model)
    params, static = (
        jax.tree.map(lambda x, keep=keep: x if jnp.issubdtype(x.dtype, jnp.inexact) == keep else None, model)
        for keep in (True, False)
    )
    tx = mla_moe.grouped_optimizer(model, OPTIMIZER, steps=STEPS)

    @jax.jit
    def step(params: Host, moments: Any, tokens: jax.Array) -> tuple[Host, Any, jax.Array]:
        def loss(params: Host) -> tuple[jax.Array, jax.Array]:
            model = jax.tree.map(lambda a, b: b if a is None else a, params, static, is_leaf=lambda x: x is None)
            logits, load_E = model(tokens)
            return mean_loss(logits, tokens), load_E

        (value, load_E), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        params.moe.router.bias[...] = updated_bias(params.moe.router.bias[...], load_E)
        return params, moments, value

    moments, losses = tx.init(params), []
    for tokens in batches():
        params, moments, value = step(params, moments, tokens)
        losses.append(float(value))
    assert_same_run(ours, losses, nnx.to_pure_dict(nnx.state(params)), nnx.to_pure_dict(nnx.state(ours.model)))


@pytest.mark.slow
def test_haiku_style_dictionary(ours):
    """A pair of pure functions over a flat dictionary of plain arrays, as `haiku.transform` returns it."""
    graph, weights, biases = nnx.split(ours.model, nnx.Param, ...)
    shapes = nnx.to_flat_state(weights)

    def apply(params: dict[str, jax.Array], bias: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        filled = [(path, variable.replace(params["/".join(path)])) for path, variable in shapes]
        rest = jax.tree.map(lambda _: bias, biases)
        return nnx.merge(graph, nnx.from_flat_state(filled), rest)(tokens)

    params = {"/".join(path): variable.get_value() for path, variable in shapes}
    start, bias = dict(params), ours.model.moe.router.bias.get_value()
    tx = mla_moe.grouped_optimizer(weights, OPTIMIZER, steps=STEPS)

    @jax.jit
    def step(params: Any, bias: jax.Array, moments: Any, tokens: jax.Array) -> tuple[Any, jax.Array, Any, jax.Array]:
        def loss(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits, load_E = apply(params, bias, tokens)
            return mean_loss(logits, tokens), load_E

        (value, load_E), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), updated_bias(bias, load_E), moments, value

    moments, losses = tx.init(params), []
    for tokens in batches():
        params, bias, moments, value = step(params, bias, moments, tokens)
        losses.append(float(value))
    flat = nnx.traversals.flatten_mapping(ours.params, sep="/")
    bias_path = "moe/router/bias"
    before = start | {bias_path: ours.model.moe.router.bias.get_value()}
    assert_same_run(ours._replace(params=flat), losses, params | {bias_path: bias}, before)
