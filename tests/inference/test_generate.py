import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer, generate


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(cfg, rngs=nnx.Rngs(0))


PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5]]
"""Prompts and lengths below need few shapes of cache and batch: each is compiled."""


@pytest.mark.smoke
def test_greedy_decoding_takes_the_argmax_of_a_forward_pass(model):
    logits = jax.jit(lambda m, tokens: m(tokens))
    new = generate(model, PROMPTS, max_new_tokens=6)
    for prompt, tokens in zip(PROMPTS, new, strict=True):
        sequence = list(prompt)
        for _ in range(6):
            padded = jnp.array([sequence + [0] * (11 - len(sequence))])
            sequence.append(int(logits(model, padded)[0, len(sequence) - 1].argmax()))
        assert tokens == sequence[len(prompt) :]


def test_tokens_do_not_depend_on_other_prompts(model):
    together = generate(model, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3)
    assert generate(model, PROMPTS[:1], max_new_tokens=6, temperature=1.0, seed=3) == together[:1]
    assert generate(model, PROMPTS, max_new_tokens=6, temperature=1.0, seed=4) != together


def test_prompts_may_be_arrays(model):
    prompts = jnp.array([[1, 2, 3], [9, 8, 7], [4, 5, 6]])
    assert generate(model, prompts, max_new_tokens=6) == generate(model, prompts.tolist(), max_new_tokens=6)


def test_stops_before_eos_id(model):
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
def test_invalid_requests_are_refused(model, bad):
    with pytest.raises(ConfigError, match=next(iter(bad)).removesuffix("s")):
        generate(model, **{"prompts": PROMPTS, "max_new_tokens": 2} | bad)
