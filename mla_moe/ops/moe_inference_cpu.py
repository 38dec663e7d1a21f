"""MoE inference on one CPU, where reading the weights from memory dominates the time.

`grouped_matmul` gathers a copy of an expert's weights for every block of rows of the worst case. Here loops cover only
the selected experts, or the blocks that have rows. bfloat16 weights are converted to float32 when they are already in
the CPU's cache, which halves the memory traffic. No derivative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mla_moe.ops.experts import Activation, ExpertAdapters
from mla_moe.ops.lora import LoRAFactors, keep_own
from mla_moe.ops.permutation import permutation, permute, unpermute, weights_by_row

MAX_MEAN_ROWS = 2
"""Mean rows per expert up to which rows are multiplied one by one: a matmul would rearrange the weights first."""

Expert = Callable[[Array], Callable[[Array, Array], Array]]
"""From an expert's index to its function of activations and of the indices of their tokens."""


def selected_experts(
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    gate_up_ED2F: Num[Array, "E D 2 F"],
    down_EFD: Num[Array, "E F D"],
    activation: Activation = jax.nn.silu,
    adapters: ExpertAdapters = ExpertAdapters(),
) -> Float[Array, "N D"]:
    """`Σ_k weight_k · down_k(activation(gate_k x) · up_k x)` over each token's experts. A pair with the expert `E` is
    unassigned and adds nothing. The weights may be those of `pack_bfloat16`."""
    E, D, _, F = gate_up_ED2F.shape
    gate_up_EDf = gate_up_ED2F.reshape(E, D, 2 * F)

    def expert(e: Array) -> Callable[[Array, Array], Array]:
        gate_up_Df, down_FD = (_unpack(w[e]).astype(x_ND.dtype) for w in (gate_up_EDf, down_EFD))

        def mlp(x_mD: Array, token_m: Array) -> Array:
            h_mf = x_mD @ gate_up_Df
            if adapters.gate_up is not None:
                h_mf += _low_rank(x_mD, adapters.gate_up, e, token_m).astype(h_mf.dtype)
            h_mF = activation(h_mf[:, :F]) * h_mf[:, F:]
            y_mD = jnp.matmul(h_mF, down_FD, preferred_element_type=jnp.float32)
            return y_mD if adapters.down is None else y_mD + _low_rank(h_mF, adapters.down, e, token_m)

        return mlp

    if x_ND.shape[0] == 1:
        return _one_token(expert, E, x_ND, experts_NK, weights_NK).astype(x_ND.dtype)
    few = experts_NK.size <= MAX_MEAN_ROWS * E
    mean_rows = max(experts_NK.size // E, 1)
    block = 1 if few else min(max(1 << (mean_rows.bit_length() - 1), 8), 32)
    p = permutation(experts_NK, E, block)
    x_RD = permute(x_ND, p)
    rows = (x_RD, p.token_R), p.group_sizes_E
    y_RD = _by_row(expert, *rows) if few else _by_block(expert, *rows, block)
    return unpermute(y_RD * weights_by_row(weights_NK, p)[:, None], p).astype(x_ND.dtype)


def _low_rank(x_mD: Array, lora: LoRAFactors, e: Array, token_m: Array) -> Float[Array, "m F"]:
    """`x A B` of one expert, in float32."""
    z_mr = keep_own(x_mD @ lora.a[e], None if lora.own_Nr is None else lora.own_Nr[token_m])
    return jnp.matmul(z_mr, lora.b[e].reshape(z_mr.shape[1], -1), preferred_element_type=jnp.float32)


def pack_bfloat16(weight: Float[Array, "*axes"]) -> Num[Array, "*axes"]:
    """Reinterpret bfloat16 as uint16: XLA:CPU shifts integers four times as fast as it converts bfloat16 to float32.
    Other dtypes are returned as they are."""
    return jax.lax.bitcast_convert_type(weight, jnp.uint16) if weight.dtype == jnp.bfloat16 else weight


def _unpack(weight: Array) -> Array:
    if weight.dtype != jnp.uint16:
        return weight
    return jax.lax.bitcast_convert_type(weight.astype(jnp.uint32) << 16, jnp.float32)


def _one_token(expert: Expert, num_experts: int, x_1D: Array, experts_1K: Array, weights_1K: Array) -> Array:
    def add(k: Array, y_1D: Array) -> Array:
        e, token_1 = experts_1K[0, k], jnp.zeros(1, jnp.int32)
        weighted = lambda: y_1D + expert(e)(x_1D, token_1) * weights_1K[0, k]  # noqa: E731
        return jax.lax.cond(e < num_experts, weighted, lambda: y_1D)

    return jax.lax.fori_loop(0, experts_1K.shape[1], add, jnp.zeros(x_1D.shape, jnp.float32))


Rows = tuple[Float[Array, "R D"], Int[Array, "R"]]
"""Activations sorted by expert, and the token of each."""


def _by_row(expert: Expert, rows: Rows, group_sizes_E: Array) -> Array:
    """Loop over selected experts, and over the rows of each: an expert's weights are converted once."""
    end_E, used_E = jnp.cumsum(group_sizes_E), jnp.argsort(group_sizes_E == 0)

    def one_expert(i: Array, y_RD: Array) -> Array:
        e = used_E[i]
        mlp = expert(e)

        def one_row(r: Array, y_RD: Array) -> Array:
            row = (jax.lax.dynamic_slice_in_dim(of_rows, r, 1) for of_rows in rows)
            return jax.lax.dynamic_update_slice_in_dim(y_RD, mlp(*row), r, 0)

        return jax.lax.fori_loop(end_E[e] - group_sizes_E[e], end_E[e], one_row, y_RD)

    return jax.lax.fori_loop(0, (group_sizes_E > 0).sum(), one_expert, jnp.zeros(rows[0].shape, jnp.float32))


def _by_block(expert: Expert, rows: Rows, group_sizes_E: Array, block: int) -> Array:
    """Loop over blocks of expert-sorted rows, one expert per block."""
    end_E = jnp.cumsum(group_sizes_E) // block

    def one_block(i: Array, y_RD: Array) -> Array:
        e = jnp.searchsorted(end_E, i, side="right")
        of_block = (jax.lax.dynamic_slice_in_dim(of_rows, i * block, block) for of_rows in rows)
        return jax.lax.dynamic_update_slice_in_dim(y_RD, expert(e)(*of_block), i * block, 0)

    return jax.lax.fori_loop(0, end_E[-1], one_block, jnp.zeros(rows[0].shape, jnp.float32))
