"""The keys that an indexer selects against sorting all scores, and attention to them against a full mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.attention import attention
from mla_moe.ops.key_selection import KEY_BLOCK, select_keys, selected_range
from mla_moe.ops.masking import Masking


def numbers(seed, *shape):
    """Small integers: most scores are exact, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def expected_keys(q, weight, k, segments, first, topk, window):
    """The selection by sorting, of equal scores the first keys first."""
    score = np.einsum("BTHS,BTH->BTS", np.maximum(np.einsum("BTHI,BSI->BTHS", q, k), 0), weight)
    T, S = score.shape[1:]
    t, s = first + np.arange(T)[:, None], np.arange(S)
    visible = (s <= t) & (t - s < (window or S)) & (segments[:, first : first + T, None] == segments[:, None])
    order = np.argsort(np.where(visible, -score, np.inf), axis=2, kind="stable")[..., :topk]
    chosen = np.zeros(score.shape, bool)
    np.put_along_axis(chosen, order, True, axis=2)
    return chosen & visible


@pytest.mark.parametrize(
    ("T", "S", "first", "topk", "window"), [(37, 37, 0, 5, None), (300, 512, 100, 33, None), (131, 256, 0, 7, 20)]
)
def test_selected_keys_are_the_highest_and_of_equal_ones_the_first(T, S, first, topk, window):
    q, weight, k = numbers(0, 2, T, 3, 4), numbers(1, 2, T, 3), numbers(2, 2, S, 4)
    segments = np.array([[1] * S, [1] * (S // 3) + [2] * (S - S // 3)], np.int32)
    index = jnp.broadcast_to(first + jnp.arange(T), (2, T))

    @jax.jit
    def select(q, weight, k):
        keys = lambda start, size: jax.lax.dynamic_slice_in_dim(k, start, size, 1)  # noqa: E731
        own = jnp.asarray(segments[:, first : first + T]), jnp.asarray(segments)
        return select_keys(
            q,
            weight,
            keys,
            index,
            num_keys=S,
            topk=topk,
            masking=Masking(True, window),
            segments=own,
        )

    selected = np.asarray(selected_range(select(q, weight, k), 0, S))
    expected = expected_keys(q, weight, k, segments, first, topk, window)
    np.testing.assert_array_equal(selected, expected)
    assert expected.sum(axis=2).max() == topk
    assert S % min(KEY_BLOCK, S) == 0
    np.testing.assert_array_equal(selected_range(select(q, weight, k), 3, 11), expected[..., 3:14])


@pytest.mark.parametrize("T", [21, 150])
def test_attention_to_selected_keys_has_the_values_and_gradients_of_a_mask(T):
    """Blocks of which a query selects no key too: it selects neither itself nor its neighbours."""
    random = np.random.default_rng(0)
    q, k, v, g = (random.standard_normal((2, T, 3, n)).astype(np.float32) for n in (6, 6, 5, 5))
    segments = np.array([[1] * T, [1] * 9 + [2] * (T - 9)], np.int32)
    words = np.zeros((2, T, -(-T // 32)), np.uint32)
    words[..., 0] = random.integers(0, 2**32, (2, T)).astype(np.uint32) | 1 | (1 << 9)

    def run(q, k, v, implementation):
        y = attention(
            q, k, v, jnp.asarray(segments), scale=0.4, selected_BTW=jnp.asarray(words), implementation=implementation
        )
        return (y * g).sum(), y

    results = [
        jax.jit(jax.grad(run, (0, 1, 2), has_aux=True), static_argnums=3)(q, k, v, n)
        for n in ("blockwise", "reference")
    ]
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_jax_enable_x64_changes_nothing():
    q, weight, k = numbers(0, 1, 9, 3, 4), numbers(1, 1, 9, 3), numbers(2, 1, 9, 4)
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
            inputs, index = jax.tree.map(jnp.asarray, (q, weight)), jnp.arange(9)[None]
            read = lambda start, size: jax.lax.dynamic_slice_in_dim(jnp.asarray(k), start, size, 1)  # noqa: E731
            results.append(np.asarray(select_keys(*inputs, read, index, num_keys=9, topk=3)))
    np.testing.assert_array_equal(*results)
