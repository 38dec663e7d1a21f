import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.attention import attention, dot_product
from mla_moe.ops.dropout import Dropout, dropout_key, kept_scale
from mla_moe.ops.kernel_choice import log_fallback
from mla_moe.ops.masking import CAUSAL, Masking, attention_mask, key_ranges


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


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("T", "S", "masking", "padded", "rate"),
    [
        pytest.param(300, 300, Masking(causal=True, window=40), False, 0.0, id="window"),
        pytest.param(70, 300, Masking(causal=False), True, 0.3, id="cross, padding, dropout"),
        pytest.param(300, 300, Masking(causal=True, window=200), True, 0.3, id="window, padding, dropout", marks=slow),
        pytest.param(300, 300, Masking(causal=False), False, 0.0, id="not causal", marks=slow),
        pytest.param(257, 257, Masking(causal=False, window=150), True, 0.0, id="two-sided window", marks=slow),
        pytest.param(300, 70, Masking(causal=False), True, 0.0, id="few keys", marks=slow),
        pytest.param(5, 5, Masking(causal=False, window=1), False, 0.3, id="tiny", marks=slow),
    ],
)
def test_blockwise_masks_and_drops_as_plain_attention_does(T, S, masking, padded, rate):
    """Values and gradients; queries and keys with segments of their own, some queries without any key."""
    q, (_, k, v, segments) = inputs(2, T, 3, 8, 6)[0], inputs(2, S, 3, 8, 6, seed=5)
    key_segments = jnp.where(jnp.arange(S) % 7 == 3, -1, segments) if padded else segments
    query_segments = jnp.resize(segments, (2, T)) if padded else None
    rows = jnp.arange(2 * 3 * T, dtype=jnp.uint32).reshape(2, 3, T)
    dropout = Dropout(rate, dropout_key(jax.random.key(3)), rows) if rate else None

    def plain(q, k, v):
        """Softmax of the definition, with the masks written out once more."""
        t, s = jnp.arange(T)[:, None], jnp.arange(S)
        mask = (s <= t) if masking.causal else jnp.ones((T, S), bool)
        if masking.window:
            mask &= (t - s < masking.window) if masking.causal else (abs(t - s) <= masking.window)
        own = segments[:, :T] if query_segments is None else query_segments
        mask = (mask & (own[:, :, None] == key_segments[:, None]))[:, None]
        e = jnp.where(mask, jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k) * 0.3), 0.0)
        p = e / jnp.where(mask.any(-1, keepdims=True), e.sum(-1, keepdims=True), 1.0)
        if dropout:
            p = p * kept_scale(*dropout, first_key=0, keys=S)
        return jnp.einsum("bhts,bshd->bthd", p, v)

    def blockwise(q, k, v):
        options = {"masking": masking, "query_segment_ids_BT": query_segments, "dropout": dropout}
        return attention(q, k, v, key_segments, scale=0.3, implementation="blockwise", **options)

    def loss(f):
        def total(q, k, v):
            y = f(q, k, v)
            return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for got, wanted in zip(jax.tree.leaves(loss(blockwise)), jax.tree.leaves(loss(plain)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=3e-5)


def test_dropout_drops_the_given_fraction_of_weights_independently_of_blocks():
    rows = jnp.arange(2 * 2 * 50, dtype=jnp.uint32).reshape(2, 2, 50)
    key = dropout_key(jax.random.key(0))
    factors = kept_scale(0.25, key, rows, 0, 200)
    assert float((factors == 0).mean()) == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(factors[factors > 0], 1 / 0.75)
    np.testing.assert_array_equal(kept_scale(0.25, key, rows[:, 1:, 10:20], 64, 30), factors[:, 1:, 10:20, 64:94])
    assert (kept_scale(0.25, dropout_key(jax.random.key(1)), rows, 0, 200) != factors).mean() > 0.3


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_ranges_of_keys_equal_the_mask_of_segments(causal, window):
    """Where equal ids are adjacent."""
    segments = jnp.array([[3, 3, 1, 1, 1, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 7]])
    masking = Masking(causal, window)
    first, end = (x[..., None] for x in key_ranges(segments, masking))
    np.testing.assert_array_equal(
        (jnp.arange(8) >= first) & (jnp.arange(8) < end), attention_mask(segments, segments, masking)
    )


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


@pytest.mark.parametrize(
    ("T", "S", "masking"),
    [(16, 64, CAUSAL), (256, 512, CAUSAL), (128, 512, Masking(window=200)), pytest.param(192, 384, CAUSAL, marks=slow)],
)
def test_query_starts_give_a_part_of_the_queries(T, S, masking):
    """As with context parallelism, where a device's queries are one chunk or two, in any order: the same values, and
    the gradients of the parts add up."""
    q, k, v, segments = inputs(2, S, 2, 8, 6)

    def loss(q, k, v):
        y = attention(q, k, v, segments, scale=0.3, masking=masking, implementation="reference")
        return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

    def in_parts(q, k, v):
        n, y = S // T, jnp.zeros((2, S, 2, 6))
        for i in range(n):
            starts = np.array([2 * i, 2 * n - 1 - 2 * i] if n % 2 == 0 else [2 * i, 2 * i + 1]) * (T // 2)
            index = (starts[:, None] + np.arange(T // 2)).ravel()
            own = {"query_starts_P": jnp.array(starts, jnp.int32), "implementation": "blockwise"}
            y = y.at[:, index].set(attention(q[:, index], k, v, segments, scale=0.3, masking=masking, **own))
        return (jnp.sin(y) * jnp.arange(6.0)).sum(), y

    got, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v) for f in (in_parts, loss))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_the_gpu_implementation_equals_reference():
    """`jax.nn.dot_product_attention` with XLA instead of cuDNN: padding, mask and scale are the same."""
    q, k, v, segments = inputs(2, 50, 3, 8, 6)
    wanted = jax.jit(lambda *args: attention(*args, scale=0.3, implementation="reference"))(q, k, v, segments)
    got = jax.jit(lambda *args: dot_product(*args[:3], attention_mask(args[3], args[3]), 0.3, "xla"))(q, k, v, segments)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("T", "S", "masking"),
    [
        (256, 768, CAUSAL),  # the last of three devices: it has the chunks 4 and 1 of six
        pytest.param(128, 128, CAUSAL, marks=slow),
        pytest.param(768, 768, Masking(window=70), marks=slow),
        pytest.param(256, 768, Masking(window=300), marks=slow),
        pytest.param(128, 768, CAUSAL, marks=slow),  # blocks of two chunks
        pytest.param(128, 384, Masking(window=40), marks=slow),
        pytest.param(128, 128, Masking(causal=False), marks=slow),
        pytest.param(256, 512, Masking(causal=False, window=40), marks=slow),
    ],
)
def test_the_interpreted_tpu_kernel_equals_reference(T, S, masking):
    """Of all queries, or of those of one device with context parallelism; packed."""
    from jax.experimental.pallas import tpu as pltpu

    q, k, v, segments = inputs(1, S, 2, 192, 128)
    starts = None if T == S else jnp.array([S // T * 2 - 2, 1] if masking.causal else [2, 3], jnp.int32) * (T // 2)
    index = jnp.arange(S) if starts is None else (starts[:, None] + jnp.arange(T // 2)).ravel()

    def loss(implementation):
        def f(q, k, v):
            options = {"masking": masking, "query_starts_P": starts, "implementation": implementation}
            y = attention(q[:, index], k, v, segments, scale=0.1, **options)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    wanted = loss("reference")
    with pltpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):  # the kernel's own code promotes
        got = loss("splash")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_fallback_to_blockwise_is_logged_once(caplog):
    log_fallback.cache_clear()
    q, k, v, segments = inputs(1, 40, 2, 8, 8)
    for _ in range(2):
        attention(q, k, v, segments, scale=1.0, implementation="splash")
        attention(q, k, v, segments, scale=1.0, implementation="cudnn")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["attention"] * 2
    assert "using blockwise instead of splash: 40 queries" in caplog.text
    assert "using blockwise instead of cudnn" in caplog.text
