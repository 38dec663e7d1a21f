"""Int8 quantization of the latent KV cache.

The latent and the rotary key of each entry are quantized to integers up to ±127, each with its own float32 scale: they
differ in magnitude, and so do neighbouring tokens. The two scales are stored behind the values as eight bytes, so that
the cache is a single array: DeepSeek-V3 needs 584 bytes per token and layer, in bfloat16 1,152.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

SCALE_BYTES = 8
"""Bytes of an entry that hold the two scales."""


def quantize(entries_xW: Float[Array, "*x W"], latent: int) -> Int8[Array, "*x Z"]:
    """To `Z = W + SCALE_BYTES` bytes; the first `latent` values of an entry are the latent."""
    values, scales = [], []
    for part in jnp.split(entries_xW.astype(jnp.float32), [latent], axis=-1):
        scale_x1 = jnp.abs(part).max(axis=-1, keepdims=True) / 127
        values.append(jnp.round(part / jnp.where(scale_x1 == 0, 1.0, scale_x1)).astype(jnp.int8))
        scales.append(jax.lax.bitcast_convert_type(scale_x1[..., 0], jnp.int8))
    return jnp.concatenate(values + scales, axis=-1)


def dequantize(bytes_xZ: Int8[Array, "*x Z"], latent: int, dtype: DTypeLike) -> Float[Array, "*x W"]:
    """The inverse of `quantize`, with an error of at most half a scale."""
    W = bytes_xZ.shape[-1] - SCALE_BYTES
    scale_x2 = jax.lax.bitcast_convert_type(bytes_xZ[..., W:].reshape(*bytes_xZ.shape[:-1], 2, 4), jnp.float32)
    is_key_W = jnp.arange(W) >= latent
    scale_xW = jnp.where(is_key_W, scale_x2[..., 1:], scale_x2[..., :1])
    return (bytes_xZ[..., :W].astype(jnp.float32) * scale_xW).astype(dtype)
