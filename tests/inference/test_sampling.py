import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.inference.sampling import SamplingParams, sample

P = np.array([0.5, 0.3, 0.15, 0.05])
SAMPLES = 4000


def frequencies(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """How often each of four tokens is sampled, by sequences that differ only in the index of the token."""
    ones = jnp.ones(SAMPLES)
    params = SamplingParams(
        ones * temperature, ones.astype(int) * top_k, ones * top_p, ones * min_p, jnp.zeros((SAMPLES, 2), jnp.uint32)
    )
    token, logprob = jax.jit(sample)(jnp.tile(jnp.log(P), (SAMPLES, 1)), params, jnp.arange(SAMPLES))
    np.testing.assert_allclose(logprob, np.log(P)[token], atol=1e-6)
    return np.bincount(token, minlength=4) / SAMPLES


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, P),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.7}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.9}, [0.5, 0.3, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.5, 0.3, 0, 0]),  # of what top-k keeps, the two likeliest have 0.84
        ({"min_p": 0.25}, [0.5, 0.3, 0.15, 0]),
        ({"temperature": 0.5, "min_p": 0.25}, [0.25, 0.09, 0, 0]),
    ],
)
def test_frequencies_are_those_of_the_filtered_softmax(params, kept):
    np.testing.assert_allclose(frequencies(**params), np.array(kept) / np.sum(kept), atol=0.03)


def test_sequences_with_different_params_are_independent():
    rng = np.random.default_rng(0)
    logits, keys = rng.normal(size=(6, 50)).astype(np.float32), rng.integers(0, 1 << 32, (6, 2)).astype(np.uint32)
    params = SamplingParams(
        jnp.array([0.0, 1.0, 1.0, 0.7, 1.0, 2.0]),
        jnp.array([0, 0, 5, 0, 0, 9]),
        jnp.array([1.0, 1.0, 1.0, 0.6, 1.0, 0.9]),
        jnp.array([0.0, 0.0, 0.0, 0.0, 0.2, 0.1]),
        jnp.asarray(keys),
    )
    together, _ = sample(logits, params, jnp.arange(6))
    for i in range(6):
        alone, _ = sample(logits[i, None], jax.tree.map(lambda x, i=i: x[i, None], params), jnp.array([i]))
        assert alone[0] == together[i]
