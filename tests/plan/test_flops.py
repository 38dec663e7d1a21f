"""FLOPs of functions whose products are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mla_moe.ops.attention import attention
from mla_moe.ops.grouped_matmul import grouped_matmul
from mla_moe.plan.flops import ExpectedRouting, count_flops

PRODUCT = 2 * 8 * 16 * 16


def counted(f, *shapes, devices=1, rows=None):
    return count_flops(
        jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)), devices, ExpectedRouting(rows=rows)
    )


def test_loops_and_branches():
    def f(x, w):
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return jax.jit(lambda x: x @ w)(x)

    assert counted(f, (8, 16), (16, 16)) == {"products": 8 * PRODUCT}


def test_what_nobody_reads_is_not_counted():
    assert counted(lambda x, w: (x @ w, x + 1)[1], (8, 16), (16, 16)) == {}


def test_a_checkpoint_counts_twice_forward():
    def loss(x, w):
        return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x).sum()

    # Forward 2, forward again 2, derivative 2 for each product.
    assert counted(jax.value_and_grad(loss, argnums=(0, 1)), (8, 16), (16, 16)) == {"products": 8 * PRODUCT}


def test_devices_share_what_is_outside_of_a_shard_map():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    assert counted(inside, (8, 16), (16, 16), devices=8) == {"products": PRODUCT / 8}
    assert counted(lambda x, w: x @ w, (8, 16), (16, 16), devices=8) == {"products": PRODUCT / 8}


@pytest.mark.parametrize("B", [1, 2])
def test_splash_attention_is_causal(B):
    def f(q, k, v):
        return attention(q, k, v, None, scale=1.0, implementation="splash").sum()

    T, H, A, V = 1024, 4, 192, 128
    shapes = (B, T, H, A), (B, T, H, A), (B, T, H, V)
    pairs = B * H * T * (T + 512) / 2
    assert counted(f, *shapes) == {"attention": 2 * pairs * (A + V)}
    derivative = counted(jax.grad(f, argnums=(0, 1, 2)), *shapes)
    assert derivative["attention"] == 2 * pairs * (A + V + 3 * A + 2 * V)


@pytest.mark.parametrize("rows", [None, 1000])
def test_grouped_products_count_the_expected_rows(rows):
    def f(x, w):
        sizes = jnp.full(8, 256, jnp.int32)
        return grouped_matmul(x, w, sizes, block=256, implementation="megablox")

    R, D, F = 2048, 256, 128
    assert counted(f, (R, D), (8, D, F), rows=rows) == {"experts": 2 * (rows or R) * D * F}
    both = counted(jax.value_and_grad(lambda x, w: f(x, w).sum(), argnums=(0, 1)), (R, D), (8, D, F), rows=rows)
    assert both["experts"] == pytest.approx(3 * 2 * (rows or R) * D * F)
