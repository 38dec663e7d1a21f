import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops import cached_attention as module
from mla_moe.ops.cached_attention import cached_attention

L, B, S, C, R, H, N, V = 2, 4, 24, 6, 4, 3, 5, 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    cache = jax.random.normal(keys[0], (L, B, S, C + R))
    return cache, jax.random.normal(keys[1], (C, H, N + V)), jax.random.normal(keys[2], (B, 3, H, N + R))


def run(arrays, positions, slots, form):
    cache, kv_b, q = arrays
    q = q[: len(positions), : positions.shape[1]]
    return jax.jit(
        lambda q, cache: cached_attention(
            q, cache, kv_b, positions, layer=1, slots_b=slots, scale=0.3, form=form
        )
    )(q, cache)  # fmt: skip


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("slots", [None, (2, 0)])
def test_forms_equal_the_reference(arrays, form, slots):
    """At the first position, across blocks, and at the last position."""
    start = jnp.array([0, 7, 15, 21] if slots is None else [21, 3])
    positions = start[:, None] + jnp.arange(3)
    slots = None if slots is None else jnp.array(slots)
    expected = run(arrays, positions, slots, "reference")
    np.testing.assert_allclose(run(arrays, positions, slots, form), expected, rtol=1e-5, atol=1e-5)


def test_later_cache_entries_are_masked(arrays):
    cache, kv_b, q = arrays
    positions = jnp.array([[5], [9], [0], [14]])
    y = run(arrays, positions, None, "absorbed")
    beyond = jnp.arange(S)[:, None] > positions[:, :, None]
    np.testing.assert_array_equal(y, run((jnp.where(beyond, 1e3, cache), kv_b, q), positions, None, "absorbed"))


def test_padding_positions_read_no_blocks_and_give_finite_values(arrays):
    cache, kv_b, q = arrays
    positions = jnp.array([[3], [1 << 30], [1 << 30], [7]])
    poisoned = cache.at[:, :, 8:].set(jnp.nan)  # a block that only padding positions would read
    assert jnp.isfinite(run((poisoned, kv_b, q), positions, None, "absorbed")).all()


@pytest.mark.parametrize("slots", [None, (2, 0, 1, 3)])
def test_jax_enable_x64_changes_nothing(arrays, slots):
    positions = jnp.arange(4, dtype=jnp.int32)[:, None]
    wanted = run(arrays, positions, None if slots is None else jnp.array(slots), "absorbed")
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # loop indices are int64
        got = run(arrays, positions, None if slots is None else jnp.array(slots), "absorbed")
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
