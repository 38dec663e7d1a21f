"""Cross-entropy of a large vocabulary, a chunk of time at a time: `[B, T, vocab]` never exists, forward or backward.

The gradient of softmax cross-entropy is known as soon as the logits are, so the forward pass of differentiation
computes it chunk by chunk, and the logits are made once instead of twice.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.ops.vocab_parallel import chunked, unchunked, vocab_logits


class VocabSharding(NamedTuple):
    """How devices share the work within a `shard_map`, by mesh axes. Logits stay where they are made."""

    vocab: tuple[str, ...] = ()
    """Each device holds a part of the vocabulary, in order."""
    tokens: str | None = None
    """One of `vocab` whose devices have different tokens: they look at the tokens of all, a chunk at a time, so that
    none has the whole head or its gradient."""
    embed: str | None = None
    """Over which the head's rows are gathered, and their gradient is scattered."""


UNSHARDED = VocabSharding()


def cross_entropy(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "d V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
    split: VocabSharding = UNSHARDED,
) -> Float[Array, ""]:
    """`Σ weights · −log softmax(h @ head)[target]` in nats, float32. Weights are constants; 0 leaves a token out.

    `chunk` is how many tokens of each sequence have logits at one time. Where devices of `split.tokens` share tokens,
    each gets its part of the sum.
    """
    chunk = min(chunk, h_BTD.shape[1])
    return _sum(h_BTD, head_DV, targets_BT, weights_BT.astype(jnp.float32), chunk, split)


def reference(h_BTD, head_DV, targets_BT, weights_BT):
    """The same with all logits at once."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.sum(weights_BT * jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0])


def _gather(x, axis):
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def _share(axis):
    return 1 if axis is None else 1 / jax.lax.axis_size(axis)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sum(h_BTD, head_DV, targets_BT, weights_BT, chunk, split: VocabSharding):
    head_DV = _gather(head_DV, split.embed)

    def body(total, xs):
        h_BtD, targets_Bt, weights_Bt = (_gather(x, split.tokens) for x in xs)
        s = vocab_logits(h_BtD, head_DV, targets_Bt, split.vocab)
        return total + jnp.sum(weights_Bt * (s.log_z_Bt - s.target_Bt)), None

    xs = tuple(chunked(x, chunk) for x in (h_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, jnp.float32(0), xs)[0] * _share(split.tokens)


def _sum_forward(h_BTD, head_DV, targets_BT, weights_BT, chunk, split: VocabSharding):
    head_DV = _gather(head_DV, split.embed)

    def body(carry, xs):
        total, g_head_DV = carry
        h_BtD, targets_Bt, weights_Bt = (_gather(x, split.tokens) for x in xs)
        s = vocab_logits(h_BtD, head_DV, targets_Bt, split.vocab)
        p_BtV = jnp.exp(s.logits_BtV - s.log_z_Bt[..., None])
        g_BtV = weights_Bt[..., None] * (p_BtV - jax.nn.one_hot(s.place_Bt, head_DV.shape[1]))
        g_BtV = g_BtV.astype(h_BtD.dtype)
        g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        total += jnp.sum(weights_Bt * (s.log_z_Bt - s.target_Bt))
        g_BtD = jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)
        if split.tokens is not None:
            g_BtD = jax.lax.psum_scatter(g_BtD, split.tokens, tiled=True)
        return (total, g_head_DV), g_BtD

    xs = tuple(chunked(x, chunk) for x in (h_BTD, targets_BT, weights_BT))
    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, g_head_DV), g_cBtD = jax.lax.scan(body, start, xs)
    g_head_DV = g_head_DV.astype(head_DV.dtype)
    if split.embed is not None:
        g_head_DV = jax.lax.psum_scatter(g_head_DV, split.embed, tiled=True)
    # Nothing goes on before the head's gradient is in its final, small form.
    total, g_cBtD, g_head_DV = jax.lax.optimization_barrier((total, g_cBtD, g_head_DV))
    return total * _share(split.tokens), (unchunked(g_cBtD, h_BTD.shape[1]), g_head_DV)


def _sum_backward(chunk, split: VocabSharding, residuals, g):
    g_h_BTD, g_head_DV = residuals
    if same := [axis for axis in split.vocab if axis != split.tokens]:
        g = jax.lax.psum(g, same)  # the derivative of the sums over the vocabulary
    return g_h_BTD * g.astype(g_h_BTD.dtype), g_head_DV * g.astype(g_head_DV.dtype), None, None


_sum.defvjp(_sum_forward, _sum_backward)
