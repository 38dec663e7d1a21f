"""Losses from hidden states, as sums: which targets count, and cross-entropy, log-probabilities and KL under a mesh."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from mla_moe.nn.layers import Activations, Ids, Mask
from mla_moe.ops import cross_entropy as ops
from mla_moe.parallel.collectives import psum, shard_map
from mla_moe.parallel.mesh import BATCH_SPEC, TOKEN_AXES, physical_axes, token_mesh
from mla_moe.parallel.sharding import vocab_axes

Batch = dict[str, Array]
"""`tokens`, `targets`, `segment_ids` and `positions`, int32[B, T]; optionally `loss_mask`, 0 where a target does not
count, such as in a prompt."""


class LossSums(NamedTuple):
    """Sums over the tokens of a microbatch: those of several microbatches add up to those of the batch."""

    nats: Float[Array, ""]
    """Next-token cross-entropy."""
    mtp_nats: Float[Array, ""]
    """Cross-entropy of the MTP module."""
    aux_loss: Float[Array, ""]
    """The sequence-wise auxiliary load-balancing loss without its weight, over all MoE layers and sequences."""
    z_loss: Float[Array, ""]
    """The router z-loss without its weight, over all MoE layers."""
    load_LE: Int[Array, "L E"]
    """Expert load: tokens per expert in each MoE layer, that of the MTP module last."""
    dropped: Int[Array, ""]
    """(Token, expert) pairs dropped at capacity, over all MoE layers."""


class LossCounts(NamedTuple):
    """What sums are normalised by: counts over the full batch, before it is split into microbatches."""

    targets: Int[Array, ""]
    mtp_targets: Int[Array, ""]
    sequences: int
    tokens_without_padding: Int[Array, ""]


def loss_counts(batch: Batch) -> LossCounts:
    """Count what is in a batch."""
    tokens = (batch["segment_ids"] != 0).sum()
    return LossCounts(target_mask(batch).sum(), mtp_target_mask(batch).sum(), batch["tokens"].shape[0], tokens)


def target_mask(batch: Batch) -> Mask:
    """Where the next token is a target: not at padding, and not where `loss_mask` is 0."""
    not_padding_BT = batch["segment_ids"] != 0
    return not_padding_BT & (batch["loss_mask"] != 0) if "loss_mask" in batch else not_padding_BT


def mtp_target_mask(batch: Batch) -> Mask:
    """Where the token after the next one is a target of the MTP module: it counts, and is of the same document."""
    segments_BT = batch["segment_ids"]
    return (shift_left(segments_BT) == segments_BT) & shift_left(target_mask(batch))


def shift_left(x_BT: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """The value of the next position; 0 at the last position."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def cross_entropy(
    h_BTD: Activations, head_DV: Float[Array, "D V"], targets_BT: Ids, weights_BT: Float[Array, "B T"], *, chunk: int
) -> Float[Array, ""]:
    """Weighted sum of the targets' cross-entropy in nats, `chunk` tokens of a sequence at a time. Under a mesh the
    vocabulary is sharded, if that divides it: the full head and its gradient in float32 would be several GB."""
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return ops.cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, chunk)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor", "expert"))
    embed = "fsdp" if mesh.shape["fsdp"] > 1 and len(head_DV) % mesh.shape["fsdp"] == 0 else None

    tokens = physical_axes("expert")[0] if "expert" in vocab else None
    sharding = ops.VocabSharding(physical_axes(vocab), tokens, physical_axes(embed)[0] if embed else None)

    def local(*args: Array) -> Array:
        return psum(ops.cross_entropy(*args, chunk, sharding), TOKEN_AXES)

    inputs = BATCH_SPEC, P(embed, vocab), BATCH_SPEC, BATCH_SPEC
    return shard_map(local, inputs, P())(h_BTD, head_DV, targets_BT, weights_BT)


def token_logprobs(
    h_BTD: Activations, head_DV: Float[Array, "D V"], targets_BT: Ids, *, chunk: int, temperature: float = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target in nats, and the entropy of its distribution (no gradient), both at `temperature`,
    `chunk` tokens of a sequence at a time. Under a mesh the vocabulary is sharded over `tensor`."""
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return ops.token_logprobs(h_BTD, head_DV, targets_BT, chunk, temperature)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor",))
    local = partial(ops.token_logprobs, chunk=chunk, temperature=temperature, vocab_axes=physical_axes(vocab))
    inputs, outputs = (BATCH_SPEC, P(None, vocab), BATCH_SPEC), (BATCH_SPEC, BATCH_SPEC)
    return shard_map(local, inputs, outputs)(h_BTD, head_DV, targets_BT)


def reverse_kl(
    h_BTD: Activations,
    head_DV: Float[Array, "D V"],
    teacher_BTE: Float[Array, "B T E"],
    teacher_head_EV: Float[Array, "E V"],
    *,
    chunk: int,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """KL of each token from a student's distribution to a teacher's, `ops.cross_entropy.reverse_kl`, at `temperature`,
    `chunk` tokens of a sequence at a time. Under a mesh the vocabulary is sharded over `tensor`."""
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return ops.reverse_kl(h_BTD, head_DV, teacher_BTE, teacher_head_EV, chunk, temperature)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor",))
    local = partial(ops.reverse_kl, chunk=chunk, temperature=temperature, vocab_axes=physical_axes(vocab))
    inputs = BATCH_SPEC, P(None, vocab), BATCH_SPEC, P(None, vocab)
    return shard_map(local, inputs, BATCH_SPEC)(h_BTD, head_DV, teacher_BTE, teacher_head_EV)


def top_reverse_kl(
    h_BTD: Activations,
    head_DV: Float[Array, "D V"],
    ids_BTk: Int[Array, "B T k"],
    logprobs_BTk: Float[Array, "B T k"],
    *,
    chunk: int,
) -> Float[Array, "B T"]:
    """`ops.cross_entropy.top_reverse_kl`, under a mesh as `reverse_kl`."""
    mesh, inputs = token_mesh(h_BTD.shape), (h_BTD, head_DV, ids_BTk, logprobs_BTk)
    if mesh is None:
        return ops.top_reverse_kl(*inputs, chunk)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor",))
    local = partial(ops.top_reverse_kl, chunk=chunk, vocab_axes=physical_axes(vocab))
    return shard_map(local, (BATCH_SPEC, P(None, vocab), BATCH_SPEC, BATCH_SPEC), BATCH_SPEC)(*inputs)
