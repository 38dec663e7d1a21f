"""Rotary position embedding (RoPE, arXiv 2104.09864) and its context extensions, as `transformers` computes them; pairs
are interleaved, as in DeepSeek, or the halves of the width."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_moe.config import AttentionConfig, LinearScaling, Llama3Scaling, Yarn
from mla_moe.ops.materialize import materialize

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


def softmax_scale(cfg: AttentionConfig) -> float:
    """`(nope + rope)^-½`, with YaRN times `m(factor, mscale_all_dim)²`."""
    scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5
    yarn = cfg.rope_scaling
    return scale * mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if isinstance(yarn, Yarn) else scale


def inverse_frequencies(cfg: AttentionConfig) -> np.ndarray:
    """The rotation of each pair per position in radians, `float32[rope / 2]`."""
    R, theta, scaling = cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling
    if theta is None:
        return np.zeros(R // 2, np.float32)
    frequency = theta ** -(np.arange(0, R, 2, dtype=np.float64) / R)
    match scaling:
        case LinearScaling():
            frequency = frequency / scaling.factor
        case Yarn():
            frequency = _yarn(frequency, theta, scaling)
        case Llama3Scaling():
            frequency = _llama3(frequency, scaling)
    return frequency.astype(np.float32)


def _yarn(frequency: np.ndarray, theta: float, yarn: Yarn) -> np.ndarray:
    """YaRN (arXiv 2309.00071) keeps pairs with more than `beta_fast` rotations within the original context length,
    divides the frequency by `factor` for pairs with fewer than `beta_slow`, and interpolates between them."""
    R = 2 * len(frequency)

    def pair_of_rotations(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return R * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of_rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of_rotations(yarn.beta_slow)), R - 1)
    ramp = np.clip((np.arange(R // 2) - low) / (high - low or 1e-3), 0, 1)
    return frequency / yarn.factor * ramp + frequency * (1 - ramp)


def _llama3(frequency: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Llama 3.1: like YaRN, but interpolated linearly in the number of rotations within the original context."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return frequency / scaling.factor * (1 - kept) + frequency * kept


def rotary(cfg: AttentionConfig, positions_BT: Int[Array, "B T"]) -> CosSin:
    """Cosine and sine of each pair's angle at each position, float32."""
    angle_BTr = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    factor = attention_factor(cfg.rope_scaling) if isinstance(cfg.rope_scaling, Yarn) else 1.0
    return materialize((jnp.cos(angle_BTr) * factor, jnp.sin(angle_BTr) * factor))


def query_scale(cfg: AttentionConfig, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
    """The factor of queries at each position (`llama_4_scaling_beta`), or None if it is 1 everywhere."""
    yarn = cfg.rope_scaling
    if not isinstance(yarn, Yarn) or not yarn.llama_4_scaling_beta:
        return None
    multiples_BT = positions_BT // yarn.original_max_position_embeddings
    return 1 + yarn.llama_4_scaling_beta * jnp.log1p(multiples_BT.astype(jnp.float32))


def rotate(
    x_BTHR: Float[Array, "B T H R"],
    cos_BTr: Float[Array, "B T r"],
    sin_BTr: Float[Array, "B T r"],
    *,
    interleaved: bool = True,
) -> Float[Array, "B T H R"]:
    """Rotate the pairs (x[2i], x[2i+1]) of every head by their angles, in float32; (x[i], x[i+R/2]) if they are not
    `interleaved`."""
    axis, pairs = (-1, (-1, 2)) if interleaved else (-2, (2, -1))
    first, second = jnp.moveaxis(x_BTHR.astype(jnp.float32).reshape(*x_BTHR.shape[:-1], *pairs), axis, 0)
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
    return materialize(rotated.reshape(x_BTHR.shape).astype(x_BTHR.dtype))
