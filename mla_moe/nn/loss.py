"""What a batch costs, as sums: next-token and multi-token cross-entropy, and the balance of the experts. And what a
model thinks of given tokens, one by one."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mla_moe.nn.transformer import Transformer
from mla_moe.ops import token_logprobs as ops
from mla_moe.ops.cross_entropy import VocabSharding, cross_entropy
from mla_moe.parallel.mesh import BATCH_SPEC, TOKEN_AXES, token_mesh
from mla_moe.parallel.sharding import vocab_axes


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, so that parts of a batch add up."""

    nats: Float[Array, ""]
    mtp_nats: Float[Array, ""]
    balance: Float[Array, ""]
    """Of every expert layer and sequence, without α."""
    load_LE: Int[Array, "L E"]
    """Tokens sent to each expert, the prediction module's router last."""
    dropped: Int[Array, ""]
    """Choices of experts that were not followed, over all layers."""


class LossCounts(NamedTuple):
    """What the sums are divided by: counted over the whole batch."""

    tokens: Int[Array, ""]
    """Targets that count."""
    mtp_tokens: Int[Array, ""]
    sequences: int
    read: Int[Array, ""]
    """Tokens that are not padding."""


def loss_counts(batch: dict[str, Array]) -> LossCounts:
    read = (batch["segment_ids"] != 0).sum()
    return LossCounts(has_target(batch).sum(), has_second_target(batch).sum(), batch["tokens"].shape[0], read)


def has_target(batch):
    """Where the next token counts: not in padding, nor where the batch has `loss_mask` and it is 0."""
    real_BT = batch["segment_ids"] != 0
    return real_BT & (batch["loss_mask"] != 0) if "loss_mask" in batch else real_BT


def has_second_target(batch):
    """Where the token after the next counts and belongs to the same document (trap 9: boundaries are masked)."""
    segment_BT = batch["segment_ids"]
    return (_following(segment_BT) == segment_BT) & _following(has_target(batch))


def _following(x_BT):
    """What stands one place later, and 0 at the end."""
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def loss_sums(model: Transformer, batch: dict[str, Array], *, chunk: int, mtp: bool) -> LossSums:
    """Run the model on a batch `{tokens, targets, segment_ids, positions}`, all [B, T], which may have `loss_mask` too: 0
    where a target does not count, as a prompt's. With `mtp` its prediction module too."""
    place = batch["segment_ids"], batch["positions"]
    compute = model.precision.compute
    h_BTD, stats = model.hidden(batch["tokens"], *place)
    weights_BT = has_target(batch).astype(jnp.float32)
    nats = _cross_entropy(h_BTD, model.head[...].astype(compute), batch["targets"], weights_BT, chunk)
    loads = [] if stats is None else [stats.load_E]
    balance = jnp.float32(0) if stats is None else stats.balance.sum()
    dropped = jnp.int32(0) if stats is None else stats.dropped.sum()
    mtp_nats = jnp.float32(0)
    if mtp:
        # One head's gradient at a time: each is as large as the head, in float32.
        h_BTD, nats = jax.lax.optimization_barrier((h_BTD, nats))
        h_BTD, stats = model.mtp_hidden(h_BTD, batch["targets"], *place)
        second_BT = _following(batch["targets"])
        weights_BT = has_second_target(batch).astype(jnp.float32)
        mtp_nats = _cross_entropy(h_BTD, model.mtp_head[...].astype(compute), second_BT, weights_BT, chunk)
        loads.append(stats.load_E[None])
        balance += stats.balance
        dropped += stats.dropped
    load_LE = jnp.concatenate(loads) if loads else jnp.zeros((0, model.cfg.n_routed_experts), jnp.int32)
    return LossSums(nats, mtp_nats, balance, load_LE, dropped)


def token_logprobs(
    model: Transformer, h_BTD, targets_BT: Int[Array, "B T"], *, chunk: int, temperature: float = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """From final hidden states the log-probability of each target, and the entropy where it stands (no gradient)."""
    head_DV = model.head[...].astype(model.precision.compute)
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return ops.token_logprobs(h_BTD, head_DV, targets_BT, chunk=chunk, temperature=temperature)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor",))
    local = partial(ops.token_logprobs, chunk=chunk, temperature=temperature, vocab_axes=vocab)
    tokens = P(*BATCH_SPEC)
    inputs, outputs = (tokens, P(None, vocab), tokens), (tokens, tokens)
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, check_vma=False)(h_BTD, head_DV, targets_BT)


def _cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, chunk: int) -> Float[Array, ""]:
    """Under a mesh each device has its own tokens, and its own part of the vocabulary where that divides: the head and
    its gradient in float32 would be several GB."""
    mesh = token_mesh(h_BTD.shape)
    if mesh is None:
        return cross_entropy(h_BTD, head_DV, targets_BT, weights_BT, chunk=chunk)
    vocab = vocab_axes(mesh, head_DV.shape[1], ("tensor", "expert"))
    embed = "fsdp" if mesh.shape["fsdp"] > 1 and len(head_DV) % mesh.shape["fsdp"] == 0 else None

    def local(*args):
        split = VocabSharding(vocab, "expert" if "expert" in vocab else None, embed)
        return jax.lax.psum(cross_entropy(*args, chunk=chunk, split=split), TOKEN_AXES)

    tokens = P(*BATCH_SPEC)
    inputs = tokens, P(embed, vocab), tokens, tokens
    return jax.shard_map(local, in_specs=inputs, out_specs=P(), check_vma=False)(h_BTD, head_DV, targets_BT, weights_BT)
