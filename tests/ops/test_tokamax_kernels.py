"""The kernels of tokamax against the references, on an attached GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.attention import attention
from mla_moe.ops.experts import experts, reference
from mla_moe.ops.grouped_matmul import grouped_matmul

pytestmark = pytest.mark.gpu


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def assert_close(got, wanted, tolerance=2e-2):
    """Relative to the largest value: the products of both are in bfloat16."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


@pytest.mark.parametrize(
    ("T", "S", "widths"), [(256, 256, (192, 128)), (300, 300, (256, 256)), (77, 77, (40, 24)), (128, 512, (192, 128))]
)
def test_attention_equals_reference(T, S, widths):
    """Both pairs of widths of MLA and odd ones, packed, and queries that are a part of the sequence."""
    B, H, (A, V) = 2, 3, widths
    q, k, v, weight = normal(0, B, T, H, A), normal(1, B, S, H, A), normal(2, B, S, H, V), normal(3, B, T, H, V)
    segments = jnp.sort(jax.random.randint(jax.random.key(4), (B, S), 0, 4), axis=1)
    starts = jnp.array([3, 1], jnp.int32) * (T // 2) if T < S else None

    def run(implementation):
        def loss(q, k, v):
            y = attention(q, k, v, segments, scale=A**-0.5, query_starts_P=starts, implementation=implementation)
            return (y * weight).astype(jnp.float32).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, y), g = run("tokamax")
    (_, wanted_y), wanted_g = run("reference")
    assert_close((y, g), (wanted_y, wanted_g))


@pytest.mark.parametrize("sizes", [[64, 64, 64, 64], [0, 3, 0, 250], [1, 7, 200, 5], [0, 0, 0, 0], [256, 0, 0, 0]])
@pytest.mark.parametrize("widths", [(256, 192), (40, 24)])
def test_grouped_matmul_equals_reference_and_never_reads_rows_behind_the_last_group(sizes, widths):
    R, (D, F) = 300, widths
    inside = (jnp.arange(R) < sum(sizes))[:, None]
    x, w, weight = normal(0, R, D), normal(1, len(sizes), D, F), normal(2, R, F)

    def run(implementation, outside):
        def loss(x, w):
            x, g = jnp.where(inside, x, outside), jnp.where(inside, weight, outside)
            y = grouped_matmul(x, w, jnp.array(sizes), block=1, implementation=implementation)
            return (jnp.where(inside, y * g, 0)).astype(jnp.float32).sum(), jnp.where(inside, y, 0)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)

    (_, y), (gx, gw) = run("tokamax", jnp.nan)
    (_, wanted_y), (wanted_gx, wanted_gw) = run("reference", 0)
    assert_close((y, jnp.where(inside, gx, 0), gw), (wanted_y, wanted_gx, wanted_gw))


def test_the_sum_of_many_products_is_accumulated_in_float32():
    """In bfloat16 the sum of 4,096 ones would stop at 256."""
    x, w = jnp.ones((128, 4096), jnp.bfloat16), jnp.ones((1, 4096, 64), jnp.bfloat16)
    y = jax.jit(lambda x, w: grouped_matmul(x, w, jnp.array([128]), block=1, implementation="tokamax"))(x, w)
    assert (y == 4096).all()


def test_experts_equal_reference():
    N, K, E, D, F = 200, 3, 8, 128, 192
    x, ids = normal(0, N, D), jax.random.randint(jax.random.key(1), (N, K), 0, E - 1)  # the last expert has no token
    weights, gate_up, down = jax.random.uniform(jax.random.key(2), (N, K)), normal(3, E, D, 2, F), normal(4, E, F, D)
    gate_up, down = gate_up * D**-0.5, down * F**-0.5

    def run(f):
        def loss(x, weights, gate_up, down):
            y = f(x, ids, weights, gate_up, down)
            return (y.astype(jnp.float32) ** 2).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, weights, gate_up, down)

    (_, y), g = run(lambda *args: experts(*args, implementation="tokamax"))
    (_, wanted_y), wanted_g = run(reference)
    assert_close((y, g), (wanted_y, wanted_g), 5e-2)
