import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.cross_entropy import reference, token_logprobs


def case(B, T, D, V):
    keys = jax.random.split(jax.random.key(0), 4)
    h, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    return h, head, jax.random.randint(keys[2], (B, T), 0, V), jax.random.normal(keys[3], (B, T))


@pytest.mark.smoke
@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (4, 0.7), (7, 1.0), (100, 1.5)])
def test_equals_reference_in_value_and_gradients(chunk, temperature):
    h, head, targets, weights = case(2, 13, 6, 17)

    def run(f, **settings):
        def loss(h, head):
            logprob, entropy = f(h, head, targets, temperature=temperature, **settings)
            return jnp.sum(weights * logprob) + 5.0 * entropy.sum(), (logprob, entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h, head)

    got, wanted = run(token_logprobs, chunk=chunk), run(reference)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_entropy_has_no_gradient():
    h, head, targets, _ = case(1, 5, 3, 8)
    g_h, g_head = jax.grad(lambda *x: token_logprobs(*x, targets, chunk=2)[1].sum(), argnums=(0, 1))(h, head)
    assert (g_h == 0).all()
    assert (g_head == 0).all()


def test_bfloat16_activations_give_float32_log_probabilities():
    h, head, targets, _ = case(1, 5, 3, 8)
    h, head = h.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    (logprob, entropy), pullback = jax.vjp(lambda *x: token_logprobs(*x, targets, chunk=2), h, head)
    wanted = reference(h, head, targets)
    np.testing.assert_allclose(logprob, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(entropy, wanted[1], rtol=1e-6)
    assert [g.dtype for g in pullback((logprob, entropy))] == [jnp.bfloat16, jnp.bfloat16]


def test_full_logits_are_never_materialised():
    B, T, D, V = 1, 2048, 8, 512
    shapes = [
        jax.ShapeDtypeStruct(s, t) for s, t in (((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32))
    ]

    def temporaries(chunk):
        f = jax.grad(lambda h, w, t: token_logprobs(h, w, t, chunk=chunk)[0].sum(), argnums=(0, 1))
        return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(128) < B * T * V * 4 / 2
    assert temporaries(2048) >= B * T * V * 4
