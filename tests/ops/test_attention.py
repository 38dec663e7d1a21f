import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.attention import attention, dot_product


def inputs(B, T, H, A, V, seed=0):
    q, k, v = (
        jax.random.normal(key, (B, T, H, w))
        for key, w in zip(jax.random.split(jax.random.key(seed), 3), (A, A, V), strict=True)
    )
    segments = jnp.sort(jax.random.randint(jax.random.key(seed + 1), (B, T), 0, 4), axis=1)
    return q, k, v, segments


@pytest.mark.smoke
@pytest.mark.parametrize(("T", "packed"), [(1, True), (77, True), (128, False), (300, True), (257, False)])
def test_blockwise_equals_reference_in_values_and_gradients(T, packed):
    q, k, v, segments = inputs(2, T, 3, 8, 6)

    def loss(implementation):
        def f(q, k, v):
            y = attention(q, k, v, segments if packed else None, scale=0.3, implementation=implementation)
            return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for got, wanted in zip(jax.tree.leaves(loss("blockwise")), jax.tree.leaves(loss("reference")), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("B", "H"), [(2, 12), (4, 3)])
def test_blockwise_in_groups_of_heads_and_sequences_equals_reference(B, H):
    """With 256 tokens 8 heads are computed at a time: 6 of 12, or two sequences of 3."""
    q, k, v, segments = inputs(B, 256, H, 8, 6)

    def loss(implementation):
        def f(q, k, v):
            y = attention(q, k, v, segments, scale=0.3, implementation=implementation)
            return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for got, wanted in zip(jax.tree.leaves(loss("blockwise")), jax.tree.leaves(loss("reference")), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=3e-5)


def test_a_packed_document_equals_the_document_alone():
    q, k, v, _ = inputs(1, 200, 2, 8, 8)
    lengths = [70, 1, 129]
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths))[None]
    packed = jax.jit(lambda *args: attention(*args, scale=0.5))(q, k, v, segments)
    reference = jax.jit(lambda *qkv: attention(*qkv, None, scale=0.5, implementation="reference"))
    start = 0
    for length in lengths:
        document = slice(start, start + length)
        alone = reference(q[:, document], k[:, document], v[:, document])
        np.testing.assert_allclose(packed[:, document], alone, rtol=1e-5, atol=1e-5)
        start += length


def test_large_scores_give_finite_values_and_gradients():
    q, k, v, segments = inputs(1, 150, 1, 8, 8)
    y, g = jax.jit(jax.value_and_grad(lambda q: attention(q * 1e4, k, v, segments, scale=1.0).sum()))(q)
    assert np.isfinite(y)
    assert np.isfinite(g).all()


def test_memory_is_linear_in_sequence_length():
    def temporaries(T):
        q, k, v, segments = (
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(lambda: inputs(1, T, 2, 8, 8))
        )
        grad = jax.grad(lambda q, k, v, s: attention(q, k, v, s, scale=1.0).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(q, k, v, segments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)


@pytest.mark.parametrize(("T", "S"), [(16, 64), (128, 512), (256, 512)])
def test_a_query_offset_gives_a_slice_of_the_queries(T, S):
    """As with context parallelism: the same values, and gradients of the slices add up."""
    q, k, v, segments = inputs(2, S, 2, 8, 6)

    def loss(q, k, v):
        y = attention(q, k, v, segments, scale=0.3, implementation="reference")
        return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

    def sliced(q, k, v):
        starts = range(0, S, T)
        slices = [(q[:, s : s + T], jnp.int32(s)) for s in starts]
        ys = [
            attention(q, k, v, segments, scale=0.3, query_offset=offset, implementation="blockwise")
            for q, offset in slices
        ]
        y = jnp.concatenate(ys, axis=1)
        return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

    got, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v) for f in (sliced, loss))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_the_gpu_implementation_equals_reference():
    """`jax.nn.dot_product_attention` with XLA instead of cuDNN: padding, mask and scale are the same."""
    q, k, v, segments = inputs(2, 50, 3, 8, 6)
    wanted = jax.jit(lambda *args: attention(*args, scale=0.3, implementation="reference"))(q, k, v, segments)
    got = jax.jit(lambda *args: dot_product(*args, jnp.int32(0), 0.3, "xla"))(q, k, v, segments)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_interpreted_tpu_kernel_equals_reference():
    from jax.experimental.pallas import tpu as pltpu

    q, k, v, segments = inputs(1, 128, 2, 192, 128)

    def loss(implementation):
        def f(q, k, v):
            return jnp.sin(attention(q, k, v, segments, scale=0.1, implementation=implementation)).sum()

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v)

    wanted = loss("reference")
    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):  # the kernel's own code promotes
        got = loss("splash")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_fallback_to_blockwise_is_logged_once(caplog):
    q, k, v, segments = inputs(1, 40, 2, 8, 8)
    for _ in range(2):
        attention(q, k, v, segments, scale=1.0, implementation="splash")
        attention(q, k, v, segments, scale=1.0, implementation="cudnn")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["attention"] * 2
    assert "using blockwise instead of splash: 40 queries" in caplog.text
    assert "using blockwise instead of cudnn" in caplog.text
