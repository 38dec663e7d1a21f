import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Transformer, preset
from mla_moe.nn.kv_cache import (
    OUT_OF_RANGE,
    cache_shape,
    empty_cache,
    round_up_capacity,
    write_blocks,
    write_cache,
    write_sequences,
)
from mla_moe.nn.model_costs import kv_cache_bytes_per_token
from mla_moe.nn.transformer import unstack_layers


def test_cache_bytes_are_those_of_the_latents():
    cfg = preset("deepseek-v3")
    cache = empty_cache(cache_shape(cfg, 2, 3, jnp.bfloat16, layers=cfg.num_hidden_layers))
    assert cache.nbytes == 2 * 3 * 70_272 == 2 * 3 * kv_cache_bytes_per_token(cfg)
    assert empty_cache(cache_shape(cfg, 2, 3, jnp.int8, layers=cfg.num_hidden_layers)).nbytes == 2 * 3 * 35_624


def test_capacity_is_rounded_up_to_full_blocks():
    assert [round_up_capacity(n) for n in (1, 2, 3, 100, 256, 257, 700)] == [1, 2, 4, 128, 256, 512, 768]


def test_write_skips_sequences_that_do_not_fit():
    cache = jnp.zeros((2, 3, 8, 2))
    slots, start = jnp.array([2, 0, 1]), jnp.array([5, 6, OUT_OF_RANGE])
    cache = jax.jit(lambda c, n: write_cache(c, n, layer=1, slots_b=slots, start_b=start))(cache, jnp.ones((3, 3, 2)))
    expected = np.zeros((2, 3, 8, 2))
    expected[1, 2, 5:8] = 1
    np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize(("T", "S"), [(1, 16), (2, 256)])
def test_block_writes_of_tpu_equal_the_scatter(T, S):
    cache, new = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 4, S, 5), (4, T, 5)]))
    start = jnp.array([S // 2 - 1, S - T, S - T + 1, OUT_OF_RANGE])
    expected = write_sequences(cache, new, jnp.int32(1), jnp.arange(4), start)
    np.testing.assert_array_equal(np.asarray(jax.jit(write_blocks)(cache, new, jnp.int32(1), start)), expected)


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_extend_in_chunks_equals_one_forward_pass(kind, cfg, v2_cfg):
    """In both forms of attention, with stacked layers and a list of layers; slots in another order than the batch."""
    cfg = cfg if kind == "v3" else v2_cfg
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, cfg.vocab_size)
    expected, _ = jax.jit(lambda m, t: m.hidden(t))(model, tokens)
    extend = jax.jit(lambda m, *args, form: m.extend(*args, form=form)[:2], static_argnames="form")
    cases = [(model, ("expanded", "absorbed"))]
    if kind == "v3":
        cases.append((unstack_layers(model), ("absorbed", "absorbed")))
    for m, forms in cases:
        cache = empty_cache(cache_shape(model.cfg, 3, 16, jnp.float32, layers=3))
        slots, chunks = jnp.array([2, 0]), []
        for start, form in zip((0, 6), forms, strict=True):
            h, cache = extend(m, tokens[:, start : start + 6], cache, jnp.full(2, start), slots, form=form)
            chunks.append(h)
        np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), expected, atol=1e-5, rtol=0)
        assert (cache[:, 1] == 0).all()


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_an_int8_cache_is_nearly_as_accurate(form, cfg):
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, cfg.vocab_size)
    extend = jax.jit(lambda m, *args: m.extend(*args, form=form)[0])
    exact, quantized = (
        extend(model, tokens, empty_cache(cache_shape(model.cfg, 2, 16, dtype, layers=3)), jnp.zeros(2, int))
        for dtype in (jnp.float32, jnp.int8)
    )
    assert 0 < jnp.abs(quantized - exact).max() < 0.03 * jnp.abs(exact).max()
