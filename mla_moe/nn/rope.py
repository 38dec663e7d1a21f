"""Rotary position embedding (RoPE) with YaRN (arXiv 2104.09864, 2309.00071); pairs are interleaved, as in DeepSeek."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_moe.config import ModelConfig, Yarn

CosSin = tuple[Float[Array, "B T r"], Float[Array, "B T r"]]
"""Cosine and sine of the angle of each of r = R / 2 pairs at each position."""


def mscale(factor: float, k: float) -> float:
    """YaRN's attention temperature `0.1 k ln(factor) + 1`."""
    return 0.1 * k * math.log(factor) + 1.0


def attention_factor(yarn: Yarn) -> float:
    """The factor of cosine and sine: `m(mscale) / m(mscale_all_dim)`, or `m(1)` where either is 0, as in transformers.
    It is 1 for the released models."""
    if yarn.mscale and yarn.mscale_all_dim:
        return mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    return mscale(yarn.factor, 1.0)


def softmax_scale(cfg: ModelConfig) -> float:
    """`(nope + rope)^-½ · m(factor, mscale_all_dim)²`."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    yarn = cfg.rope_scaling
    return scale * mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def inverse_frequencies(cfg: ModelConfig) -> np.ndarray:
    """The rotation of each pair per position in radians, `float32[rope / 2]`.

    YaRN keeps pairs with more than `beta_fast` rotations within the original context length, divides the frequency by
    `factor` for pairs with fewer than `beta_slow`, and interpolates between them.
    """
    R = cfg.qk_rope_head_dim
    frequency = cfg.rope_theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
    yarn = cfg.rope_scaling
    if yarn is None:
        return frequency.astype(np.float32)

    def pair_of_rotations(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return R * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(pair_of_rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of_rotations(yarn.beta_slow)), R - 1)
    ramp = np.clip((np.arange(R // 2) - low) / (high - low or 1e-3), 0, 1)
    return (frequency / yarn.factor * ramp + frequency * (1 - ramp)).astype(np.float32)


def rotary(cfg: ModelConfig, positions_BT: Int[Array, "B T"]) -> CosSin:
    """Cosine and sine of each pair's angle at each position, float32."""
    angle_BTr = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    yarn = cfg.rope_scaling
    factor = attention_factor(yarn) if yarn else 1.0
    return jnp.cos(angle_BTr) * factor, jnp.sin(angle_BTr) * factor


def rotate(
    x_BTHR: Float[Array, "B T H R"], cos_BTr: Float[Array, "B T r"], sin_BTr: Float[Array, "B T r"]
) -> Float[Array, "B T H R"]:
    """Rotate the pairs (x[2i], x[2i+1]) of every head by their angles, in float32."""
    pair_BTHr2 = x_BTHR.astype(jnp.float32).reshape(*x_BTHR.shape[:-1], -1, 2)
    even, odd = pair_BTHr2[..., 0], pair_BTHr2[..., 1]
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTHR.shape).astype(x_BTHR.dtype)
