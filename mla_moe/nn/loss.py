"""Losses from hidden states, as sums: cross-entropy over a sharded vocabulary, which targets count, log-probabilities.

`Transformer.loss_sums` runs the model on a batch and calls these.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from mla_moe.ops import cross_entropy as ops_cross_entropy
from mla_moe.ops import token_logprobs as ops_token_logprobs
from mla_moe.parallel.mesh import BATCH_SPEC, TOKEN_AXES, token_mesh
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


def target_mask(batch: Batch) -> Bool[Array, "B T"]:
    """Where the next token is a target: not at padding, and not where `loss_mask` is 0."""
    not_padding_BT = batch["segment_ids"] != 0
    return not_padding_BT & (batch["loss_mask"] != 0) if "loss_mask" in batch else not_padding_BT


def mtp_target_mask(batch: Batch) -> Bool[Array, "B T"]:
    """Where the token after the next one is a target of the MTP module: it counts, and is of the same document."""
    segments_BT = batch["segment_ids"]
    return (shift_left(segments_BT) == segments_BT) & shift_left(target_mask(batch))


def shift_left(x_BT: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """The value of the next position; 0 at the last position."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def cross_entropy(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """Weighted sum of the targets' cross-entropy in nats, `chunk` tokens of a sequence at a time. Under a mesh the
    vocabulary is sharded, if that divides it: the full head and its gradient in float32 would be several GB."""
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return ops_cross_entropy.cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, chunk=chunk)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor", "expert"))
    embed = "fsdp" if mesh.shape["fsdp"] > 1 and len(head_DV) % mesh.shape["fsdp"] == 0 else None

    def local(*args: Array) -> Array:
        sharding = ops_cross_entropy.VocabSharding(vocab, "expert" if "expert" in vocab else None, embed)
        return jax.lax.psum(ops_cross_entropy.cross_entropy(*args, chunk=chunk, sharding=sharding), TOKEN_AXES)

    tokens = P(*BATCH_SPEC)
    inputs = tokens, P(embed, vocab), tokens, tokens
    return jax.shard_map(local, in_specs=inputs, out_specs=P(), check_vma=False)(h_BTD, head_DV, targets_BT, weights_BT)


def token_logprobs(
    h_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target in nats, and the entropy of its distribution (no gradient), both at `temperature`,
    `chunk` tokens of a sequence at a time. Under a mesh the vocabulary is sharded over `tensor`."""
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return ops_token_logprobs.token_logprobs(h_BTD, head_DV, targets_BT, chunk=chunk, temperature=temperature)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor",))
    local = partial(ops_token_logprobs.token_logprobs, chunk=chunk, temperature=temperature, vocab_axes=vocab)
    tokens = P(*BATCH_SPEC)
    inputs, outputs = (tokens, P(None, vocab), tokens), (tokens, tokens)
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, check_vma=False)(h_BTD, head_DV, targets_BT)
