"""Attention of `MLAttention` in training and prefill without a cache, under any mesh: keys and values of all heads are
computed from the latent (expanded, where decoding absorbs the matrix into the queries)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from mla_moe.config import AttentionConfig, KernelConfig
from mla_moe.nn.layers import Ids
from mla_moe.nn.lora import LoRA
from mla_moe.nn.rope import softmax_scale
from mla_moe.ops.attention import attention
from mla_moe.ops.dropout import Dropout, token_numbers
from mla_moe.ops.key_selection import SelectedKeys
from mla_moe.ops.masking import Masking
from mla_moe.ops.quantized_matrix import Matrix, QuantizedMatrix
from mla_moe.ops.weight_einsum import weight_einsum
from mla_moe.parallel.collectives import all_gather, shard_map
from mla_moe.parallel.context_parallel import query_starts
from mla_moe.parallel.mesh import BATCH_SPEC, mesh_axes, token_mesh
from mla_moe.parallel.quantized_weight import Weight, all_gather_matrix, dequantized, matrix_of
from mla_moe.parallel.sharded_einsum import sharded_einsum, weight_spec
from mla_moe.parallel.sharding import all_gather_weight


class Queries(NamedTuple):
    """What attention takes of the tokens that are queries, in the order in which devices compute it."""

    latent_BTQ: Float[Array, "B T Q"]
    positions_BT: Ids
    number_BT: UInt32[Array, "B T"]
    """Of each token in the batch, for dropout."""
    segments_BT: Ids | None
    selected_BTW: SelectedKeys | None


def masking_of(cfg: AttentionConfig) -> Masking:
    return Masking(cfg.causal, cfg.sliding_window)


def attend(
    q_BTHA: Array,
    c_BSC: Array,
    k_pe_BSR: Array,
    segments_BS: Array,
    queries: Queries,
    kv_b: nnx.Param,
    weight: Weight,
    lora: LoRA | None,
    cfg: AttentionConfig,
    kernels: KernelConfig,
    compute: DTypeLike,
    *,
    dropout_key_2: Array | None,
    swapped: bool,
) -> Float[Array, "B T H V"]:
    """Under a mesh each device computes its heads (tensor parallelism) for its queries. With context parallelism it
    all-gathers the latent, C + R values per token, where keys and values would be H · (A + V). Whether `queries` are
    swapped between devices (`parallel.context_parallel`) is `swapped`. `weight` is `kv_b` or what is quantized in
    its place, `lora` its adapter."""
    matrix, z_BSr, b_rHk = matrix_of(weight, compute), None, None
    if lora is not None:
        matrix = jax.lax.stop_gradient(matrix)
        dropout = lora.feature_dropout(token_numbers(*c_BSC.shape[:2]))
        z_BSr = sharded_einsum("BSC,Cr->BSr", c_BSC if dropout is None else dropout(c_BSC), lora.a, compute)
        b_rHk = (lora.scale * lora.b[...]).astype(compute)
    rows_BHT = None
    if dropout_key_2 is not None:
        T, H = q_BTHA.shape[1:3]  # the rows of all scores [B, H, T, S] are numbered
        sequence_B1T, index_B1T = (x[:, None] for x in jnp.divmod(queries.number_BT, jnp.uint32(T)))
        rows_BHT = (sequence_B1T * H + jnp.arange(H, dtype=jnp.uint32)[:, None]) * T + index_B1T
    inputs = q_BTHA, c_BSC, k_pe_BSR, matrix, segments_BS, queries.segments_BT, rows_BHT, dropout_key_2
    inputs = *inputs, queries.selected_BTW, z_BSr, b_rHk
    mesh = token_mesh(q_BTHA.shape) if token_mesh(c_BSC.shape) else None
    matrix_spec, b_spec, heads = P(), P(), None
    if mesh is not None:
        matrix_spec, b_spec = weight_spec(weight, mesh), P() if lora is None else weight_spec(lora.b, mesh)
        heads = "tensor" if "tensor" in mesh_axes(weight_spec(kv_b, mesh)[1]) else None

    def local(
        q_bthA: Array, c_bSC: Array, k_pe_bSR: Array, matrix: Matrix, segments_bS: Array,
        query_segments_bt: Array | None, rows_bht: Array | None, dropout_key_2: Array | None,
        selected_btW: Array | None, z_bSr: Array | None, b_rhk: Array | None,
    ) -> Array:  # fmt: skip
        def expand(c_bSC: Array) -> Array:
            complete = matrix if mesh is None else all_gather_matrix(matrix, matrix_spec)
            return weight_einsum("BTC,CHk->BTHk", c_bSC, dequantized(complete, compute))

        starts_P = None
        if mesh is not None and (devices := mesh.shape["context"]) > 1:
            starts_P = query_starts(q_bthA.shape[1], devices, swapped)
            gather = partial(all_gather, axes="context", axis=1)
            c_bSC, k_pe_bSR, segments_bS = (gather(x) for x in (c_bSC, k_pe_bSR, segments_bS))
            z_bSr = None if z_bSr is None else gather(z_bSr)
        with jax.named_scope("expand"):
            # As in `project`: dequantized again for the backward pass.
            kv_bShk = (jax.checkpoint(expand) if isinstance(matrix, QuantizedMatrix) else expand)(c_bSC)
            if z_bSr is not None and b_rhk is not None:
                kv_bShk += jnp.einsum("BTr,rHk->BTHk", z_bSr, all_gather_weight(b_rhk, b_spec))
            k_nope, v_bShV = jnp.split(kv_bShk, [cfg.qk_nope_head_dim], axis=-1)
            k_pe = jnp.broadcast_to(k_pe_bSR[:, :, None], (*k_nope.shape[:-1], k_pe_bSR.shape[-1]))
            k_bShA = jnp.concatenate([k_nope, k_pe], axis=-1)
        dropout = None
        if rows_bht is not None and dropout_key_2 is not None:
            dropout = Dropout(cfg.dropout, dropout_key_2, rows_bht)
        with jax.named_scope("attend"):
            return attention(
                q_bthA, k_bShA, v_bShV, segments_bS, scale=softmax_scale(cfg), masking=masking_of(cfg),
                query_segment_ids_BT=query_segments_bt, query_starts_P=starts_P, dropout=dropout,
                selected_BTW=selected_btW, implementation=kernels.attention,
            )  # fmt: skip

    if mesh is None:
        return local(*inputs)
    outputs, rows = P(*BATCH_SPEC, heads), P(BATCH_SPEC[0], heads, BATCH_SPEC[1])
    specs = outputs, BATCH_SPEC, BATCH_SPEC, matrix_spec, BATCH_SPEC, BATCH_SPEC, rows, P(), BATCH_SPEC
    specs = *specs, BATCH_SPEC, b_spec
    return shard_map(local, specs, outputs)(*inputs)
