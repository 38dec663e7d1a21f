"""What a batch costs: next-token and multi-token cross-entropy, and the balance of the experts, as sums."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.nn.transformer import Transformer
from mla_moe.ops.cross_entropy import cross_entropy
from mla_moe.sharding import BATCH, TOKENS, current_mesh


class Sums(NamedTuple):
    """Sums over the tokens of a batch, so that parts of a batch add up."""

    nats: Float[Array, ""]
    mtp_nats: Float[Array, ""]
    balance: Float[Array, ""]
    """Of every expert layer and sequence, without α."""
    load_LE: Int[Array, "L E"]
    """Tokens sent to each expert, the prediction module's router last."""
    dropped: Int[Array, ""]
    """Choices of experts that were not followed, over all layers."""


class Sizes(NamedTuple):
    """What the sums are divided by: counted over the whole batch."""

    tokens: Int[Array, ""]
    mtp_tokens: Int[Array, ""]
    sequences: int


def sizes(batch: dict[str, Array]) -> Sizes:
    return Sizes(real(batch).sum(), has_second_target(batch).sum(), batch["tokens"].shape[0])


def real(batch):
    """Where a token is not padding."""
    return batch["segment_ids"] != 0


def has_second_target(batch):
    """Where the token after the next belongs to the same document (trap 9: boundaries are masked)."""
    segment_BT = batch["segment_ids"]
    following_BT = jnp.pad(segment_BT[:, 1:], ((0, 0), (0, 1)))
    return (following_BT == segment_BT) & real(batch)


def sums(model: Transformer, batch: dict[str, Array], *, chunk: int, mtp: bool) -> Sums:
    """Run the model on a batch `{tokens, targets, segment_ids, positions}`; with `mtp` its prediction module too."""
    place = batch["segment_ids"], batch["positions"]
    compute = model.precision.compute
    h_BTD, stats = model.hidden(batch["tokens"], *place)
    weights_BT = real(batch).astype(jnp.float32)
    nats = _cross_entropy(h_BTD, model.head[...].astype(compute), batch["targets"], weights_BT, chunk)
    loads = [] if stats is None else [stats.load_E]
    balance = jnp.float32(0) if stats is None else stats.balance.sum()
    dropped = jnp.int32(0) if stats is None else stats.dropped.sum()
    mtp_nats = jnp.float32(0)
    if mtp:
        # One head's gradient at a time: each is as large as the head, in float32.
        h_BTD, nats = jax.lax.optimization_barrier((h_BTD, nats))
        h_BTD, stats = model.mtp_hidden(h_BTD, batch["targets"], *place)
        second_BT = jnp.pad(batch["targets"][:, 1:], ((0, 0), (0, 1)))
        weights_BT = has_second_target(batch).astype(jnp.float32)
        mtp_nats = _cross_entropy(h_BTD, model.mtp_head[...].astype(compute), second_BT, weights_BT, chunk)
        loads.append(stats.load_E[None])
        balance += stats.balance
        dropped += stats.dropped
    load_LE = jnp.concatenate(loads) if loads else jnp.zeros((0, model.cfg.n_routed_experts), jnp.int32)
    return Sums(nats, mtp_nats, balance, load_LE, dropped)


def _cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, chunk: int) -> Float[Array, ""]:
    """Under a mesh each device has its own tokens, and its own part of the vocabulary where that divides."""
    mesh = current_mesh(h_BTD.shape)
    if mesh is None:
        return cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, chunk=chunk)
    D, V = head_DV.shape
    vocab = "tensor" if mesh.shape["tensor"] > 1 and V % mesh.shape["tensor"] == 0 else None
    embed = "fsdp" if mesh.shape["fsdp"] > 1 and D % mesh.shape["fsdp"] == 0 else None

    def local(*args):
        return jax.lax.psum(cross_entropy(*args, chunk=chunk, vocab_axis=vocab, embed_axis=embed), TOKENS)

    tokens = P(*BATCH)
    inputs = tokens, P(embed, vocab), tokens, tokens
    return jax.shard_map(local, in_specs=inputs, out_specs=P(), check_vma=False)(h_BTD, head_DV, targets_BT, weights_BT)
