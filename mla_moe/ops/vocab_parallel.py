"""Vocabulary-parallel softmax of a chunk of tokens, for the losses: on one device, or inside a `shard_map` over `axes`
across which the vocabulary is sharded, in order. Logits are not communicated, only sums and maxima."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class VocabLogits(NamedTuple):
    """Logits of a chunk of tokens, float32."""

    logits_BtV: Float[Array, "B t V"]
    """This device's shard."""
    logsumexp_Bt: Float[Array, "B t"]
    """Over the full vocabulary."""
    target_logit_Bt: Float[Array, "B t"]
    local_target_Bt: Int[Array, "B t"]
    """The target's index in this device's shard; out of range on all devices but one."""


def vocab_logits(
    h_BtD: Array, head_DV: Array, targets_Bt: Array, axes: tuple[str, ...], temperature: float = 1.0
) -> VocabLogits:
    logits_BtV = logits(h_BtD, head_DV, temperature)
    V = head_DV.shape[1]
    local_Bt = local_target_index(targets_Bt, V, axes)
    target_Bt = jnp.take_along_axis(logits_BtV, jnp.clip(local_Bt, 0, V - 1)[..., None], axis=-1)[..., 0]
    if not axes:
        return VocabLogits(logits_BtV, jax.nn.logsumexp(logits_BtV, axis=-1), target_Bt, local_Bt)
    here_Bt = (local_Bt >= 0) & (local_Bt < V)
    max_Bt1 = jax.lax.pmax(logits_BtV.max(axis=-1, keepdims=True), axes)
    sum_Bt = jnp.exp(logits_BtV - max_Bt1).sum(axis=-1)
    sum_Bt, target_Bt = jax.lax.psum((sum_Bt, jnp.where(here_Bt, target_Bt, 0)), axes)
    return VocabLogits(logits_BtV, max_Bt1[..., 0] + jnp.log(sum_Bt), target_Bt, local_Bt)


def logits(h_BtD: Array, head_DV: Array, temperature: float = 1.0) -> Float[Array, "B t V"]:
    return jnp.einsum("BtD,DV->BtV", h_BtD, head_DV, preferred_element_type=jnp.float32) / temperature


def local_target_index(targets_Bt: Int[Array, "B t"], V: int, axes: tuple[str, ...]) -> Int[Array, "B t"]:
    """The target's index in this device's shard of V tokens; out of range where another device has it."""
    return targets_Bt - jax.lax.axis_index(axes) * V if axes else targets_Bt


def chunked(x: Array, chunk: int) -> Array:
    """`[B, T, …] -> [⌈T / chunk⌉, B, chunk, …]`, padded with zeros. The batch axis is not split, so its sharding is
    kept."""
    B, T = x.shape[:2]
    padding = -T % chunk
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def unchunked(x: Array, T: int) -> Array:
    """The inverse of `chunked`, without the padding."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]
