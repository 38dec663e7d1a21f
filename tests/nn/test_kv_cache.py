import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Transformer, preset
from mla_moe.nn.kv_cache import (
    OUT_OF_RANGE,
    init_cache,
    round_up_capacity,
    write_blocks,
    write_cache,
    write_sequences,
)
from mla_moe.nn.model_costs import kv_cache_bytes_per_token
from mla_moe.nn.transformer import unstack_layers


def test_cache_bytes_are_those_of_the_latents():
    cfg = preset("deepseek-v3")
    cache = partial(init_cache, cfg.attention, 2, 3, layers=cfg.num_hidden_layers)
    assert cache(jnp.bfloat16).entries_LBSW.nbytes == 2 * 4 * 70_272 == 2 * 4 * kv_cache_bytes_per_token(cfg)
    assert cache(jnp.int8).entries_LBSW.nbytes == 2 * 4 * 35_624


def test_capacity_is_rounded_up_to_full_blocks():
    assert [round_up_capacity(n) for n in (1, 2, 3, 100, 256, 257, 700)] == [1, 2, 4, 128, 256, 512, 768]


def test_write_skips_sequences_that_do_not_fit():
    cache = jnp.zeros((2, 3, 8, 2))
    slots, start = jnp.array([2, 0, 1]), jnp.array([5, 6, OUT_OF_RANGE])
    cache = jax.jit(lambda c, n: write_cache(c, n, 1, start, slots))(cache, jnp.ones((3, 3, 2)))
    expected = np.zeros((2, 3, 8, 2))
    expected[1, 2, 5:8] = 1
    np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize(("T", "S"), [(1, 16), (2, 256)])
def test_block_writes_of_tpu_equal_the_scatter(T, S):
    cache, new = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 4, S, 5), (4, T, 5)]))
    start = jnp.array([S // 2 - 1, S - T, S - T + 1, OUT_OF_RANGE])
    expected = write_sequences(cache, new, jnp.int32(1), start)
    np.testing.assert_array_equal(np.asarray(jax.jit(write_blocks)(cache, new, jnp.int32(1), start)), expected)


@pytest.mark.parametrize("T", [1, 3, 8])
@pytest.mark.parametrize("form", [write_sequences, write_blocks])
def test_padding_is_not_written(form, T):
    """Also at the end of the cache, and with sequences that do not fit."""
    cache, new = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, 8, 3), (5, T, 3)]))
    start, length = jnp.array([0, 8 - 1, 3, 8 - T, OUT_OF_RANGE]), jnp.array([T, 1, 0, T, T])
    expected = np.array(cache)
    for b in range(4):
        expected[1, b, start[b] : start[b] + length[b]] = new[b, : length[b]]
    np.testing.assert_array_equal(jax.jit(form)(cache, new, jnp.int32(1), start, length), expected)


@pytest.mark.parametrize("write", [write_sequences, write_blocks])
def test_jax_enable_x64_changes_nothing(write):
    """Indices are int64 then, and lengths int32."""
    cache, new = jnp.zeros((2, 3, 8, 2)), jnp.ones((3, 4, 2))
    start, length = jnp.array([5, 6, 0], jnp.int32), jnp.array([3, 0, 4], jnp.int32)
    expected = jax.jit(write)(cache, new, 1, start, length)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(jax.jit(write)(cache, new, jnp.asarray(1), start, length), expected)


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_extend_in_chunks_equals_one_forward_pass(kind, cfg, v2_cfg):
    """In both forms of attention, with stacked layers and a list of layers; slots in another order than the batch."""
    cfg = cfg if kind == "v3" else v2_cfg
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, cfg.vocab_size)
    expected, _ = jax.jit(lambda m, t: m.hidden(t))(model, tokens)
    slots = jnp.array([2, 0])
    extend = jax.jit(lambda m, *args, form: m.extend(*args, slots=slots, form=form)[:2], static_argnames="form")
    cases = [(model, ("expanded", "absorbed"))]
    if kind == "v3":
        cases.append((unstack_layers(model), ("absorbed", "absorbed")))
    for m, forms in cases:
        cache, chunks = m.init_cache(3, 16), []
        for start, form in zip((0, 6), forms, strict=True):
            h, cache = extend(m, tokens[:, start : start + 6], cache, form=form)
            chunks.append(h)
        np.testing.assert_allclose(jnp.concatenate(chunks, axis=1), expected, atol=1e-5, rtol=0)
        assert cache.length_B.tolist() == [12, 0, 12]
        assert (cache.entries_LBSW[:, 1] == 0).all()
