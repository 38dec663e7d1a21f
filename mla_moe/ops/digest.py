"""A number that tells whether an array is the one it was, whatever devices hold it.

    digest = Σ mix(bits of an element ⊕ its place)   mod 2³²

`mix` is one to one, so that an element with other bits always has another number; several that changed go unseen once
in 2³². A sum has no order: every device adds up its own part. It costs one reading of the array.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


def digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Of an array whose elements have at most 32 bits."""
    width = x.dtype.itemsize
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}"))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> jnp.uint32(13))).sum(dtype=jnp.uint32)
