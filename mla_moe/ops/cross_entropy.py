"""Cross-entropy, log-probabilities and KL over a large vocabulary, in chunks: `[B, T, vocab]` is never materialised.

Inside a `shard_map` the vocabulary can be sharded over mesh axes, in order; logits are not communicated, only sums and
maxima. `chunk` is the number of tokens of each sequence whose logits exist at the same time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class VocabSharding(NamedTuple):
    """How the head and the tokens are sharded inside a `shard_map`, by mesh axes."""

    vocab: tuple[str, ...] = ()
    """Axes over which the vocabulary is sharded."""
    tokens: str | None = None
    """One of `vocab`, if its devices have different tokens: each chunk of tokens is all-gathered over it, so that no
    device has the full head or its full gradient."""
    embed: str | None = None
    """Axis over which the head's rows are all-gathered, and their gradient reduce-scattered (FSDP)."""


UNSHARDED = VocabSharding()


class VocabLogits(NamedTuple):
    """Logits of a chunk of tokens, float32."""

    logits_BtV: Float[Array, "B t V"]
    """This device's shard."""
    logsumexp_Bt: Float[Array, "B t"]
    """Over the full vocabulary."""
    target_logit_Bt: Float[Array, "B t"]
    local_target_Bt: Int[Array, "B t"]
    """The target's index in this device's shard; out of range on all devices but one."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "d V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    chunk: int,
    sharding: VocabSharding = UNSHARDED,
) -> Float[Array, ""]:
    """`Σ weights · −log softmax(h @ head)[target]` in nats, float32. Weights are constants; 0 excludes a token.

    The gradient follows from the logits alone, so the forward pass of differentiation computes it too, chunk by chunk,
    and logits are computed once instead of twice. With `sharding.tokens` each device returns 1/n of the sum over the n
    devices of that axis.
    """
    return _loss_and_gradients(h_BTD, head_DV, targets_BT, weights_BT, chunk, sharding, False, False)[0]


def _cross_entropy_forward(
    h_BTD: Any, head_DV: Any, targets_BT: Any, weights_BT: Any, chunk: int, sharding: VocabSharding
) -> tuple[Array, tuple[Array | None, Array | None]]:
    """Loss and gradients; none is computed for a frozen head, as under LoRA."""
    arrays = h_BTD.value, head_DV.value, targets_BT.value, weights_BT.value
    return _loss_and_gradients(*arrays, chunk, sharding, True, head_DV.perturbed)


def _loss_and_gradients(
    h_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, chunk: int, sharding: VocabSharding,
    gradients: bool, head_gradient: bool,
) -> tuple[Array, tuple[Array | None, Array | None]]:  # fmt: skip
    def gather(x: Array, axis: str | None) -> Array:
        return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)

    head_DV = gather(head_DV, sharding.embed)

    def body(
        carry: tuple[Array, Array | None], xs: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array | None], Array | None]:
        total, g_head_DV = carry
        h_BtD, targets_Bt, weights_Bt = (gather(x, sharding.tokens) for x in xs)
        s = vocab_logits(h_BtD, head_DV, targets_Bt, sharding.vocab)
        total += jnp.sum(weights_Bt * (s.logsumexp_Bt - s.target_logit_Bt))
        if not gradients:
            return (total, None), None
        p_BtV = jnp.exp(s.logits_BtV - s.logsumexp_Bt[..., None])
        g_BtV = weights_Bt[..., None] * (p_BtV - jax.nn.one_hot(s.local_target_Bt, head_DV.shape[1]))
        g_BtV = g_BtV.astype(h_BtD.dtype)
        if g_head_DV is not None:
            g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        g_BtD = jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)
        if sharding.tokens is not None:
            g_BtD = jax.lax.psum_scatter(g_BtD, sharding.tokens, tiled=True)
        return (total, g_head_DV), g_BtD

    xs = tuple(_chunked(x, chunk) for x in (h_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    start = jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32) if head_gradient else None
    (total, g_head_DV), g_cBtD = jax.lax.scan(body, start, xs)
    fraction = 1.0 if sharding.tokens is None else 1 / jax.lax.axis_size(sharding.tokens)
    if g_cBtD is None:
        return total * fraction, (None, None)
    g_h_BTD = _unchunked(g_cBtD, h_BTD.shape[1])
    if g_head_DV is None:
        return total * fraction, (g_h_BTD, None)
    g_head_DV = g_head_DV.astype(head_DV.dtype)
    if sharding.embed is not None:
        g_head_DV = jax.lax.psum_scatter(g_head_DV, sharding.embed, tiled=True)
    # The barrier frees the head's float32 gradient before anything else runs.
    total, g_h_BTD, g_head_DV = jax.lax.optimization_barrier((total, g_h_BTD, g_head_DV))
    return total * fraction, (g_h_BTD, g_head_DV)


def _cross_entropy_backward(
    chunk: int, sharding: VocabSharding, residuals: tuple[Array, Array | None], g: Array
) -> tuple[Array | None, ...]:
    g_h_BTD, g_head_DV = residuals
    if same_tokens := [axis for axis in sharding.vocab if axis != sharding.tokens]:
        g = jax.lax.psum(g, same_tokens)  # the derivative of the sums over the vocabulary
    g_head_DV = None if g_head_DV is None else g_head_DV * g.astype(g_head_DV.dtype)
    return g_h_BTD * g.astype(g_h_BTD.dtype), g_head_DV, None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_logprobs(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    chunk: int,
    temperature: float = 1.0,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`log softmax(h @ head / temperature)[target]` in nats, and the entropy of that softmax, both float32.

    Unlike in `cross_entropy`, a token's weight in the loss is unknown in the forward pass, so the backward pass
    recomputes each chunk's logits; of the softmax it keeps the normaliser. The entropy is a metric: no gradient flows
    through it. The vocabulary is sharded over `vocab_axes`.
    """
    return _token_logprobs_forward(h_BTD, head_DV, targets_BT, chunk, temperature, vocab_axes)[0]


