"""Factors of LoRA adapters, of one adapter or of several for the sequences of a batch.

Several adapters of a matrix are one pair of factors, concatenated along the rank: `x [A_1 A_2 …]` has the columns of
all adapters, of which a token keeps those of its own, and `[B_1; B_2; …]` multiplies the zeros of the others. So
sequences with different adapters are in the same products, one without adapter gets exactly 0, ranks may differ, and no
weight is copied for a sequence. The price is that each step multiplies by all adapters: it suits tens of them, where
S-LoRA (arXiv 2311.03285) gathers the factors of each sequence for thousands.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mla_moe.ops.dropout import FeatureDropout


class LoRAFactors(NamedTuple):
    """`x A B`, which is added to the product with a matrix. A scale is part of B."""

    a: Float[Array, "*a"]
    b: Float[Array, "*b"]
    own_Nr: Bool[Array, "*N r"] | None = None
    """Of several adapters: which columns of `x A` belong to the adapter of each sequence, or token. None: all."""
    dropout: FeatureDropout | None = None
    """Dropout of `x`, in training."""


def keep_own(z: Float[Array, "*rows r"], own_Nr: Bool[Array, "*N r"] | None) -> Float[Array, "*rows r"]:
    """`x A` with 0 in the columns of other adapters than the sequence's or token's own. The axes of `own_Nr` before the
    last are the first ones of `z`."""
    if own_Nr is None:
        return z
    *rows, rank = own_Nr.shape
    return jnp.where(own_Nr.reshape(*rows, *(1,) * (z.ndim - own_Nr.ndim), rank), z, 0)
