"""What losses over a large vocabulary share: a softmax of a chunk of time, on one device or over several.

Within a `shard_map` over `axes` each device holds a part of the vocabulary, in order; logits stay where they are, and
only sums are exchanged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class VocabLogits(NamedTuple):
    """Of a chunk of tokens, float32."""

    logits_BtV: Float[Array, "B t V"]
    """This device's part."""
    log_z_Bt: Float[Array, "B t"]
    """`log Σ exp logits` over the whole vocabulary."""
    target_Bt: Float[Array, "B t"]
    """The target's logit."""
    place_Bt: Int[Array, "B t"]
    """Where the target is in this device's part; outside of it on all devices but one."""


def vocab_logits(h_BtD, head_DV, targets_Bt, axes: tuple[str, ...], temperature: float = 1.0) -> VocabLogits:
    logits_BtV = logits(h_BtD, head_DV, temperature)
    V = head_DV.shape[1]
    place_Bt = local_target_index(targets_Bt, V, axes)
    target_Bt = jnp.take_along_axis(logits_BtV, jnp.clip(place_Bt, 0, V - 1)[..., None], axis=-1)[..., 0]
    if not axes:
        return VocabLogits(logits_BtV, jax.nn.logsumexp(logits_BtV, axis=-1), target_Bt, place_Bt)
    here_Bt = (place_Bt >= 0) & (place_Bt < V)
    top_Bt1 = jax.lax.pmax(logits_BtV.max(axis=-1, keepdims=True), axes)
    mass_Bt = jnp.exp(logits_BtV - top_Bt1).sum(axis=-1)
    mass_Bt, target_Bt = jax.lax.psum((mass_Bt, jnp.where(here_Bt, target_Bt, 0)), axes)
    return VocabLogits(logits_BtV, top_Bt1[..., 0] + jnp.log(mass_Bt), target_Bt, place_Bt)


def logits(h_BtD, head_DV, temperature: float = 1.0) -> Float[Array, "B t V"]:
    return jnp.einsum("BtD,DV->BtV", h_BtD, head_DV, preferred_element_type=jnp.float32) / temperature


def local_target_index(targets_Bt, V: int, axes: tuple[str, ...]) -> Int[Array, "B t"]:
    return targets_Bt - jax.lax.axis_index(axes) * V if axes else targets_Bt


def chunked(x: Array, chunk: int) -> Array:
    """`[B, T, …] -> [⌈T / chunk⌉, B, chunk, …]`, padded with zeros; the batch axis stays whole, so its sharding does
    too."""
    B, T = x.shape[:2]
    padding = -T % chunk
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def unchunked(x: Array, T: int) -> Array:
    """Back again, without the padding."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]
