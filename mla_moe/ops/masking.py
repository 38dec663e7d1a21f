"""Which keys a query of attention sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Masking(NamedTuple):
    """Which keys a query attends to, beside those of its segment. Queries and keys are counted along the sequence."""

    causal: bool = True
    """Not to later keys."""
    window: int | None = None
    """Sliding window, as in transformers: with `causal` to the last `window` keys, its own included; otherwise to keys
    at most `window` away."""

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many keys before and after its own index a query may attend to; None is all of them."""
        left = None if self.window is None else self.window - self.causal
        return left, 0 if self.causal else left

    def allowed(self, query: Array, key: Array) -> Bool[Array, "*axes"]:
        """Whether the query at one index attends to the key at another."""
        left, right = self.reach
        ok = jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
        ok = ok if left is None else ok & (query - key <= left)
        return ok if right is None else ok & (key - query <= right)


CAUSAL = Masking()


def attention_mask(
    query_segments_BT: Array, key_segments_BS: Array, masking: Masking = CAUSAL, index_T: Array | None = None
) -> Bool[Array, "B T S"]:
    """Which keys each query attends to. `index_T` are the queries' own indices, by default 0, 1, 2, …"""
    T, S = query_segments_BT.shape[1], key_segments_BS.shape[1]
    index_T = jnp.arange(T) if index_T is None else index_T
    allowed_TS = masking.allowed(index_T[:, None], jnp.arange(S))
    return allowed_TS & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])


def key_ranges(
    segments_BS: Int[Array, "B S"], masking: Masking = CAUSAL
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """The same as ranges of keys, `first <= s < end` for each query, where the tokens of a segment are adjacent."""
    S = segments_BS.shape[1]
    index_S, differs_BS = jnp.arange(S, dtype=jnp.int32), segments_BS[:, 1:] != segments_BS[:, :-1]
    starts_BS, ends_BS = (jnp.pad(differs_BS, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    first_BS = jax.lax.cummax(jnp.where(starts_BS, index_S, 0), axis=1)
    end_BS = jax.lax.cummin(jnp.where(ends_BS, index_S + 1, S), axis=1, reverse=True)
    left, right = masking.reach
    first_BS = first_BS if left is None else jnp.maximum(first_BS, index_S - left)
    return first_BS, end_BS if right is None else jnp.minimum(end_BS, index_S + right + 1)
