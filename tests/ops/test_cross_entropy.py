import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.cross_entropy import cross_entropy, reference


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_equals_reference_in_value_and_gradients(chunk):
    B, T, D, V = 2, 13, 6, 17
    h, head = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (D, V))
    targets = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    weights = jax.random.uniform(jax.random.key(3), (B, T)) * (jnp.arange(T) > 2).astype(jnp.float32)

    def chunked(h, head):
        return 3.0 * cross_entropy(h, head, targets, weights, chunk=chunk)

    def full(h, head):
        return -3.0 * jnp.sum(weights * reference(h, head, targets)[0])

    got, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(h, head) for f in (chunked, full))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_full_logits_are_never_materialised():
    B, T, D, V = 1, 2048, 8, 512
    shapes = [
        jax.ShapeDtypeStruct(s, t) for s, t in (((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32))
    ]

    def temporaries(chunk):
        f = jax.grad(lambda h, w, t: cross_entropy(h, w, t, jnp.ones((B, T)), chunk=chunk), argnums=(0, 1))
        return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(128) < B * T * V * 4 / 2
    assert temporaries(2048) >= B * T * V * 4


def test_a_token_with_weight_zero_has_no_gradient():
    h, head = jnp.ones((1, 4, 3)), jnp.eye(3, 5)
    weights = jnp.array([[1.0, 0.0, 1.0, 0.0]])
    g = jax.grad(lambda h: cross_entropy(h, head, jnp.zeros((1, 4), jnp.int32), weights, chunk=2))(h)
    assert (g[0, 1::2] == 0).all()
    assert (jnp.abs(g[0, ::2]).sum(axis=-1) > 0).all()


def test_a_frozen_head_has_no_gradient_to_compute():
    B, T, D, V = 2, 13, 6, 17
    h, head = jax.random.normal(jax.random.key(0), (B, T, D)), jax.random.normal(jax.random.key(1), (D, V))
    targets, weights = jax.random.randint(jax.random.key(2), (B, T), 0, V), jnp.ones((B, T))

    def trained(h, head):
        return cross_entropy(h, head, targets, weights, chunk=4)

    def frozen(h, head):
        return trained(h, jax.lax.stop_gradient(head))

    compiled = [jax.jit(jax.grad(f, n)).lower(h, head).compile() for f, n in ((trained, (0, 1)), (frozen, 0))]
    np.testing.assert_array_equal(compiled[1](h, head), compiled[0](h, head)[0])
    flops = [program.cost_analysis()["flops"] for program in compiled]
    assert flops[0] - flops[1] > B * 4 * D * V  # the head's product, of a chunk
