import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.experts import block_size, experts
from mla_moe.ops.grouped_matmul import grouped_matmul
from mla_moe.ops.permutation import permutation, permute, unpermute, weights_by_row

CASES = {
    "even": [3, 3, 3, 3],
    "one expert has half, some have none": [0, 9, 0, 9],
    "all on one expert": [0, 0, 18, 0],
    "odd": [1, 7, 2, 5],
}


def rows(sizes, block, D=5, F=3):
    padded = [-(-s // block) * block for s in sizes]
    R = -(-sum(padded) // block) * block + block  # a block behind the last group
    x = jax.random.normal(jax.random.key(0), (R, D))
    w = jax.random.normal(jax.random.key(1), (len(sizes), D, F))
    weight = jnp.arange(R) < sum(padded)
    return x, w, jnp.array(padded), weight.astype(jnp.float32)[:, None]


@pytest.mark.smoke
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("implementation", ["blocks", "chunks", "ragged"])
def test_equals_reference_in_values_and_gradients(sizes, block, implementation):
    x, w, group_sizes, inside = rows(sizes, block)

    def f(x, w, implementation):
        y = grouped_matmul(x, w, group_sizes, block=block, implementation=implementation)
        return (jnp.sin(y) * inside).sum(), y * inside

    got, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True), static_argnums=2)(x, w, i)
        for i in (implementation, "reference")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocks", "chunks", "ragged"])
def test_group_offset_selects_matrices_of_a_stack(implementation):
    x, w, group_sizes, inside = rows([1, 7, 0, 5], 4)
    stack = jnp.concatenate([w + 1, w, w - 1])
    got = grouped_matmul(x, stack, group_sizes, jnp.int32(4), block=4, implementation=implementation)
    wanted = grouped_matmul(x, w, group_sizes, block=4, implementation=implementation)
    np.testing.assert_allclose(got * inside, wanted * inside, rtol=1e-6)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.slow
def test_the_interpreted_tpu_kernel_equals_reference(sizes):
    from jax.experimental.pallas import tpu as pltpu

    x, w, group_sizes, inside = rows(sizes, 4, D=128, F=128)

    def f(x, w, implementation):
        y = grouped_matmul(x, w, group_sizes, block=4, implementation=implementation)
        y = jnp.where(inside > 0, y, 0)
        return jnp.sin(y).sum(), y

    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):  # the kernel's own code promotes
        got = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(x, w, "megablox")
    wanted = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(x, w, "reference")
    ((loss, y), (gx, gw)), ((loss_, y_), (gx_, gw_)) = got, wanted
    gx = jnp.where(inside > 0, gx, 0)  # rows behind the last group are arbitrary
    for a, b in zip((loss, y, gx, gw), (loss_, y_, gx_, gw_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_each_row_is_multiplied_by_its_expert():
    x, w, group_sizes, _ = rows([2, 0, 3], 1)
    y = grouped_matmul(x, w, group_sizes, block=1, implementation="blocks")
    for r, e in enumerate([0, 0, 2, 2, 2]):
        np.testing.assert_allclose(y[r], x[r] @ w[e], rtol=1e-5)


def test_blocks_do_no_masked_work():
    """Twice the experts with the same rows cost at most the padding more; `reference` would cost twice as much."""

    def flops(E):
        x, w = jnp.zeros((1024, 64)), jnp.zeros((E, 64, 64))
        f = jax.jit(lambda x, w, g: grouped_matmul(x, w, g, block=32, implementation="blocks"))
        return f.lower(x, w, jnp.full(E, 1024 // E)).compile().cost_analysis()["flops"]

    assert flops(16) < 1.05 * flops(8)
    assert flops(8) < 1.2 * 2 * 1024 * 64 * 64


@pytest.mark.parametrize(
    ("block", "max_pairs", "platform"), [(1, 0, "cpu"), (4, 100, "cpu"), (16, 0, "cpu"), (1, 0, "gpu")]
)
@pytest.mark.parametrize("experts", ["random", "skewed", "one"])
def test_permute_and_unpermute_give_a_weighted_sum_over_experts(block, max_pairs, platform, experts, monkeypatch):
    monkeypatch.setattr("mla_moe.ops.permutation.MAX_PAIRS_AT_ONCE", max_pairs)
    monkeypatch.setattr("mla_moe.ops.permutation.target_platform", lambda: platform)
    N, K, E, D = 13, 2, 5, 4
    ids = {
        "random": jax.vmap(lambda k: jax.random.permutation(k, E)[:K])(jax.random.split(jax.random.key(0), N)),
        "skewed": jnp.stack([jnp.zeros(N, jnp.int32), 1 + jnp.arange(N) % 2], axis=1),
        "one": jnp.tile(jnp.array([3, 4]), (N, 1)),
    }[experts]
    x, weight = jax.random.normal(jax.random.key(1), (N, D)), jax.random.uniform(jax.random.key(2), (N, K))
    w = jax.random.normal(jax.random.key(3), (E, D, D))

    def fast(x, weight, w):
        p = permutation(ids, E, block)
        assert p.token_R.shape[0] % block == 0
        h = jnp.tanh(permute(x, p)) * weights_by_row(weight, p)[:, None]
        return unpermute(grouped_matmul(h, w, p.group_sizes_E, block=block), p)

    def slow(x, weight, w):
        return jnp.einsum("NK,ND,NKDF->NF", weight, jnp.tanh(x), w[ids])

    def run(f):
        def loss(*args):
            y = f(*args)
            return jnp.sin(y).sum(), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, weight, w)
        return y, grads

    (y, grads), (wanted_y, wanted_grads) = run(fast), run(slow)
    np.testing.assert_allclose(y, wanted_y, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_permutation_is_dropless_and_groups_start_at_blocks():
    ids = jnp.array([[0, 3], [3, 2], [3, 0], [2, 3]])
    p = permutation(ids, 4, 4)
    assert sorted(p.row_NK.ravel().tolist()) == sorted(set(p.row_NK.ravel().tolist()))
    assert p.group_sizes_E.tolist() == [4, 0, 4, 4]
    assert int(p.filled_R.sum()) == 8
    start = jnp.cumsum(p.group_sizes_E) - p.group_sizes_E
    assert (p.row_NK // 4 == start[ids] // 4).all()
    assert (p.token_R[p.row_NK] == jnp.arange(4)[:, None]).all()


def test_the_derivative_saves_only_the_first_product_of_each_row():
    N, K, E, D, F = 24, 2, 4, 6, 5
    ids = jnp.stack([jnp.arange(N) % E, (jnp.arange(N) + 1) % E], axis=1)
    x, weight = jnp.ones((N, D)), jnp.ones((N, K))
    gate_up, down = jnp.ones((E, D, 2, F)), jnp.ones((E, F, D))
    _, derivative = jax.vjp(lambda *a: experts(a[0], ids, *a[1:]), x, weight, gate_up, down)
    rows = len(permutation(ids, E, block_size(N * K, E, None)).token_R)
    kept = [leaf.shape for leaf in jax.tree.leaves(derivative) if leaf.shape[:1] == (rows,) and leaf.ndim > 1]
    assert kept == [(rows, 2 * F)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_experts_never_use_rows_behind_the_last_group(platform, monkeypatch):
    """A kernel may leave those rows as the memory was, here NaN, in its result and in the gradient of its rows."""
    N, K, E, D, F = 13, 2, 4, 6, 8
    ids = jnp.where(jnp.arange(N * K).reshape(N, K) % 3 == 0, E, jnp.arange(N * K).reshape(N, K) % E)  # some unassigned
    arguments = jax.random.normal(jax.random.key(0), (N, D)), jnp.ones((N, K))
    arguments += jax.random.normal(jax.random.key(1), (E, D, 2, F)), jax.random.normal(jax.random.key(2), (E, F, D))

    def behind(x_RD, sizes):
        return (jnp.arange(len(x_RD)) >= sizes.sum())[:, None]

    @jax.custom_vjp
    def careless(x, w, sizes):
        return jnp.where(behind(x, sizes), jnp.nan, grouped_matmul(x, w, sizes, block=1, implementation="reference"))

    def forward(x, w, sizes):
        return careless(x, w, sizes), (x, w, sizes)

    def backward(residuals, g):
        x, w, sizes = residuals
        x, g = (jnp.where(behind(x, sizes), 0, a) for a in (x, g))
        _, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, block=1, implementation="reference"), x, w)
        g_x, g_w = vjp(g)
        return jnp.where(behind(x, sizes), jnp.nan, g_x), g_w, None

    careless.defvjp(forward, backward)

    def run():
        return jax.value_and_grad(lambda *a: jnp.sin(experts(a[0], ids, *a[1:])).sum(), (0, 1, 2, 3))(*arguments)

    wanted = run()
    monkeypatch.setattr("mla_moe.ops.permutation.target_platform", lambda: platform)
    monkeypatch.setattr("mla_moe.ops.experts.supported_grouped_matmul_kernel", lambda *_: "ragged")  # without padding
    monkeypatch.setattr("mla_moe.ops.experts.grouped_matmul", lambda x, w, sizes, *_, **__: careless(x, w, sizes))
    for got, value in zip(jax.tree.leaves(run()), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