def _token_logprobs_forward(
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

    out = jax.lax.map(body, (_chunked(h_BTD, chunk), _chunked(targets_BT, chunk)))
    logprob_BT, entropy_BT, logsumexp_BT = (_unchunked(x, h_BTD.shape[1]) for x in out)
    return (logprob_BT, entropy_BT), (h_BTD, head_DV, targets_BT, logsumexp_BT)


def _token_logprobs_backward(
    chunk: int, temperature: float, axes: tuple[str, ...], residuals: tuple[Array, ...], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    h_BTD, head_DV, targets_BT, logsumexp_BT = residuals
    g_BT, _ = g
    if axes:
        g_BT = jax.lax.psum(g_BT, axes)  # the derivative of the sums over the vocabulary

    def body(g_head_DV: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        h_BtD, targets_Bt, logsumexp_Bt, g_Bt = xs
        V = head_DV.shape[1]
        p_BtV = jnp.exp(_logits(h_BtD, head_DV, temperature) - logsumexp_Bt[..., None])
        target_BtV = jax.nn.one_hot(_local_target(targets_Bt, V, axes), V)
        g_BtV = (g_Bt[..., None] / temperature * (target_BtV - p_BtV)).astype(h_BtD.dtype)
        g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        return g_head_DV, jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)

    xs = tuple(_chunked(x, chunk) for x in (h_BTD, targets_BT, logsumexp_BT, g_BT))
    g_head_DV, g_cBtD = jax.lax.scan(body, jnp.zeros(head_DV.shape, jnp.float32), xs)
    return _unchunked(g_cBtD, h_BTD.shape[1]), g_head_DV.astype(head_DV.dtype), None


token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def reference(h_BTD: Array, head_DV: Array, targets_BT: Array, temperature: float = 1.0) -> tuple[Array, Array]:
    """`token_logprobs` with all logits at once."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", h_BTD, head_DV, preferred_element_type=jnp.float32) / temperature
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    logprob_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return logprob_BT, jax.lax.stop_gradient(-jnp.sum(jnp.exp(log_p_BTV) * log_p_BTV, axis=-1))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def reverse_kl(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    teacher_BTE: Float[Array, "B T E"],
    teacher_head_EV: Float[Array, "E V"],
    chunk: int,
    temperature: float = 1.0,
    vocab_axes: tuple[str, ...] = (),
) -> Float[Array, "B T"]:
    """`KL(p ‖ q) = Σ_v p (log p − log q)` of each token in nats, float32, with `p = softmax(h @ head / temperature)` of
    a student and q of a teacher: the reverse KL of distillation, over the full vocabulary (GKD, arXiv 2306.13649).

    The teacher has its own width, and no gradient. The backward pass recomputes each chunk's logits. The vocabulary is
    sharded over `vocab_axes`.
    """
    return _reverse_kl_forward(h_BTD, head_DV, teacher_BTE, teacher_head_EV, chunk, temperature, vocab_axes)[0]


def _reverse_kl_forward(
    h_BTD: Array, head_DV: Array, teacher_BTE: Array, teacher_head_EV: Array, chunk: int, temperature: float,
    axes: tuple[str, ...],
) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    terms = partial(_full_kl_terms, head_DV, teacher_head_EV, temperature, axes)
    return _kl(terms, h_BTD, (teacher_BTE,), chunk), (h_BTD, head_DV, teacher_BTE, teacher_head_EV)


def _reverse_kl_backward(
    chunk: int, temperature: float, axes: tuple[str, ...], residuals: tuple[Array, ...], g_BT: Array
) -> tuple[Array | None, ...]:
    h_BTD, head_DV, teacher_BTE, teacher_head_EV = residuals
    terms = partial(_full_kl_terms, head_DV, teacher_head_EV, temperature, axes)
    grads = _kl_gradients(terms, h_BTD, head_DV, (teacher_BTE,), g_BT, chunk, temperature, axes)
    return *grads, None, None


reverse_kl.defvjp(_reverse_kl_forward, _reverse_kl_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def top_reverse_kl(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    ids_BTk: Int[Array, "B T k"],
    logprobs_BTk: Float[Array, "B T k"],
    chunk: int,
    vocab_axes: tuple[str, ...] = (),
) -> Float[Array, "B T"]:
    """`reverse_kl` to a teacher of which the log-probabilities of k different tokens are known at each position: of the
    distributions over these tokens and one event more, all other tokens. It is at most the full KL, and is that if the
    k tokens are all but one."""
    return _top_reverse_kl_forward(h_BTD, head_DV, ids_BTk, logprobs_BTk, chunk, vocab_axes)[0]


def _top_reverse_kl_forward(
    h_BTD: Array, head_DV: Array, ids_BTk: Array, logprobs_BTk: Array, chunk: int, axes: tuple[str, ...]
) -> tuple[Array, tuple[Array, ...]]:
    terms = partial(_top_kl_terms, head_DV, axes)
    return _kl(terms, h_BTD, (ids_BTk, logprobs_BTk), chunk), (h_BTD, head_DV, ids_BTk, logprobs_BTk)


def _top_reverse_kl_backward(
    chunk: int, axes: tuple[str, ...], residuals: tuple[Array, ...], g_BT: Array
) -> tuple[Array | None, ...]:
    h_BTD, head_DV, *teacher = residuals
    terms = partial(_top_kl_terms, head_DV, axes)
    grads = _kl_gradients(terms, h_BTD, head_DV, tuple(teacher), g_BT, chunk, 1.0, axes)
    return *grads, None, None


top_reverse_kl.defvjp(_top_reverse_kl_forward, _top_reverse_kl_backward)


KLTerms = tuple[Float[Array, "B t V"], Float[Array, "B t V"], Float[Array, "B t"]]
"""The student's probabilities p, `log p − log q` with q of the teacher, and their KL."""


def _kl(terms: Callable[..., KLTerms], h_BTD: Array, teacher: tuple[Array, ...], chunk: int) -> Array:
    chunks = tuple(_chunked(x, chunk) for x in (h_BTD, *teacher))
    return _unchunked(jax.lax.map(lambda xs: terms(*xs)[2], chunks), h_BTD.shape[1])


def _kl_gradients(
    terms: Callable[..., KLTerms], h_BTD: Array, head_DV: Array, teacher: tuple[Array, ...], g_BT: Array,
    chunk: int, temperature: float, axes: tuple[str, ...],
) -> tuple[Array, Array]:  # fmt: skip
    """Gradients of the student's hidden states and head. That of a logit is `p (log p − log q − KL)`, also where q
    and `log p` are those of an event of several tokens."""
    if axes:
        g_BT = jax.lax.psum(g_BT, axes)  # the derivative of the sums over the vocabulary

    def body(g_head_DV: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        h_BtD, *teacher, g_Bt = xs
        p_BtV, log_ratio_BtV, kl_Bt = terms(h_BtD, *teacher)
        g_BtV = g_Bt[..., None] / temperature * p_BtV * (log_ratio_BtV - kl_Bt[..., None])
        g_BtV = g_BtV.astype(h_BtD.dtype)
        g_head_DV += jnp.einsum("BtD,BtV->DV", h_BtD, g_BtV, preferred_element_type=jnp.float32)
        return g_head_DV, jnp.einsum("BtV,DV->BtD", g_BtV, head_DV)

    xs = tuple(_chunked(x, chunk) for x in (h_BTD, *teacher, g_BT))
    g_head_DV, g_cBtD = jax.lax.scan(body, jnp.zeros(head_DV.shape, jnp.float32), xs)
    return _unchunked(g_cBtD, h_BTD.shape[1]), g_head_DV.astype(head_DV.dtype)


def _full_kl_terms(
    head_DV: Array, teacher_head_EV: Array, temperature: float, axes: tuple[str, ...], h_BtD: Array, teacher_BtE: Array
) -> KLTerms:
    log_p_BtV = _log_softmax(_logits(h_BtD, head_DV, temperature), axes)
    log_ratio_BtV = log_p_BtV - _log_softmax(_logits(teacher_BtE, teacher_head_EV, temperature), axes)
    p_BtV = jnp.exp(log_p_BtV)
    kl_Bt = jnp.sum(p_BtV * log_ratio_BtV, axis=-1)
    return p_BtV, log_ratio_BtV, jax.lax.psum(kl_Bt, axes) if axes else kl_Bt


def _top_kl_terms(head_DV: Array, axes: tuple[str, ...], h_BtD: Array, ids_Btk: Array, logprobs_Btk: Array) -> KLTerms:
    """Other tokens than the k are one event, of which each has the log-ratio."""
    log_p_BtV, V = _log_softmax(_logits(h_BtD, head_DV, 1.0), axes), head_DV.shape[1]
    local_Btk = _local_target(ids_Btk, V, axes)
    here_Btk = (local_Btk >= 0) & (local_Btk < V)
    log_p_Btk = jnp.take_along_axis(log_p_BtV, jnp.clip(local_Btk, 0, V - 1), axis=-1)
    log_p_Btk = jnp.where(here_Btk, log_p_Btk, 0)
    B, t, _ = ids_Btk.shape
    at = jnp.arange(B)[:, None, None], jnp.arange(t)[:, None], jnp.where(here_Btk, local_Btk, V)
    p_BtV = jnp.exp(log_p_BtV)
    rest_Bt = p_BtV.at[at].set(0, mode="drop").sum(axis=-1)
    if axes:
        log_p_Btk, rest_Bt = jax.lax.psum((log_p_Btk, rest_Bt), axes)
    ratio_Btk = log_p_Btk - logprobs_Btk
    teacher_rest_Bt = 1 - jnp.exp(logprobs_Btk).sum(axis=-1)
    rest_ratio_Bt = jnp.log(jnp.maximum(rest_Bt, LEAST_REST)) - jnp.log(jnp.maximum(teacher_rest_Bt, LEAST_REST))
    kl_Bt = jnp.sum(jnp.exp(log_p_Btk) * ratio_Btk, axis=-1) + rest_Bt * rest_ratio_Bt
    log_ratio_BtV = jnp.broadcast_to(rest_ratio_Bt[..., None], p_BtV.shape).at[at].set(ratio_Btk, mode="drop")
    return p_BtV, log_ratio_BtV, kl_Bt


LEAST_REST = 1e-6
"""Smallest probability of all tokens but k: below it, the rounding of the k log-probabilities is larger."""


def _log_softmax(logits_BtV: Array, axes: tuple[str, ...]) -> Float[Array, "B t V"]:
    if not axes:
        return jax.nn.log_softmax(logits_BtV)
    logits_BtV -= jax.lax.pmax(logits_BtV.max(axis=-1, keepdims=True), axes)
    return logits_BtV - jnp.log(jax.lax.psum(jnp.exp(logits_BtV).sum(axis=-1, keepdims=True), axes))


def vocab_logits(
    h_BtD: Array, head_DV: Array, targets_Bt: Array, axes: tuple[str, ...], temperature: float = 1.0
) -> VocabLogits:
    """Vocabulary-parallel softmax of a chunk of tokens; the vocabulary is sharded over `axes`."""
    logits_BtV = _logits(h_BtD, head_DV, temperature)
    V = head_DV.shape[1]
    local_Bt = _local_target(targets_Bt, V, axes)
    target_Bt = jnp.take_along_axis(logits_BtV, jnp.clip(local_Bt, 0, V - 1)[..., None], axis=-1)[..., 0]
    if not axes:
        return VocabLogits(logits_BtV, jax.nn.logsumexp(logits_BtV, axis=-1), target_Bt, local_Bt)
    here_Bt = (local_Bt >= 0) & (local_Bt < V)
    max_Bt1 = jax.lax.pmax(logits_BtV.max(axis=-1, keepdims=True), axes)
    sum_Bt = jnp.exp(logits_BtV - max_Bt1).sum(axis=-1)
    sum_Bt, target_Bt = jax.lax.psum((sum_Bt, jnp.where(here_Bt, target_Bt, 0)), axes)
    return VocabLogits(logits_BtV, max_Bt1[..., 0] + jnp.log(sum_Bt), target_Bt, local_Bt)


def _logits(h_BtD: Array, head_DV: Array, temperature: float) -> Float[Array, "B t V"]:
    return jnp.einsum("BtD,DV->BtV", h_BtD, head_DV, preferred_element_type=jnp.float32) / temperature


def _local_target(targets_Bt: Int[Array, "*axes"], V: int, axes: tuple[str, ...]) -> Int[Array, "*axes"]:
    """The target's index in this device's shard of V tokens; out of range where another device has it."""
    return targets_Bt - jax.lax.axis_index(axes) * V if axes else targets_Bt


def _chunked(x: Array, chunk: int) -> Array:
    """`[B, T, …] -> [⌈T / chunk⌉, B, chunk, …]`, padded with zeros. The batch axis is not split, so its sharding is
    kept."""
    B, T = x.shape[:2]
    chunk = min(chunk, T)
    if padding := -T % chunk:
        x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)


def _unchunked(x: Array, T: int) -> Array:
    """The inverse of `_chunked`, without the padding."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]
