"""Rotary positions with YaRN (arXiv 2104.09864, 2309.00071), pairs interleaved as in DeepSeek's weights."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_moe.config import ModelConfig, Yarn


def mscale(factor: float, k: float) -> float:
    """YaRN's attention temperature `0.1 k ln(factor) + 1`."""
    return 0.1 * k * math.log(factor) + 1.0


def attention_factor(yarn: Yarn) -> float:
    """What cosine and sine are multiplied by: `m(mscale) / m(mscale_all_dim)`, or `m(1)` where either is 0, as in
    transformers. It is 1 for the released models."""
    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return mscale(yarn.factor, 1.0)


def softmax_scale(cfg: ModelConfig) -> float:
    """`(nope + rope)^-½ · m(factor, mscale_all_dim)²`."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    yarn = cfg.rope_scaling
    return scale * mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def inverse_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Radians a position turns each pair by, `float32[rope / 2]`.

    YaRN keeps pairs that turn more than `beta_fast` times within the original length, divides by `factor` those that
    turn less than `beta_slow` times, and blends between.
    """
    R = cfg.qk_rope_head_dim
    frequency = cfg.rope_theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
    yarn = cfg.rope_scaling
    if yarn is None:
        return frequency.astype(np.float32)

    def pair_that_turns(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return R * math.log(length / (times * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), R - 1)
    blend = np.clip((np.arange(R // 2) - low) / (high - low or 1e-3), 0, 1)
    return (frequency / yarn.factor * blend + frequency * (1 - blend)).astype(np.float32)


def rotary(cfg: ModelConfig, positions_BT: Int[Array, "B T"]) -> tuple[Float[Array, "B T r"], Float[Array, "B T r"]]:
    """Cosine and sine of each pair's angle at each position, float32."""
    angle_BTr = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    yarn = cfg.rope_scaling
    amplitude = attention_factor(yarn) if yarn else 1.0
    return jnp.cos(angle_BTr) * amplitude, jnp.sin(angle_BTr) * amplitude


def rotate(
    x_BTHR: Float[Array, "B T H R"], cos_BTr: Float[Array, "B T r"], sin_BTr: Float[Array, "B T r"]
) -> Float[Array, "B T H R"]:
    """Turn the pairs (x[2i], x[2i+1]) of every head by their angles, in float32."""
    pair_BTHr2 = x_BTHR.astype(jnp.float32).reshape(*x_BTHR.shape[:-1], -1, 2)
    even, odd = pair_BTHr2[..., 0], pair_BTHr2[..., 1]
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BTHR.shape).astype(x_BTHR.dtype)
