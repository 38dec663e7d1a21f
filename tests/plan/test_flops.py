"""FLOPs of functions whose matrix products are known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from mla_moe.ops.attention import attention
from mla_moe.ops.grouped_matmul import grouped_matmul
from mla_moe.plan.flops import ExpectedRouting, count_flops

MATMUL = 2 * 8 * 16 * 16


def counted(
    f: Callable[..., Any], *shapes: tuple[int, ...], devices: int = 1, expert_rows: float | None = None
) -> dict[str, float]:
    jaxpr = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return count_flops(jaxpr, devices, ExpectedRouting(expert_rows=expert_rows))


def test_loops_and_branches() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return jax.jit(lambda x: x @ w)(x)

    assert counted(f, (8, 16), (16, 16)) == {"matmul": 8 * MATMUL}


def test_unused_results_are_not_counted() -> None:
    assert counted(lambda x, w: (x @ w, x + 1)[1], (8, 16), (16, 16)) == {}


def test_rematerialisation_counts_the_forward_pass_twice() -> None:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x).sum()

    # Forward 2, forward again 2, backward 2 for each matmul.
    assert counted(jax.value_and_grad(loss, argnums=(0, 1)), (8, 16), (16, 16)) == {"matmul": 8 * MATMUL}


def test_work_outside_of_a_shard_map_is_divided_over_devices() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    inside = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    assert counted(inside, (8, 16), (16, 16), devices=8) == {"matmul": MATMUL / 8}
    assert counted(lambda x, w: x @ w, (8, 16), (16, 16), devices=8) == {"matmul": MATMUL / 8}


@pytest.mark.parametrize("B", [1, 2])
def test_splash_attention_is_causal(B: int) -> None:
    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, None, scale=1.0, implementation="splash").sum()

    T, H, A, V = 1024, 4, 192, 128
    shapes = (B, T, H, A), (B, T, H, A), (B, T, H, V)
    pairs = B * H * T * (T + 512) / 2
    assert counted(f, *shapes) == {"attention": 2 * pairs * (A + V)}
    backward = counted(jax.grad(f, argnums=(0, 1, 2)), *shapes)
    assert backward["attention"] == 2 * pairs * (A + V + 3 * A + 2 * V)


def test_with_context_parallelism_a_device_counts_the_mean_of_all_queries() -> None:
    """Which each of them has: of 2,048 tokens on 4 devices, the chunks 0 and 7, 2 and 5, and so on of 256 tokens."""

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        starts = jnp.array([512, 1280], jnp.int32)
        return attention(q, k, v, None, scale=1.0, query_starts_P=starts, implementation="splash").sum()

    T, S, H, A, V = 512, 2048, 4, 192, 128
    shapes = (1, T, H, A), (1, S, H, A), (1, S, H, V)
    assert counted(f, *shapes) == {"attention": 2 * H * T * (S + 512) / 2 * (A + V)}


def test_the_loops_of_blockwise_attention_count_the_blocks_of_a_devices_queries() -> None:
    """Forward over half of the 8 blocks of keys and the diagonal; backward over half of its own 2 blocks of queries."""
    T, S, H, A, V = 512, 2048, 2, 32, 16

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, None, scale=1.0, query_starts_P=jnp.array([512]), implementation="blockwise").sum()

    shapes = [jax.ShapeDtypeStruct((1, n, H, width), jnp.float32) for n, width in ((T, A), (S, A), (S, V))]
    expected = ExpectedRouting(key_blocks=4, query_blocks=1)
    forward, backward = 2 * H * T * (4 + 1) * 256 * (A + V), 2 * H * S * 256 * (3 * A + 2 * V)
    assert count_flops(jax.make_jaxpr(f)(*shapes), 1, expected) == {"matmul": forward}
    gradient = jax.make_jaxpr(jax.grad(f, argnums=(0, 1, 2)))(*shapes)
    assert count_flops(gradient, 1, expected) == {"matmul": forward + backward}


@pytest.mark.parametrize("expert_rows", [None, 1000])
def test_grouped_matmuls_count_the_expected_rows(expert_rows: float | None) -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        sizes = jnp.full(8, 256, jnp.int32)
        return grouped_matmul(x, w, sizes, block=256, implementation="megablox")

    R, D, F = 2048, 256, 128
    shapes, flops = ((R, D), (8, D, F)), 2 * (expert_rows or R) * D * F
    assert counted(f, *shapes, expert_rows=expert_rows) == {"experts": flops}
    gradient = jax.value_and_grad(lambda x, w: f(x, w).sum(), argnums=(0, 1))
    assert counted(gradient, *shapes, expert_rows=expert_rows)["experts"] == pytest.approx(3 * flops)


def test_kernels_for_gpus_count_by_formula() -> None:
    """They are recognised by the names of the jitted functions of `ops.tokamax_kernels` and `ops.latent_attention`."""

    def _ragged_dot(*arrays: jax.Array) -> jax.Array:
        return sum((x.sum() for x in arrays), jnp.float32(0))

    def _ragged_dot_gradient(*arrays: jax.Array) -> jax.Array:
        return _ragged_dot(*arrays)

    def _flash_attention(*arrays: jax.Array) -> jax.Array:
        return _ragged_dot(*arrays)

    def _flash_attention_gradient(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return arrays

    def _latent_attention(q: jax.Array, cache: jax.Array, *_: jax.Array) -> jax.Array:
        return q[..., :512] + cache.sum()

    assert counted(jax.jit(_ragged_dot), (64, 8), (4, 8, 16), (4,)) == {"experts": 2 * 64 * 8 * 16}
    assert counted(jax.jit(_ragged_dot), (64, 8), (4, 8, 16), (4,), expert_rows=32) == {"experts": 2 * 32 * 8 * 16}
    assert counted(jax.jit(_ragged_dot_gradient), (64, 8), (64, 16), (4,)) == {"experts": 2 * 64 * 8 * 16}
    B, T, H, A, V = 2, 512, 4, 192, 128
    shapes, pairs = ((B, T, H, A), (B, T, H, A), (B, T, H, V)), B * H * T * (T + 128) / 2
    assert counted(jax.jit(_flash_attention), *shapes) == {"attention": 2 * pairs * (A + V)}
    one_sequence = [shape[1:] for shape in shapes]  # as XLA has it
    assert counted(jax.jit(_flash_attention), *one_sequence) == {"attention": pairs * (A + V)}
    assert counted(jax.jit(_flash_attention_gradient), *shapes) == {"attention": 2 * pairs * (4 * A + 3 * V)}
    decode = counted(jax.jit(_latent_attention), (8, 2, 16, 576), (3, 8, 4096, 576), (8, 2), (1,))
    assert decode == {"attention": 2 * 8 * 2 * 16 * 4096 * (576 + 512)}
