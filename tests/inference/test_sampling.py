import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.inference.sampling import SamplingParams, sample

P = np.array([0.5, 0.3, 0.15, 0.05])
DRAWS = 4000


def shares(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """How often each of four tokens is drawn, by rows that differ in nothing but their token's number."""
    rows = jnp.ones(DRAWS)
    settings = SamplingParams(
        rows * temperature, rows.astype(int) * top_k, rows * top_p, rows * min_p, jnp.zeros((DRAWS, 2), jnp.uint32)
    )
    token, logprob = jax.jit(sample)(jnp.tile(jnp.log(P), (DRAWS, 1)), settings, jnp.arange(DRAWS))
    np.testing.assert_allclose(logprob, np.log(P)[token], atol=1e-6)
    return np.bincount(token, minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, P),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.7}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.9}, [0.5, 0.3, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.5, 0.3, 0, 0]),  # of what top-k left, the two best have 0.84
        ({"min_p": 0.25}, [0.5, 0.3, 0.15, 0]),
        ({"temperature": 0.5, "min_p": 0.25}, [0.25, 0.09, 0, 0]),
    ],
)
def test_shares_are_those_of_the_filtered_softmax(settings, kept):
    np.testing.assert_allclose(shares(**settings), np.array(kept) / np.sum(kept), atol=0.03)


def test_rows_with_different_settings_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    logits, keys = rng.normal(size=(6, 50)).astype(np.float32), rng.integers(0, 1 << 32, (6, 2)).astype(np.uint32)
    settings = SamplingParams(
        jnp.array([0.0, 1.0, 1.0, 0.7, 1.0, 2.0]),
        jnp.array([0, 0, 5, 0, 0, 9]),
        jnp.array([1.0, 1.0, 1.0, 0.6, 1.0, 0.9]),
        jnp.array([0.0, 0.0, 0.0, 0.0, 0.2, 0.1]),
        jnp.asarray(keys),
    )
    together, _ = sample(logits, settings, jnp.arange(6))
    for row in range(6):
        alone, _ = sample(logits[row, None], jax.tree.map(lambda x, i=row: x[i, None], settings), jnp.array([row]))
        assert alone[0] == together[row]
