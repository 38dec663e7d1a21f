"""A number that tells whether an array is the one it was, whatever devices hold it.

    digest = Σ mix(bits of an element ⊕ its place)   mod 2³²

`mix` is one to one, so that an element with other bits always has another number; several that changed go unseen once
in 2³². A sum has no order: every device adds up its own part, and so does a host that holds no more than a part. It
costs one reading of the array.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

_MULTIPLIER = np.uint32(0x9E3779B1)
_CHUNK = 1 << 16  # elements that stay in a core's cache


def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Of an array whose elements have at most 32 bits."""
    width = x.dtype.itemsize
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}"))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return _mix(bits.astype(jnp.uint32) ^ (place * _MULTIPLIER)).sum(dtype=jnp.uint32)


def checksum_of_shard(part: Shaped[np.ndarray, "..."], index: tuple[int | slice, ...], shape: tuple[int, ...]) -> int:
    """What `part = x[index]` adds to the digest of an `x` of this shape, by NumPy. Numbers of parts add up mod 2³²."""
    strides = (math.prod(shape[axis + 1 :]) * int(_MULTIPLIER) % 2**32 for axis in range(len(shape)))
    spread = [
        np.multiply(np.arange(size, dtype=np.uint32)[i], np.uint32(stride))
        for size, i, stride in zip(shape, index, strides, strict=True)
    ]
    *outer, last = spread
    first = np.reshape(functools.reduce(np.add.outer, outer, np.uint32(0)), (-1, 1))
    bits = np.ascontiguousarray(part).view(f"u{part.itemsize}").reshape(len(first), -1)
    rows = max(_CHUNK // max(bits.shape[1], 1), 1)
    cuts = (slice(start, start + rows) for start in range(0, len(first), rows))
    return sum(int(_mix(bits[cut] ^ (first[cut] + last)).sum(dtype=np.uint32)) for cut in cuts) % 2**32


def _mix(x):
    x = x * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(13))
