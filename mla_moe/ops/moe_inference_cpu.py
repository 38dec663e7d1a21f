"""A mixture of experts for inference on one CPU, where time goes into moving weights from memory.

`grouped_matmul` gathers a copy of one expert's weights for every block of rows, worst case included. Here a loop walks
over what there really is: experts that some token chose, or blocks that have rows. Weights in bfloat16 are widened when
they have come into the processor's cache, so that half as much has to come. No derivative.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mla_moe.ops.permutation import permutation, permute, unpermute, weights_by_row

FEW = 2
"""Up to so many rows an expert on average, rows alone beat a matrix product, which rearranges the weights first."""


def selected_experts(
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    gate_up_ED2F: Num[Array, "E D 2 F"],
    down_EFD: Num[Array, "E F D"],
) -> Float[Array, "N D"]:
    """`Σ_k weight_k · down_k(silu(gate_k x) · up_k x)` over each token's chosen experts. Weights may be `packed`."""
    E, D, _, F = gate_up_ED2F.shape
    gate_up_EDf = gate_up_ED2F.reshape(E, D, 2 * F)

    def expert(e):
        gate_up_Df, down_FD = (_widen(w[e]).astype(x_ND.dtype) for w in (gate_up_EDf, down_EFD))

        def run(x_mD):
            h_mf = x_mD @ gate_up_Df
            return jnp.matmul(jax.nn.silu(h_mf[:, :F]) * h_mf[:, F:], down_FD, preferred_element_type=jnp.float32)

        return run

    few = experts_NK.size <= FEW * E
    way = _one_token if x_ND.shape[0] == 1 else _each_row if few else _each_block
    return way(expert, x_ND, experts_NK, weights_NK, E).astype(x_ND.dtype)


def is_packed(weight: Float[Array, "*axes"]) -> Num[Array, "*axes"]:
    """bfloat16 as the 16-bit integers that it is: XLA:CPU shifts those four times as fast as it converts the type."""
    return jax.lax.bitcast_convert_type(weight, jnp.uint16) if weight.dtype == jnp.bfloat16 else weight


def _widen(weight):
    if weight.dtype != jnp.uint16:
        return weight
    return jax.lax.bitcast_convert_type(weight.astype(jnp.uint32) << 16, jnp.float32)


def _one_token(expert, x_1D, experts_1K, weights_1K, E):
    def turn(k, y_1D):
        return y_1D + expert(experts_1K[0, k])(x_1D) * weights_1K[0, k]

    return jax.lax.fori_loop(0, experts_1K.shape[1], turn, jnp.zeros(x_1D.shape, jnp.float32))


def _each_row(expert, x_ND, experts_NK, weights_NK, E):
    """Chosen experts one by one, each on its rows one by one: its weights are widened once."""
    p = permutation(experts_NK, E, block=1)
    x_RD = permute(x_ND, p)
    end_E, used_E = jnp.cumsum(p.group_sizes_E), jnp.argsort(p.group_sizes_E == 0)

    def turn(i, y_RD):
        e = used_E[i]
        run = expert(e)

        def row(r, y_RD):
            x_1D = jax.lax.dynamic_slice_in_dim(x_RD, r, 1)
            return jax.lax.dynamic_update_slice_in_dim(y_RD, run(x_1D), r, 0)

        return jax.lax.fori_loop(end_E[e] - p.group_sizes_E[e], end_E[e], row, y_RD)

    y_RD = jax.lax.fori_loop(0, (p.group_sizes_E > 0).sum(), turn, jnp.zeros(x_RD.shape, jnp.float32))
    return unpermute(y_RD * weights_by_row(weights_NK, p)[:, None], p)


def _each_block(expert, x_ND, experts_NK, weights_NK, E):
    """Rows sorted by expert, a block of one expert's at a time."""
    share = max(experts_NK.size // E, 1)
    block = min(max(1 << (share.bit_length() - 1), 8), 32)
    p = permutation(experts_NK, E, block)
    x_RD = permute(x_ND, p)
    last_E = jnp.cumsum(p.group_sizes_E) // block

    def turn(i, y_RD):
        e = jnp.searchsorted(last_E, i, side="right")
        x_mD = jax.lax.dynamic_slice_in_dim(x_RD, i * block, block)
        return jax.lax.dynamic_update_slice_in_dim(y_RD, expert(e)(x_mD), i * block, 0)

    y_RD = jax.lax.fori_loop(0, last_E[-1], turn, jnp.zeros(x_RD.shape, jnp.float32))
    return unpermute(y_RD * weights_by_row(weights_NK, p)[:, None], p)
