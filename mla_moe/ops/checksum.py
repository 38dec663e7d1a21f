"""A checksum of an array that does not depend on how it is sharded.

    checksum = Σ mix(bits of an element ⊕ hash of its index)   mod 2³²

`mix` is a bijection, so a change of one element always changes the checksum; changes of several cancel with probability
2⁻³². A sum has no order: each device sums its own shard, and so does a host that holds one shard. The cost is one read
of the array.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

_MULTIPLIER = np.uint32(0x9E3779B1)
_CHUNK = 1 << 16  # elements that fit a core's cache


def checksum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """The checksum of an array whose elements have at most 32 bits."""
    width = x.dtype.itemsize
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}"))
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return _mix(bits.astype(jnp.uint32) ^ (index * _MULTIPLIER)).sum(dtype=jnp.uint32)


def checksum_of_shard(shard: Shaped[np.ndarray, "..."], index: tuple[int | slice, ...], shape: tuple[int, ...]) -> int:
    """The contribution of `shard = x[index]` to the checksum of an `x` of this shape, in NumPy. The sum over all shards
    mod 2³² is `checksum(x)`."""
    strides = (math.prod(shape[axis + 1 :]) * int(_MULTIPLIER) % 2**32 for axis in range(len(shape)))
    *outer, last = (
        np.multiply(np.arange(size, dtype=np.uint32)[i], np.uint32(stride))
        for size, i, stride in zip(shape, index, strides, strict=True)
    )
    first = np.reshape(functools.reduce(np.add.outer, outer, np.uint32(0)), (-1, 1))
    bits = np.ascontiguousarray(shard).view(f"u{shard.itemsize}").reshape(len(first), -1)
    rows = max(_CHUNK // max(bits.shape[1], 1), 1)
    chunks = (slice(start, start + rows) for start in range(0, len(first), rows))
    return sum(int(_mix(bits[chunk] ^ (first[chunk] + last)).sum(dtype=np.uint32)) for chunk in chunks) % 2**32


def _mix(x: Any) -> Any:
    """Mixed bits of a JAX or a NumPy array of uint32."""
    x = x * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(13))
