import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Transformer, generate
from mla_moe.inference.generate import sample


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(cfg, rngs=nnx.Rngs(0))


PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5]]


@pytest.mark.smoke
def test_greedy_takes_the_likeliest_token_each_time(model):
    logits = jax.jit(lambda m, tokens: m(tokens))
    new = generate(model, PROMPTS, max_new_tokens=6)
    for prompt, tokens in zip(PROMPTS, new, strict=True):
        row = list(prompt)
        for _ in range(6):
            padded = jnp.array([row + [0] * (11 - len(row))])
            row.append(int(logits(model, padded)[0, len(row) - 1].argmax()))
        assert tokens == row[len(prompt) :]


def test_neighbours_do_not_matter(model):
    together = generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, seed=3)
    assert generate(model, PROMPTS[:1], max_new_tokens=5, temperature=1.0, seed=3) == together[:1]
    assert generate(model, PROMPTS, max_new_tokens=5, temperature=1.0, seed=4) != together


def test_stops_before_the_end_token(model):
    tokens = generate(model, PROMPTS[:1], max_new_tokens=6)[0]
    assert generate(model, PROMPTS[:1], max_new_tokens=6, eos_id=tokens[2])[0] == tokens[: tokens.index(tokens[2])]


def test_samples_follow_the_softmax_within_top_p():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(sample, in_axes=(0, None, None, None)))

    def shares(temperature, top_p):
        return np.bincount(draw(keys, logits, jnp.float32(temperature), jnp.float32(top_p)), minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(0.0, 1.0), [1, 0, 0, 0])
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(0.5, 1.0), squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize("bad", [{"prompts": []}, {"prompts": [[]]}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_impossible_requests(model, bad):
    with pytest.raises(ValueError, match=r"prompts|temperature"):
        generate(model, **{"prompts": PROMPTS, "max_new_tokens": 2} | bad)
