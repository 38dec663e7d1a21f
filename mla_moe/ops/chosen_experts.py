"""A mixture of experts for inference on one CPU, where time goes into moving weights from memory.

`grouped_matmul` gathers a copy of one expert's weights for every block of rows, worst case included. Here a loop walks
over what there really is: experts that some token chose, or blocks that have rows. No derivative.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.ops.dispatch import combine, dispatch, plan

FEW = 16
"""Up to so many tokens, running an expert on all of them costs less than sorting them by expert."""

PAIR = 2
"""Experts or blocks a turn: their products run side by side where one would leave a core idle (2 cores, 8 tokens, 32
experts of 256 × 128, five layers: 3.3 ms; one by one 3.7–5.9, by fours 4.8)."""


def chosen_experts(
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    gate_up_ED2F: Float[Array, "E D 2 F"],
    down_EFD: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """`Σ_k weight_k · down_k(silu(gate_k x) · up_k x)` over each token's chosen experts."""
    E, D, _, F = gate_up_ED2F.shape
    gate_up_EDf = gate_up_ED2F.reshape(E, D, 2 * F)

    def run(x_PmD, e_P):
        h_Pmf = jnp.einsum("PmD,PDf->Pmf", x_PmD, gate_up_EDf[e_P])
        h_PmF = jax.nn.silu(h_Pmf[..., :F]) * h_Pmf[..., F:]
        return jnp.einsum("PmF,PFD->PmD", h_PmF, down_EFD[e_P], preferred_element_type=jnp.float32)

    few = x_ND.shape[0] <= FEW
    return (_each_expert if few else _each_block)(run, x_ND, experts_NK, weights_NK, E).astype(x_ND.dtype)


def _each_expert(run, x_ND, experts_NK, weights_NK, E):
    """Every chosen expert on all tokens, weighed by 0 where it was not chosen."""
    chosen_NKE = experts_NK[..., None] == jnp.arange(E)
    share_EN = jnp.where(chosen_NKE, weights_NK[..., None], 0).sum(axis=1).T
    used_E = chosen_NKE.any(axis=(0, 1))
    order_E = jnp.pad(jnp.argsort(~used_E), (0, -E % PAIR))

    def turn(i, y_ND):
        e_P = jax.lax.dynamic_slice_in_dim(order_E, i * PAIR, PAIR)
        # What fills the last turn was chosen by nobody, or stands there a second time.
        real_P = i * PAIR + jnp.arange(PAIR) < E
        share_PN1 = jnp.where(real_P[:, None], share_EN[e_P], 0)[..., None]
        return y_ND + (run(jnp.broadcast_to(x_ND, (PAIR, *x_ND.shape)), e_P) * share_PN1).sum(axis=0)

    return jax.lax.fori_loop(0, -(-used_E.sum() // PAIR), turn, jnp.zeros(x_ND.shape, jnp.float32))


def _each_block(run, x_ND, experts_NK, weights_NK, E):
    """Rows sorted by expert, a block of one expert's at a time."""
    share = max(experts_NK.size // E, 1)
    block = min(max(1 << (share.bit_length() - 1), 8), 32)
    p = plan(experts_NK, E, block)
    x_RD = dispatch(x_ND, p)
    blocks = x_RD.shape[0] // block
    x_bmD = jnp.pad(x_RD.reshape(blocks, block, -1), ((0, blocks % PAIR), (0, 0), (0, 0)))
    last_E = jnp.cumsum(p.group_sizes_E) // block
    expert_b = jnp.minimum(jnp.searchsorted(last_E, jnp.arange(len(x_bmD)), side="right"), E - 1)

    def turn(i, y_bmD):
        x_PmD, e_P = (jax.lax.dynamic_slice_in_dim(a, i * PAIR, PAIR) for a in (x_bmD, expert_b))
        return jax.lax.dynamic_update_slice_in_dim(y_bmD, run(x_PmD, e_P), i * PAIR, 0)

    y_bmD = jnp.zeros(x_bmD.shape, jnp.float32)
    y_bmD = jax.lax.fori_loop(0, -(-last_E[-1] // PAIR), turn, y_bmD)
    return combine(y_bmD.reshape(-1, x_ND.shape[1]), weights_NK, p)
