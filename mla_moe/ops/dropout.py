"""Dropout of attention weights, as a function of their indices: a weight is dropped or kept in any implementation, in
any block and on any device, and the backward pass drops the same ones without storing which."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Key, UInt32


class Dropout(NamedTuple):
    """Which weights of attention are dropped, each with probability `rate`; the kept ones are divided by 1 − `rate`."""

    rate: float
    key_2: UInt32[Array, "2"]
    rows_BHT: UInt32[Array, "B H T"]
    """A number for each query of each head, unique in the batch."""


def dropout_key(key: Key[Array, ""] | UInt32[Array, "n"]) -> UInt32[Array, "2"]:
    """The two words of a `jax.random.key` that seed the dropout."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return data[-2:]


def kept_scale(
    rate: float, key_2: UInt32[Array, "2"], rows_BHt: UInt32[Array, "B H t"], first_key: Array | int, keys: int
) -> Float[Array, "B H t s"]:
    """The factors of the weights of these queries and of `keys` keys from `first_key` on: 0 or 1 / (1 − rate)."""
    shape = (*rows_BHt.shape, keys)
    row = jnp.broadcast_to(rows_BHt[..., None], shape)
    column = jnp.broadcast_to(jnp.asarray(first_key).astype(jnp.uint32) + jnp.arange(keys, dtype=jnp.uint32), shape)
    bits, _ = threefry2x32_p.bind(key_2[0], key_2[1], row, column)
    kept: Bool[Array, "B H t s"] = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, 1 / (1 - rate), 0.0)
