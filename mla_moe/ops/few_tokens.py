"""A mixture of experts for the few tokens of a decode step, whose time goes into reading weights.

`dispatch` and `grouped_matmul` gather a copy of one expert's weights for each block of rows, worst case included. Here
a loop walks over the experts that some token chose, and each runs on all tokens, weighed by 0 where it was not chosen.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FEW = 16
"""Up to so many tokens a matrix product takes the time of reading the matrix."""

PAIR = 2
"""Experts a turn: two products run side by side where one would leave a core idle (2 cores, 8 tokens, 32 experts of
256 × 128: 3.3 ms for five layers, 3.7–5.9 ms one by one, 4.8 ms by fours)."""


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
    share_NKE = jnp.where(experts_NK[..., None] == jnp.arange(E), weights_NK[..., None], 0)
    share_EN = share_NKE.sum(axis=1).T
    used_E = (experts_NK[..., None] == jnp.arange(E)).any(axis=(0, 1))
    order_E = jnp.pad(jnp.argsort(~used_E), (0, -E % PAIR))
    turns = -(-used_E.sum() // PAIR)

    def body(i, y_ND):
        e_P = jax.lax.dynamic_slice_in_dim(order_E, i * PAIR, PAIR)
        h_PNf = jnp.einsum("PND,PDf->PNf", jnp.broadcast_to(x_ND, (PAIR, *x_ND.shape)), gate_up_EDf[e_P])
        # An expert that fills the last turn was chosen by nobody: its shares are 0.
        real_P = i * PAIR + jnp.arange(PAIR) < E
        share_PN1 = jnp.where(real_P[:, None], share_EN[e_P], 0)[..., None]
        h_PNF = jax.nn.silu(h_PNf[..., :F]) * h_PNf[..., F:]
        y_PND = jnp.einsum("PNF,PFD->PND", h_PNF, down_EFD[e_P], preferred_element_type=jnp.float32)
        return y_ND + (y_PND * share_PN1).sum(axis=0)

    return jax.lax.fori_loop(0, turns, body, jnp.zeros(x_ND.shape, jnp.float32)).astype(x_ND.dtype)
