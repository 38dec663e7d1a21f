"""Flax's sharding metadata, and meshes by `jax.make_mesh` with axes of any name, Explicit and Auto."""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mla_moe
from mla_moe import ConfigError
from mla_moe.config import MeshConfig
from mla_moe.inference.weights import mesh_of
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import BATCH_SPEC, MeshView, make_mesh, physical_spec

VOCAB_SIZE, BATCH_SIZE, LENGTH = 16, 8, 6


class Model(nnx.Module):
    """A model of one's own: embedding and head are Flax's, the head annotated with a mesh axis as Flax does."""

    def __init__(self, cfg: mla_moe.ModelConfig, rngs: nnx.Rngs):
        D = cfg.hidden_size
        self.embed = nnx.Param(0.1 * rngs.normal((VOCAB_SIZE, D)))
        self.attention = mla_moe.MLAttention(cfg, rngs=rngs)
        self.moe = mla_moe.MoE(cfg, rngs=rngs)
        self.head = nnx.Param(0.1 * rngs.normal((D, VOCAB_SIZE)), out_sharding=(None, "tp"), eager_sharding=False)

    def __call__(self, one_hot_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = one_hot_BTV @ self.embed
        x += self.attention(x)
        y, stats = self.moe.with_stats(x)
        return (x + y) @ self.head, stats.load_E


@pytest.fixture(scope="module")
def model(cfg):
    return Model(dataclasses.replace(cfg, num_attention_heads=4), nnx.Rngs(0))


class Step(NamedTuple):
    loss: jax.Array
    load_E: jax.Array
    params: Any


def train_step(model: Model, mesh: jax.sharding.Mesh | None, batch_axes: Any = None) -> tuple[Step, str]:
    """One step of AdamW in plain JAX, and its program."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = mla_moe.grouped_optimizer(params, steps=10)
    one_hot = jax.nn.one_hot(np.random.default_rng(0).integers(0, VOCAB_SIZE, (BATCH_SIZE, LENGTH)), VOCAB_SIZE)

    def step(params: Any, rest: Any, one_hot: jax.Array) -> Step:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            logits, load_E = nnx.merge(graph, params, rest)(one_hot)
            return -(jax.nn.log_softmax(logits) * jnp.roll(one_hot, 1, axis=1)).sum(axis=-1).mean(), load_E

        (value, load_E), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return Step(value, load_E, optax.apply_updates(params, updates))

    if mesh is not None:
        params, rest = (jax.device_put(tree, mla_moe.named_shardings(tree, mesh)) for tree in (params, rest))
        one_hot = jax.device_put(one_hot, NamedSharding(mesh, P(batch_axes)))
    compiled = jax.jit(step).lower(params, rest, one_hot).compile()
    return compiled(params, rest, one_hot), compiled.as_text()


@pytest.fixture(scope="module")
def one_device(model):
    return train_step(model, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "batch_axes"),
    [
        ({"dp": "expert", "tp": "tensor"}, "dp"),
        ({"dp": "fsdp", "tp": "tensor"}, "dp"),
        ({"tp": "tensor", "ep": "expert"}, "ep"),
        ({"dp": "data", "ep": "expert"}, ("dp", "ep")),
        ({"cp": "context", "ep": "expert"}, "ep"),
    ],
    ids=lambda axes: "-".join(axes),
)
def test_a_step_under_explicit_axes_equals_one_under_auto_axes(model, one_device, axes, batch_axes):
    steps = {}
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 4), tuple(axes), axis_types=(kind, kind))
        with jax.set_mesh(mesh), mla_moe.use_mesh_axes(axes):
            steps[kind], program = train_step(model, mesh, batch_axes)
        assert ("all-to-all(" in program) == ("expert" in axes.values())
        assert steps[kind].params["moe"]["gate_up"].get_value().sharding.spec[0] == (
            next((theirs for theirs, ours in axes.items() if ours == "expert"), None)
        )
    for step in steps.values():
        np.testing.assert_array_equal(step.load_E, one_device.load_E)
        np.testing.assert_allclose(step.loss, one_device.loss, atol=1e-6)
    explicit, auto = steps.values()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), explicit.params, auto.params)


@pytest.mark.slow
def test_the_language_model_under_explicit_axes(cfg):
    model = mla_moe.Transformer(cfg, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 4))
    wanted = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    mesh = jax.make_mesh((2, 4), ("data", "replica"))
    with jax.set_mesh(mesh), mla_moe.use_mesh_axes(replica="fsdp"):
        nnx.update(model, jax.device_put(nnx.state(model), mla_moe.named_shardings(model, mesh)))
        sharded = jax.device_put(tokens, NamedSharding(mesh, P(("data", "replica"))))
        logits = jax.jit(lambda model, tokens: model(tokens))(model, sharded)
    assert jax.typeof(logits).sharding.spec == P(("data", "replica"), None, None)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


@pytest.mark.slow
def test_muon_under_explicit_axes_equals_muon_under_auto_axes(cfg):
    """Of stacked layers and experts; updates and momenta are sharded as the weights."""
    steps = []
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(kind, kind))
        with jax.set_mesh(mesh), mla_moe.use_mesh_axes(dp="expert", tp="tensor"):
            params = nnx.state(mla_moe.Transformer(cfg, rngs=nnx.Rngs(0)), nnx.Param)
            params = jax.device_put(params, mla_moe.named_shardings(params, mesh))
            tx = mla_moe.grouped_optimizer(params, mla_moe.OptimizerConfig(name="muon"), steps=10)
            gradient = jax.tree.map(lambda x: jnp.cos(100 * x), params)
            updates, state = jax.jit(tx.update)(gradient, jax.jit(tx.init)(params), params)
        if kind == AxisType.Explicit:
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
            names = [type.sharding.spec for type in map(jax.typeof, jax.tree.leaves(state)) if type.ndim > 1]
            assert P(None, "dp", None, None, "tp") in names
        steps.append(jax.tree.map(np.asarray, (updates, state)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), *steps)


def test_flax_finds_a_mesh_axis_for_every_sharded_weight(cfg):
    """`nnx.get_partition_spec` needs neither a mesh nor rules; `named_shardings` uses only axes that divide."""
    model = nnx.eval_shape(lambda: mla_moe.Transformer(cfg, rngs=nnx.Rngs(0)))
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
    assert specs["moe_layers"]["moe"]["gate_up"] == P(None, "expert", "fsdp", None, "tensor")
    assert specs["moe_layers"]["moe"]["down"] == P(None, "expert", ("tensor", "fsdp"), None)
    assert specs["moe_layers"]["attention"]["q_b"] == P(None, "fsdp", ("tensor", "expert"), None)
    assert specs["embed"] == P("tensor", ("fsdp", "expert"))
    assert specs["moe_layers"]["moe"]["router"]["bias"] == P(None, None)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    shardings = nnx.to_pure_dict(mla_moe.named_shardings(model, mesh))

    def names(spec: P) -> set[str]:
        return {name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())}

    def check(spec: P, sharding: NamedSharding) -> None:
        assert names(sharding.spec) <= names(spec)
        assert bool(names(sharding.spec)) == bool(names(spec))

    jax.tree.map(check, specs, shardings)
    assert shardings["moe_layers"]["attention"]["q_b"].spec == P(None, "fsdp", "tensor", None)  # two heads


def test_rules_of_ones_own(model):
    """Flax's rules win over ours; ours name the axes of the mesh in use; an optimizer's state is sharded alike."""
    rules = {"embed": "x", "heads": "y", "experts": "y", "expert_hidden": None, "hidden": "y"}
    with nnx.logical_axis_rules(tuple(rules.items())):
        assert nnx.get_partition_spec(nnx.state(model))["attention"]["o"].get_value() == P("y", None, "x")
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    shardings = mla_moe.named_shardings(model, mesh, rules)
    assert shardings["moe"]["gate_up"].get_value() == NamedSharding(mesh, P("y", "x", None, None))
    assert shardings["head"].get_value() == NamedSharding(mesh, P(None, None))  # the mesh has no axis tp
    with jax.set_mesh(mesh), mla_moe.use_mesh_axes(x="fsdp", y="tensor"):
        assert nnx.get_partition_spec(nnx.state(model))["moe"]["down"].get_value() == P(None, ("y", "x"), None)
        abstract = nnx.get_abstract_model(lambda: mla_moe.MoE(model.moe.cfg, rngs=nnx.Rngs(0)), mesh)[1]
    assert abstract["gate_up"].get_value().sharding.spec == P(None, "x", None, "y")
    optimizer = nnx.Optimizer(model.moe, optax.adam(1e-3), wrt=nnx.Param)
    moment = mla_moe.named_shardings(optimizer, mesh, rules)["opt_state"][0]["mu"]["gate_up"]
    assert moment.get_value().spec == P("y", "x", None, None)
    custom = nnx.clone(model.moe)
    mla_moe.set_sharding_rules(custom, {**mla_moe.sharding_rules, "expert_hidden": "tensor"})
    assert nnx.get_partition_spec(nnx.state(custom))["down"].get_value() == P("expert", "tensor", "fsdp")


def test_a_name_of_ours_may_have_another_meaning():
    """The axis `data` of this mesh means `fsdp`; then the mesh has no axis that means `data`."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    with mla_moe.use_mesh_axes(data="fsdp", expert="tensor"):
        assert MeshView(mesh).shape == {"pipeline": 1, "data": 1, "fsdp": 2, "expert": 1, "tensor": 4, "context": 1}
        assert physical_spec(P(*BATCH_SPEC, "tensor"), mesh) == P("data", None, "expert")
        weight = nnx.Param(jnp.ones((4, 4)), out_sharding=("embed", "expert"), eager_sharding=False)
        # A rule has this package's names; one that is in no rule is an axis of the mesh.
        assert mla_moe.named_shardings({"w": weight}, mesh)["w"].get_value().spec == P("data", "expert")


def test_a_checkpoint_is_loaded_sharded_by_the_meaning_of_axes(cfg):
    mesh = jax.make_mesh((2, 4), ("dp", "tp"))
    with mla_moe.use_mesh_axes(dp="expert", tp="tensor"):
        shardings = AbstractModel(cfg).shardings(mesh)
    assert shardings["moe_layers/moe/gate_up"] == NamedSharding(mesh, P(None, "dp", None, None, "tp"))


@pytest.mark.slow
def test_generate_on_a_mesh_with_some_of_the_axes(cfg):
    model, prompts = mla_moe.Transformer(cfg, rngs=nnx.Rngs(0)), [[1, 2, 3], [4]]
    wanted = mla_moe.generate(model, prompts, max_new_tokens=4)
    mesh = jax.make_mesh((2, 4), ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    nnx.update(model, jax.device_put(nnx.state(model), mla_moe.named_shardings(model, mesh)))
    assert mla_moe.generate(model, prompts, max_new_tokens=4) == wanted


@pytest.mark.parametrize(("axis", "kind"), [("data", AxisType.Explicit), ("dp", AxisType.Auto)])
def test_the_engine_refuses_other_axes(axis, kind):
    mesh = jax.make_mesh((8,), (axis,), axis_types=(kind,))
    embed = nnx.Param(jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P(axis))))
    with pytest.raises(ConfigError, match=f"mesh = .*{axis}.*: the engine needs axes of pipeline, data, fsdp"):
        mesh_of(SimpleNamespace(embed=embed))


@pytest.mark.parametrize("axes", [{"dp": "rows"}, {"a": "data", "b": "data"}])
def test_invalid_names_of_axes_are_an_error(axes):
    with pytest.raises(ConfigError, match="use_mesh_axes"):
        mla_moe.use_mesh_axes(axes)
