"""Dropout as a function of indices: a weight of attention, or a feature of a token, is dropped or kept in any
implementation, in any block and on any device, and the backward pass drops the same ones without storing which."""

import dataclasses
import math
from typing import Any, NamedTuple

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
    rate: float, key_2: UInt32[Array, "2"], rows: UInt32[Array, "*rows"], first_key: Array | int, keys: int
) -> Float[Array, "*rows s"]:
    """The factors of the weights of these queries and of `keys` keys from `first_key` on: 0 or 1 / (1 − rate)."""
    shape = (*rows.shape, keys)
    row = jnp.broadcast_to(rows[..., None], shape)
    column = jnp.broadcast_to(jnp.asarray(first_key).astype(jnp.uint32) + jnp.arange(keys, dtype=jnp.uint32), shape)
    bits, _ = threefry2x32_p.bind(key_2[0], key_2[1], row, column)
    kept: Bool[Array, "*rows s"] = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, 1 / (1 - rate), 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureDropout:
    """Which features of tokens are dropped, each with probability `rate`; the kept ones are divided by 1 − `rate`.
    Fields are arrays, or in a tree of shardings those of the arrays."""

    key_2: Any
    rows: Any
    """A number for each token, unique in the batch, uint32."""
    first: Any = 0
    """The number of the first feature, of which a device has a part."""
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __call__(self, x: Float[Array, "*x"]) -> Float[Array, "*x"]:
        """The axes of `rows` are the first ones of `x`; all others are features."""
        features = x.shape[self.rows.ndim :]
        factor = kept_scale(self.rate, self.key_2, self.rows, self.first, math.prod(features))
        return x * factor.reshape(x.shape).astype(x.dtype)


def token_numbers(*shape: int) -> UInt32[Array, "*rows"]:
    """`FeatureDropout.rows` of a batch of this shape."""
    return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
