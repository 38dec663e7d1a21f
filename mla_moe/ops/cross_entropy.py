"""Chunked cross-entropy over a large vocabulary: `[B, T, vocab]` is never materialised, forward or backward.

The gradient of softmax cross-entropy follows from the logits alone, so the forward pass of differentiation computes it
too, chunk by chunk, and logits are computed once instead of twice.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.ops.vocab_parallel import chunked, unchunked, vocab_logits


class VocabSharding(NamedTuple):
    """How the head and the tokens are sharded inside a `shard_map`, by mesh axes. Logits are never communicated."""

    vocab: tuple[str, ...] = ()
    """Axes over which the vocabulary is sharded."""
    tokens: str | None = None
    """One of `vocab`, if its devices have different tokens: each chunk of tokens is all-gathered over it, so that no
    device has the full head or its full gradient."""
    embed: str | None = None
    """Axis over which the head's rows are all-gathered, and their gradient reduce-scattered (FSDP)."""


UNSHARDED = VocabSharding()


def cross_entropy(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "d V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
    sharding: VocabSharding = UNSHARDED,
) -> Float[Array, ""]:
    """`Σ weights · −log softmax(h @ head)[target]` in nats, float32. Weights are constants; 0 excludes a token.

    `chunk` is the number of tokens of each sequence whose logits exist at the same time. With `sharding.tokens` each
    device returns 1/n of the sum over the n devices of that axis.
    """
    chunk = min(chunk, h_BTD.shape[1])
    return _sum(h_BTD, head_DV, targets_BT, weights_BT.astype(jnp.float32), chunk, sharding)


def reference(h_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array) -> Array:
    """The same with all logits at once."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.sum(weights_BT * jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0])


def _gather(x: Array, axis: str | None) -> Array:
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def _fraction(axis: str | None) -> float:
    """Of the sum that one device of the axis returns."""
    return 1.0 if axis is None else 1 / jax.lax.axis_size(axis)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sum(
    h_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, chunk: int, sharding: VocabSharding
) -> Array:
    head_DV = _gather(head_DV, sharding.embed)

    def body(total: Array, xs: tuple[Array, ...]) -> tuple[Array, None]:
        h_BtD, targets_Bt, weights_Bt = (_gather(x, sharding.tokens) for x in xs)
        s = vocab_logits(h_BtD, head_DV, targets_Bt, sharding.vocab)
        return total + jnp.sum(weights_Bt * (s.logsumexp_Bt - s.target_logit_Bt)), None

    xs = tuple(chunked(x, chunk) for x in (h_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, jnp.float32(0), xs)[0] * _fraction(sharding.tokens)


def _sum_forward(
    h_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, chunk: int, sharding: VocabSharding
) -> tuple[Array, tuple[Array, Array]]:
    head_DV = _gather(head_DV, sharding.embed)

    def body(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, g_head_DV = carry
        h_BtD, targets_Bt, weights_Bt = (_gather(x, sharding.tokens) for x in xs)
        s = vocab_logits(h_BtD, head_DV, targets_Bt, sharding.vocab)
        p_BtV = jnp.exp(s.logits_BtV - s.logsumexp_Bt[..., None])
        g_BtV = weights_Bt[..., None] * (p_BtV - jax.nn.one_hot(s.local_target_Bt, head_DV.shape[1]))
        g_BtV = g_BtV.astype(h_BtD.dtype)
        g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        total += jnp.sum(weights_Bt * (s.logsumexp_Bt - s.target_logit_Bt))
        g_BtD = jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)
        if sharding.tokens is not None:
            g_BtD = jax.lax.psum_scatter(g_BtD, sharding.tokens, tiled=True)
        return (total, g_head_DV), g_BtD

    xs = tuple(chunked(x, chunk) for x in (h_BTD, targets_BT, weights_BT))
    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, g_head_DV), g_cBtD = jax.lax.scan(body, start, xs)
    g_head_DV = g_head_DV.astype(head_DV.dtype)
    if sharding.embed is not None:
        g_head_DV = jax.lax.psum_scatter(g_head_DV, sharding.embed, tiled=True)
    # The barrier frees the head's float32 gradient before anything else runs.
    total, g_cBtD, g_head_DV = jax.lax.optimization_barrier((total, g_cBtD, g_head_DV))
    return total * _fraction(sharding.tokens), (unchunked(g_cBtD, h_BTD.shape[1]), g_head_DV)


def _sum_backward(
    chunk: int, sharding: VocabSharding, residuals: tuple[Array, Array], g: Array
) -> tuple[Array | None, ...]:
    g_h_BTD, g_head_DV = residuals
    if same_tokens := [axis for axis in sharding.vocab if axis != sharding.tokens]:
        g = jax.lax.psum(g, same_tokens)  # the derivative of the sums over the vocabulary
    return g_h_BTD * g.astype(g_h_BTD.dtype), g_head_DV * g.astype(g_head_DV.dtype), None, None


_sum.defvjp(_sum_forward, _sum_backward)
