"""Cross-entropy of a large vocabulary, a chunk of time at a time: `[B, T, vocab]` never exists, forward or backward.

The gradient of softmax cross-entropy is known as soon as the logits are, so the forward pass of differentiation
computes it chunk by chunk, and the logits are made once instead of twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "d V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
    vocab_axis: str | None = None,
    embed_axis: str | None = None,
) -> Float[Array, ""]:
    """`Σ weights · −log softmax(h @ head)[target]` in nats, float32. Weights are constants; 0 leaves a token out.

    `chunk` is how many tokens of each sequence have logits at one time. Within a `shard_map` over `vocab_axis`, each
    device holds a part of the vocabulary, in order; logits stay where they are, and only sums are exchanged.
    """
    T = h_BTD.shape[1]
    chunk = min(chunk, T)
    padding = -T % chunk
    if padding:
        h_BTD = jnp.pad(h_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
        weights_BT = jnp.pad(weights_BT, ((0, 0), (0, padding)))
    return _summed(h_BTD, head_DV, targets_BT, weights_BT.astype(jnp.float32), chunk, vocab_axis, embed_axis)


def reference(h_BTD, head_DV, targets_BT, weights_BT):
    """The same with all logits at once."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.sum(weights_BT * jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0])


def _chunks(x, chunk):
    """`[B, T, …] -> [T / chunk, B, chunk, …]`; the batch axis stays whole, so its sharding does too."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)


def _nats(h_BtD, head_DV, targets_Bt, weights_Bt, axis):
    """Their sum, the probabilities of this device's part of the vocabulary, and the targets' places in it."""
    logits_BtV = jnp.einsum("BtD,DV->BtV", h_BtD, head_DV, preferred_element_type=jnp.float32)
    V = head_DV.shape[1]
    if axis is not None:
        targets_Bt = targets_Bt - jax.lax.axis_index(axis) * V
    target_Bt = jnp.take_along_axis(logits_BtV, jnp.clip(targets_Bt, 0, V - 1)[..., None], axis=-1)[..., 0]
    if axis is None:
        log_z_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    else:
        here_Bt = (targets_Bt >= 0) & (targets_Bt < V)
        top_Bt1 = jax.lax.pmax(logits_BtV.max(axis=-1, keepdims=True), axis)
        mass_Bt = jnp.exp(logits_BtV - top_Bt1).sum(axis=-1)
        mass_Bt, target_Bt = jax.lax.psum((mass_Bt, jnp.where(here_Bt, target_Bt, 0)), axis)
        log_z_Bt = top_Bt1[..., 0] + jnp.log(mass_Bt)
    return jnp.sum(weights_Bt * (log_z_Bt - target_Bt)), jnp.exp(logits_BtV - log_z_Bt[..., None]), targets_Bt


def _gather(head_DV, axis):
    return head_DV if axis is None else jax.lax.all_gather(head_DV, axis, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _summed(h_BTD, head_DV, targets_BT, weights_BT, chunk, axis, embed_axis):
    head_DV = _gather(head_DV, embed_axis)

    def body(total, xs):
        h_BtD, targets_Bt, weights_Bt = xs
        return total + _nats(h_BtD, head_DV, targets_Bt, weights_Bt, axis)[0], None

    xs = tuple(_chunks(x, chunk) for x in (h_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, jnp.float32(0), xs)[0]


def _summed_forward(h_BTD, head_DV, targets_BT, weights_BT, chunk, axis, embed_axis):
    head_DV = _gather(head_DV, embed_axis)

    def body(carry, xs):
        total, g_head_DV = carry
        h_BtD, targets_Bt, weights_Bt = xs
        nats, p_BtV, places_Bt = _nats(h_BtD, head_DV, targets_Bt, weights_Bt, axis)
        g_BtV = weights_Bt[..., None] * (p_BtV - jax.nn.one_hot(places_Bt, head_DV.shape[1]))
        g_BtV = g_BtV.astype(h_BtD.dtype)
        g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        return (total + nats, g_head_DV), jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)

    xs = tuple(_chunks(x, chunk) for x in (h_BTD, targets_BT, weights_BT))
    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32))
    (total, g_head_DV), g_cBtD = jax.lax.scan(body, start, xs)
    g_head_DV = g_head_DV.astype(head_DV.dtype)
    if embed_axis is not None:
        g_head_DV = jax.lax.psum_scatter(g_head_DV, embed_axis, tiled=True)
    # Nothing goes on before the head's gradient is in its final, small form.
    total, g_cBtD, g_head_DV = jax.lax.optimization_barrier((total, g_cBtD, g_head_DV))
    return total, (jnp.moveaxis(g_cBtD, 0, 1).reshape(h_BTD.shape), g_head_DV)


def _summed_backward(chunk, axis, embed_axis, residuals, g):
    g_h_BTD, g_head_DV = residuals
    if axis is not None:
        g = jax.lax.psum(g, axis)  # the derivative of the sums over the vocabulary
    return g_h_BTD * g.astype(g_h_BTD.dtype), g_head_DV * g.astype(g_head_DV.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)
