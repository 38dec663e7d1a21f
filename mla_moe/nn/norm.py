"""Root-mean-square norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mla_moe.nn.param import Precision, scale


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) · scale`, in float32 (arXiv 1910.07467)."""

    def __init__(self, axis: str, width: int, eps: float, precision: Precision):
        self.scale = scale(axis, width, precision.param)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)
