import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer, generate


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


def test_prompts_may_be_arrays(model):
    prompts = jnp.array([[1, 2, 3], [9, 8, 7]])
    assert generate(model, prompts, max_new_tokens=2) == generate(model, prompts.tolist(), max_new_tokens=2)


def test_stops_before_the_end_token(model):
    tokens = generate(model, PROMPTS[:1], max_new_tokens=6)[0]
    assert generate(model, PROMPTS[:1], max_new_tokens=6, eos_id=tokens[2])[0] == tokens[: tokens.index(tokens[2])]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": []}, {"prompts": [[]]}, {"prompts": [1, 2]}, {"prompts": ["text"]}, {"prompts": [[1.7]]},
        {"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 3.0}, {"max_new_tokens": 124}, {"seed": None},
        {"eos_id": [3, 4]},
    ],
)  # fmt: skip
def test_impossible_requests(model, bad):
    with pytest.raises(ConfigError, match=next(iter(bad)).removesuffix("s")):
        generate(model, **{"prompts": PROMPTS, "max_new_tokens": 2} | bad)
