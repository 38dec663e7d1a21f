"""Log-probabilities of given tokens, and the entropy of the distribution they were drawn from, computed in chunks:
`[B, T, vocab]` is never materialised, forward or backward.

Unlike in `cross_entropy`, a token's weight in the loss is unknown in the forward pass, so the backward pass recomputes
each chunk's logits; of the softmax it keeps the normaliser.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.ops.vocab_parallel import chunked, local_target_index, logits, unchunked, vocab_logits


def token_logprobs(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    chunk: int,
    temperature: float = 1.0,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`log softmax(h @ head / temperature)[target]` in nats, and the entropy of that softmax, both float32.

    The entropy is a metric: no gradient flows through it. `chunk` is the number of tokens of each sequence whose logits
    exist at the same time. Inside a `shard_map` the vocabulary is sharded over `vocab_axes`, in order; logits are not
    communicated, only sums and maxima.
    """
    chunk = min(chunk, h_BTD.shape[1])
    return _logprobs_and_entropy(h_BTD, head_DV, targets_BT, chunk, temperature, vocab_axes)


def reference(h_BTD: Array, head_DV: Array, targets_BT: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """The same with all logits at once."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32) / temperature
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    logprob_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return logprob_BT, jax.lax.stop_gradient(-jnp.sum(jnp.exp(log_p_BTV) * log_p_BTV, axis=-1))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _logprobs_and_entropy(
    h_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int, temperature: float, axes: tuple[str, ...]
) -> tuple[Array, Array]:
    return _forward(h_BTD, head_DV, targets_BT, chunk, temperature, axes)[0]


def _forward(
    h_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int, temperature: float, axes: tuple[str, ...]
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    def body(xs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        h_BtD, targets_Bt = xs
        s = vocab_logits(h_BtD, head_DV, targets_Bt, axes, temperature)
        log_p_BtV = s.logits_BtV - s.logsumexp_Bt[..., None]
        entropy_Bt = -jnp.sum(jnp.exp(log_p_BtV) * log_p_BtV, axis=-1)
        if axes:
            entropy_Bt = jax.lax.psum(entropy_Bt, axes)
        return s.target_logit_Bt - s.logsumexp_Bt, entropy_Bt, s.logsumexp_Bt

    out = jax.lax.map(body, (chunked(h_BTD, chunk), chunked(targets_BT, chunk)))
    logprob_BT, entropy_BT, logsumexp_BT = (unchunked(x, h_BTD.shape[1]) for x in out)
    return (logprob_BT, entropy_BT), (h_BTD, head_DV, targets_BT, logsumexp_BT)


def _backward(
    chunk: int, temperature: float, axes: tuple[str, ...], residuals: tuple[Array, ...], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    h_BTD, head_DV, targets_BT, logsumexp_BT = residuals
    g_BT, _ = g
    if axes:
        g_BT = jax.lax.psum(g_BT, axes)  # the derivative of the sums over the vocabulary

    def body(g_head_DV: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        h_BtD, targets_Bt, logsumexp_Bt, g_Bt = xs
        V = head_DV.shape[1]
        p_BtV = jnp.exp(logits(h_BtD, head_DV, temperature) - logsumexp_Bt[..., None])
        target_BtV = jax.nn.one_hot(local_target_index(targets_Bt, V, axes), V)
        g_BtV = (g_Bt[..., None] / temperature * (target_BtV - p_BtV)).astype(h_BtD.dtype)
        g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        return g_head_DV, jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)

    xs = tuple(chunked(x, chunk) for x in (h_BTD, targets_BT, logsumexp_BT, g_BT))
    g_head_DV, g_cBtD = jax.lax.scan(body, jnp.zeros(head_DV.shape, jnp.float32), xs)
    return unchunked(g_cBtD, h_BTD.shape[1]), g_head_DV.astype(head_DV.dtype), None


_logprobs_and_entropy.defvjp(_forward, _backward)
