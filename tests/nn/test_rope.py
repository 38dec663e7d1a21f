import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import ConfigError, preset
from mla_moe.config import AttentionConfig, Yarn, rope_scaling
from mla_moe.nn.rope import attention_factor, inverse_frequencies, query_scale, rotary, rotate, softmax_scale


@pytest.mark.parametrize(
    ("name", "multiplier"), [("deepseek-v3", 1.87385), ("deepseek-v2-lite", 1.58963), ("kimi-k2", 1.81326)]
)
def test_softmax_scale_of_the_released_models(name, multiplier):
    assert softmax_scale(preset(name).attention) * 192**0.5 == pytest.approx(multiplier, abs=1e-5)


def test_attention_factor_is_that_of_transformers():
    """The values of its `_compute_yarn_parameters` for factor 40."""
    yarn = preset("deepseek-v2-lite").rope_scaling
    assert attention_factor(yarn) == 1.0
    assert attention_factor(dataclasses.replace(yarn, mscale_all_dim=0.0)) == pytest.approx(1.3689, abs=1e-4)
    assert attention_factor(dataclasses.replace(yarn, mscale=1.0)) == pytest.approx(1.3689 / 1.2608, abs=1e-4)


def test_softmax_scale_without_yarn():
    assert softmax_scale(preset("moonlight-16b-a3b").attention) == pytest.approx(192**-0.5)


@pytest.mark.parametrize(("name", "low", "high"), [("deepseek-v3", 10, 23), ("kimi-k2", 19, 20)])
def test_yarn_interpolates_between_the_published_pairs(name, low, high):
    cfg = preset(name).attention
    plain = inverse_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    ratio = plain / inverse_frequencies(cfg)
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[high:], cfg.rope_scaling.factor, rtol=1e-5)
    if high - low > 1:
        assert 1 < ratio[low + 1] < ratio[high - 1] < cfg.rope_scaling.factor


def test_scores_depend_only_on_relative_position(cfg):
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, cfg.qk_rope_head_dim))

    def score(s, t):
        at = [rotary(cfg.attention, jnp.array([[p]])) for p in (s, t)]
        return (rotate(x, *at[0]) * rotate(y, *at[1])).sum()

    np.testing.assert_allclose(score(3, 10), score(90, 97), rtol=1e-4)
    assert abs(score(3, 10) - score(3, 11)) > 1e-3


def test_pairs_are_interleaved(cfg):
    """Values 2i and 2i + 1 are rotated together, so a single nonzero value stays within its pair."""
    x = jnp.zeros((1, 1, 1, 4)).at[..., 2].set(1.0)
    rotated = rotate(x, *rotary(cfg.attention, jnp.array([[50]])))[0, 0, 0]
    angle = 50 * inverse_frequencies(cfg.attention)[1]
    np.testing.assert_allclose(rotated, [0, 0, np.cos(angle), np.sin(angle)], atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "pairs", "factor"),
    [
        ({"rope_type": "default"}, [1, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278], 1),
        (
            {"rope_type": "linear", "factor": 4.0},
            [0.25, 0.07905694097, 0.02500000037, 0.007905694656, 0.002499999944, 0.0007905694656, 0.00025, 7.905694e-5],
            1,
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            [
                1,
                0.1939227581,
                0.0376060307,
                0.007292665075,
                0.000524846022,
                3.42810235e-5,
                6.64786967e-6,
                1.28917316e-6,
            ],
            1,
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": True},
            [1, 0.3162277639, 0.1, 0.025693506, 0.006249999627, 0.001383496565, 0.00025, 7.90569465e-5],
            1.138629436,
        ),
    ],
)
def test_kinds_by_name_are_those_of_transformers(parameters, pairs, factor):
    """The `inv_freq` and `attention_scaling` of its `DeepseekV3RotaryEmbedding` (5.23.0)."""
    theta = parameters.get("rope_theta", 1e4)
    cfg = AttentionConfig(8, 1, qk_rope_head_dim=16, rope_theta=theta, rope_scaling=rope_scaling(parameters))
    np.testing.assert_allclose(inverse_frequencies(cfg), pairs, rtol=1e-6)
    cos, sin = rotary(cfg, jnp.array([[0, 1000]]))
    np.testing.assert_allclose(np.hypot(cos, sin), factor, rtol=1e-6)
    np.testing.assert_allclose(
        np.arctan2(sin, cos)[0, 1], (np.array(pairs) * 1000 + np.pi) % (2 * np.pi) - np.pi, atol=1e-3
    )


def test_no_rotation():
    cfg = AttentionConfig(8, 1, qk_rope_head_dim=4, rope_theta=None)
    x = jax.random.normal(jax.random.key(0), (1, 1, 3, 4))
    np.testing.assert_array_equal(rotate(x, *rotary(cfg, jnp.array([[9]]))), x)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling.type"),
        ({"rope_type": "linear"}, "rope_scaling.factor"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "rope_scaling.beta_fast"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64, "low_freq_factor": 4.0},
         "rope_scaling.high_freq_factor"),
    ],
)  # fmt: skip
def test_what_a_kind_does_not_have_is_an_error(parameters, field):
    with pytest.raises(ConfigError) as error:
        rope_scaling(parameters)
    assert error.value.field == field


def test_pairs_by_halves_are_the_interleaved_pairs_in_another_order():
    cfg = dataclasses.replace(preset("tiny"), qk_rope_head_dim=6).attention
    x, cos_sin = jax.random.normal(jax.random.key(0), (1, 3, 2, 6)), rotary(cfg, jnp.array([[5, 70, 71]]))
    halves = jnp.array([0, 2, 4, 1, 3, 5])
    got = rotate(x[..., halves], *cos_sin, interleaved=False)
    np.testing.assert_allclose(got, rotate(x, *cos_sin)[..., halves], rtol=1e-6)


def test_queries_are_scaled_by_multiples_of_the_original_length():
    """The values of `get_llama_4_attn_scale` of transformers."""
    yarn = Yarn(factor=4.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.1)
    cfg = dataclasses.replace(preset("tiny").attention, rope_scaling=yarn)
    scale = query_scale(cfg, jnp.array([[0, 7, 8, 31]]))
    np.testing.assert_allclose(scale, [[1, 1, 1.0693147, 1.1386294]], rtol=1e-6)
    assert query_scale(preset("deepseek-v3").attention, jnp.array([[9]])) is None
