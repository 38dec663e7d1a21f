import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Precision, Transformer
from mla_moe.config import MeshConfig
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.parallel.mesh import make_mesh

run = jax.jit(lambda model, *batch: model(*batch))
TOKENS = jax.random.randint(jax.random.key(0), (2, 20), 0, 64)


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(cfg, rngs=nnx.Rngs(0))


@pytest.mark.smoke
def test_logits_are_float32(model, v2_cfg):
    for m in (model, Transformer(v2_cfg, rngs=nnx.Rngs(0))):
        logits = run(m, TOKENS)
        assert logits.shape == (2, 20, 64)
        assert logits.dtype == jnp.float32


def test_the_scan_equals_the_layers_one_by_one(model):
    @jax.jit
    def one_by_one(model):
        x = model.embedding(TOKENS)
        positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
        for name, count in (("dense_layers", 1), ("moe_layers", 2)):
            graph, state = nnx.split(getattr(model, name))
            for i in range(count):
                block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
                x += block.attention(block.attention_norm(x), positions=positions)
                x += (block.moe if block.experts else block.mlp)(block.mlp_norm(x))
        return model.logits(model.norm(x))

    np.testing.assert_allclose(run(model, TOKENS), one_by_one(model), rtol=1e-4, atol=1e-5)


def test_a_packed_sequence_equals_its_documents_alone(model):
    lengths = [7, 1, 12]
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths))[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = run(model, TOKENS[:1], segments, positions)
    start = 0
    for n in lengths:
        alone = run(model, TOKENS[:1, start : start + n])
        np.testing.assert_allclose(packed[:, start : start + n], alone, rtol=1e-4, atol=1e-5)
        start += n


def test_left_padding_changes_nothing(model):
    padded = jnp.pad(TOKENS[:1, :9], ((0, 0), (4, 0)))
    segments = (jnp.arange(13) >= 4).astype(jnp.int32)[None]
    logits = run(model, padded, segments, jnp.maximum(jnp.arange(13) - 4, 0)[None])
    np.testing.assert_allclose(logits[:, 4:], run(model, TOKENS[:1, :9]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_remat_and_the_scan_do_not_change_gradients(cfg):
    def gradients(settings):
        graph, params, rest = nnx.split(Transformer(cfg, rngs=nnx.Rngs(0), **settings), nnx.Param, ...)
        step = jax.jit(jax.grad(lambda p: nnx.merge(graph, p, rest)(TOKENS).var())).lower(params)
        return step.as_text().count("stablehlo.while"), jax.tree.leaves(step.compile()(params))

    loops, expected = gradients({})
    for settings in ({"remat": "dots"}, {"remat": "full"}, {"scan_layers": False}):
        found, gradient = gradients(settings)
        assert (found < loops) == (not settings.get("scan_layers", True))
        for a, b in zip(expected, gradient, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_mtp_predicts_from_the_hidden_state_and_the_next_token(model):
    h, _ = jax.jit(lambda m, t: m.hidden(t))(model, TOKENS)
    next_tokens = jnp.roll(TOKENS, -1, axis=1)
    predict = jax.jit(lambda m, h, t: m.mtp_hidden(h, t))
    y, stats = predict(model, h, next_tokens)
    assert y.shape == h.shape
    assert int(stats.load_E.sum()) == 2 * 20 * 2
    changed, _ = predict(model, h, next_tokens.at[0, 10].add(1))
    assert (changed[0, :10] == y[0, :10]).all()
    assert jnp.abs(changed[0, 10] - y[0, 10]).max() > 1e-4


def test_bfloat16_precision_keeps_the_router_in_float32(cfg):
    m = Transformer(cfg, rngs=nnx.Rngs(0), precision=Precision(param=jnp.bfloat16, compute=jnp.bfloat16))
    arrays = model_arrays(m)
    assert {path for path, x in arrays.items() if x.dtype == jnp.float32} == {
        path for path in arrays if "router" in path
    }
    exact = Transformer(cfg, rngs=nnx.Rngs(0))
    logits, expected = run(m, TOKENS), run(exact, TOKENS)
    assert logits.dtype == jnp.float32
    assert jnp.abs(logits - expected).mean() < 0.05 * jnp.abs(expected).mean()


def test_the_program_of_sixty_layers_is_as_small_as_of_three(cfg):
    def program_size(layers):
        abstract_model = AbstractModel(dataclasses.replace(cfg, num_hidden_layers=layers))
        arrays = {
            p: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype)
            for p, v in abstract_model.variables.items()
        }
        return len(jax.jit(lambda a: abstract_model.merge(a)(TOKENS)).lower(arrays).as_text())

    assert program_size(60) < 1.01 * program_size(3)


def test_abstract_model_has_no_arrays_and_merges_back(cfg, model):
    abstract_model = AbstractModel(cfg)
    assert all(isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in abstract_model.variables.values())
    np.testing.assert_array_equal(run(abstract_model.merge(model_arrays(model)), TOKENS), run(model, TOKENS))


def test_initial_parameters_are_the_same_on_every_mesh(cfg):
    abstract_model = AbstractModel(cfg)
    one = abstract_model.init(3, make_mesh(MeshConfig(), jax.devices()[:1]))
    many = abstract_model.init(3, make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2)))
    gate_up = many["moe_layers/moe/gate_up"]
    assert gate_up.sharding.shard_shape(gate_up.shape) == (2, 4, 16, 2, 8)
    for path, x in one.items():
        np.testing.assert_array_equal(x, many[path])
    other = abstract_model.init(4, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert jnp.abs(other["embed"] - one["embed"]).max() > 0.01


def test_initial_parameters_have_the_configured_standard_deviation(cfg):
    arrays = AbstractModel(cfg).init(0, make_mesh(MeshConfig(), jax.devices()[:1]))
    gate_up = arrays["moe_layers/moe/gate_up"]
    assert gate_up.std() == pytest.approx(cfg.initializer_range, rel=0.05)
    assert jnp.abs(gate_up[0] - gate_up[1]).max() > 0.01
    assert jnp.abs(gate_up[0, 0] - gate_up[0, 1]).max() > 0.01
    assert (arrays["norm/scale"] == 1).all()
    assert (arrays["moe_layers/moe/router/bias"] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_input_gives_empty_logits(model, cfg, shape):
    assert model(jnp.zeros(shape, jnp.int32)).shape == (*shape, cfg.vocab_size)
