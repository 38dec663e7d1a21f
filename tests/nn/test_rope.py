import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import preset
from mla_moe.nn.rope import attention_factor, inverse_frequencies, rotary, rotate, softmax_scale


@pytest.mark.parametrize(
    ("name", "multiplier"), [("deepseek-v3", 1.87385), ("deepseek-v2-lite", 1.58963), ("kimi-k2", 1.81326)]
)
def test_softmax_scale_of_the_released_models(name, multiplier):
    assert softmax_scale(preset(name)) * 192**0.5 == pytest.approx(multiplier, abs=1e-5)


def test_attention_factor_is_that_of_transformers():
    """The values of its `_compute_yarn_parameters` for factor 40."""
    yarn = preset("deepseek-v2-lite").rope_scaling
    assert attention_factor(yarn) == 1.0
    assert attention_factor(dataclasses.replace(yarn, mscale_all_dim=0.0)) == pytest.approx(1.3689, abs=1e-4)
    assert attention_factor(dataclasses.replace(yarn, mscale=1.0)) == pytest.approx(1.3689 / 1.2608, abs=1e-4)


def test_softmax_scale_without_yarn():
    assert softmax_scale(preset("moonlight-16b-a3b")) == pytest.approx(192**-0.5)


@pytest.mark.parametrize(("name", "low", "high"), [("deepseek-v3", 10, 23), ("kimi-k2", 19, 20)])
def test_yarn_interpolates_between_the_published_pairs(name, low, high):
    cfg = preset(name)
    plain = inverse_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    ratio = plain / inverse_frequencies(cfg)
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[high:], cfg.rope_scaling.factor, rtol=1e-5)
    if high - low > 1:
        assert 1 < ratio[low + 1] < ratio[high - 1] < cfg.rope_scaling.factor


def test_scores_depend_only_on_relative_position(cfg):
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, cfg.qk_rope_head_dim))

    def score(s, t):
        at = [rotary(cfg, jnp.array([[p]])) for p in (s, t)]
        return (rotate(x, *at[0]) * rotate(y, *at[1])).sum()

    np.testing.assert_allclose(score(3, 10), score(90, 97), rtol=1e-4)
    assert abs(score(3, 10) - score(3, 11)) > 1e-3


def test_pairs_are_interleaved(cfg):
    """Values 2i and 2i + 1 are rotated together, so a single nonzero value stays within its pair."""
    x = jnp.zeros((1, 1, 1, 4)).at[..., 2].set(1.0)
    rotated = rotate(x, *rotary(cfg, jnp.array([[50]])))[0, 0, 0]
    angle = 50 * inverse_frequencies(cfg)[1]
    np.testing.assert_allclose(rotated, [0, 0, np.cos(angle), np.sin(angle)], atol=1e-5)
