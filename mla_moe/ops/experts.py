"""The routed half of DeepSeekMoE on one device: `Σ_k weight_k · down_k(silu(gate_k x) · up_k x)`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_moe.ops.grouped_matmul import Implementation, default_implementation, grouped_matmul
from mla_moe.ops.permutation import permutation, permute, unpermute, weights_by_row
from mla_moe.ops.swiglu import swiglu


def experts(
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    gate_up_EDgF: Float[Array, "*axes"],
    down_EFD: Float[Array, "*L E F D"],
    *,
    layer: Int[Array, ""] | None = None,
    most: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """Sort tokens by expert, run each expert on its own tokens, and bring the results back (DeepSeek-V3, equation 12).

    A choice of `E` is nobody's and adds nothing; `most` bounds the choices that are somebody's. Gate and up may be one
    axis. With `layer` the weights are those of a stack of layers, out of which no copy is made.
    """
    E, F, D = down_EFD.shape[-3:]
    first = None if layer is None else layer * E
    implementation = implementation or default_implementation()
    block = block_size(experts_NK.size if most is None else most, E, implementation)
    p = permutation(experts_NK, E, block, most)

    def multiply(x_RD, w_EDF):
        return grouped_matmul(x_RD, w_EDF, p.group_sizes_E, first, block=block, implementation=implementation)

    @jax.checkpoint  # moving rows again, and gating, costs less than to keep them
    def gate_up(x_ND, gate_up_EDgF):
        return multiply(permute(x_ND, p), gate_up_EDgF.reshape(-1, D, 2 * F))

    @jax.checkpoint
    def down(gate_up_R2F, weight_R, down_EFD):
        # Weighed here, not behind the product, whose results need not be kept for the weights' derivative then.
        h_RF = swiglu(gate_up_R2F, 1).astype(weight_R.dtype) * weight_R[:, None]
        return multiply(h_RF.astype(x_ND.dtype), down_EFD.reshape(-1, F, D))

    return unpermute(down(gate_up(x_ND, gate_up_EDgF), weights_by_row(weights_NK, p), down_EFD), p)


def block_size(rows: int, num_experts: int, implementation: Implementation | None) -> int:
    """About half of an expert's mean share, a power of two from 8 to 256; on CPU a quarter, to 128: small enough that
    padding costs little (at most one block an expert), large enough for a fast matrix product."""
    parts, largest = (4, 128) if implementation == "chunks" else (2, 256)
    share = max(rows // (parts * num_experts), 1)
    return min(max(1 << (share.bit_length() - 1), 8), largest)


def reference(x_ND, experts_NK, weights_NK, gate_up_ED2F, down_EFD):
    """The same with every expert on every token."""
    h_NE2F = jnp.einsum("ND,EDgF->NEgF", x_ND, gate_up_ED2F)
    y_NED = jnp.einsum("NEF,EFD->NED", jax.nn.silu(h_NE2F[:, :, 0]) * h_NE2F[:, :, 1], down_EFD)
    share_NKE = jax.nn.one_hot(experts_NK, len(down_EFD), dtype=weights_NK.dtype) * weights_NK[..., None]
    return jnp.einsum("NED,NKE->ND", y_NED, share_NKE.astype(y_NED.dtype))
