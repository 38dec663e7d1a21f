"""The MLP of routed experts on one device, dropless (DeepSeekMoE), and the gated activation of every MLP."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mla_moe.config.errors import require
from mla_moe.config.parallelism import GroupedMatmulKernel
from mla_moe.ops.grouped_matmul import grouped_matmul
from mla_moe.ops.kernel_choice import supported_grouped_matmul_kernel
from mla_moe.ops.lora import LoRAFactors, keep_own
from mla_moe.ops.permutation import permutation, permute, unpermute, weights_by_row
from mla_moe.ops.quantized_matrix import Matrix, QuantizedMatrix

Activation = Callable[[Array], Array]
"""An elementwise function."""


class ExpertAdapters(NamedTuple):
    """LoRA adapters of the experts: for each expert a product of low rank beside its matrix. None: without one."""

    gate_up: LoRAFactors | None = None
    """`[E, D, r]` and `[E, r, 2F]`, or gate and up an axis."""
    down: LoRAFactors | None = None
    """`[E, F, r]` and `[E, r, D]`."""


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
"""By the names of `hidden_act` in transformers."""


def find_activation(hidden_act: str | Activation) -> Activation:
    """The function of this name, or the function itself. Raises `ConfigError` with the choices for another name."""
    if not isinstance(hidden_act, str):
        return hidden_act
    fix = f"use one of {', '.join(ACTIVATIONS)}, or give a function"
    require(hidden_act in ACTIVATIONS, "hidden_act", hidden_act, fix)
    return ACTIVATIONS[hidden_act]


@partial(jax.checkpoint, static_argnums=(1, 2))
def gated(gate_up: Float[Array, "*both"], axis: int, activation: Activation = jax.nn.silu) -> Float[Array, "*half"]:
    """`activation(x · gate) * (x · up)` (with silu SwiGLU, arXiv 2002.05202), of both products concatenated along
    `axis`. The derivative recomputes everything from `gate_up`: cheaper than saving the intermediate values."""
    gate, up = jnp.split(gate_up, 2, axis)
    return activation(gate) * up


def experts(
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    gate_up_EDgF: Float[Array, "*axes"] | QuantizedMatrix,
    down_EFD: Float[Array, "*L E F D"] | QuantizedMatrix,
    *,
    layer: Int[Array, ""] | None = None,
    adapters: ExpertAdapters = ExpertAdapters(),
    max_pairs: int | None = None,
    activation: Activation = jax.nn.silu,
    implementation: GroupedMatmulKernel | None = None,
) -> Float[Array, "N D"]:
    """`Σ_k weight_k · down_k(activation(gate_k x) · up_k x)` (DeepSeek-V3, equation 12), in three steps: permute,
    grouped matmul, unpermute.

    A pair with the expert `E` is unassigned and adds nothing; at most `max_pairs` pairs may be assigned. Gate and up
    can be one axis. With `layer` weights and adapters are a stack of layers, of which no slice is copied. A row is
    multiplied by its expert's factors one after the other, and gradients are of the factors alone. Dropout of an
    adapter's input is the same for all experts of a token.
    """
    gate_up, down = expert_products(
        experts_NK, down_EFD.shape[-3:], x_ND.dtype, layer=layer, max_pairs=max_pairs, activation=activation,
        implementation=implementation,
    )  # fmt: skip
    return down(gate_up(x_ND, gate_up_EDgF, adapters.gate_up), weights_NK, down_EFD, adapters.down)


def expert_products(
    experts_NK: Int[Array, "N K"],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    layer: Int[Array, ""] | None = None,
    max_pairs: int | None = None,
    activation: Activation = jax.nn.silu,
    implementation: GroupedMatmulKernel | None = None,
) -> tuple[Callable[..., Float[Array, "R 2F"]], Callable[..., Float[Array, "N D"]]]:
    """`experts` as two functions, so that other operations can be ordered between them: of `x_ND`, the gate and up
    projections and their adapter the rows' products; of these, `weights_NK`, the down projections and their adapter the
    output. `shape` is E, F, D, and `dtype` that of `x_ND`."""
    E, F, D = shape
    group_offset = None if layer is None else layer * E
    implementation = supported_grouped_matmul_kernel(implementation, dtype)
    block = block_size(experts_NK.size if max_pairs is None else max_pairs, E, implementation)
    p = permutation(experts_NK, E, block, max_pairs)

    def multiply(x_RD: Array, w: Matrix, shape: tuple[int, int], lora: LoRAFactors | None) -> Array:
        def run(x_RD: Array, w_EDF: Array) -> Array:
            sizes_E = p.group_sizes_E
            return grouped_matmul(x_RD, w_EDF, sizes_E, group_offset, block=block, implementation=implementation)

        # Dequantized here, within the checkpoints: again for the backward pass, which keeps the codes.
        w_EDF = jax.lax.stop_gradient(w.dequantize(dtype)) if isinstance(w, QuantizedMatrix) else w
        w_EDF = w_EDF.reshape(-1, *shape)
        if lora is None:
            return run(x_RD, w_EDF)
        rank, own_Rr = lora.a.shape[-1], None if lora.own_Nr is None else lora.own_Nr[p.token_R]
        y_RF = run(x_RD, jax.lax.stop_gradient(w_EDF))
        if lora.dropout is not None:
            x_RD = dataclasses.replace(lora.dropout, rows=lora.dropout.rows[p.token_R])(x_RD)
        z_Rr = keep_own(run(x_RD, lora.a.reshape(-1, x_RD.shape[1], rank)), own_Rr)
        return y_RF + run(z_Rr, lora.b.reshape(-1, rank, y_RF.shape[1]))

    @jax.checkpoint  # to permute again, and to apply the activation again, costs less than to save the results
    def gate_up(x_ND: Array, gate_up_EDgF: Matrix, lora: LoRAFactors | None) -> Array:
        return multiply(permute(x_ND, p), gate_up_EDgF, (D, 2 * F), lora)

    @jax.checkpoint
    def weighted_down(gate_up_R2F: Array, weight_R: Array, down_EFD: Matrix, lora: LoRAFactors | None) -> Array:
        # Weighted before the product: so the weights' derivative does not need the product's result.
        h_RF = gated(gate_up_R2F, 1, activation).astype(weight_R.dtype) * weight_R[:, None]
        return multiply(h_RF.astype(dtype), down_EFD, (F, D), lora)

    def down(gate_up_R2F: Array, weights_NK: Array, down_EFD: Matrix, lora: LoRAFactors | None) -> Array:
        return unpermute(weighted_down(gate_up_R2F, weights_by_row(weights_NK, p), down_EFD, lora), p)

    return gate_up, down


def block_size(pairs: int, num_experts: int, implementation: GroupedMatmulKernel | None) -> int:
    """Rows per block: about half of an expert's mean rows, a power of two from 8 to 256; for `chunks` a quarter, up to
    128. Small enough that padding (at most one block per expert) costs little, large enough for a fast matmul. Kernels
    that take groups of any size need no blocks."""
    if implementation in ("tokamax", "ragged"):
        return 1
    divisor, largest = (4, 128) if implementation == "chunks" else (2, 256)
    rows = max(pairs // (divisor * num_experts), 1)
    return min(max(1 << (rows.bit_length() - 1), 8), largest)


def reference(x_ND: Array, experts_NK: Array, weights_NK: Array, gate_up_EDgF: Array, down_EFD: Array) -> Array:
    """The same with every expert applied to every token."""
    h_NEgF = jnp.einsum("ND,EDgF->NEgF", x_ND, gate_up_EDgF)
    y_NED = jnp.einsum("NEF,EFD->NED", jax.nn.silu(h_NEgF[:, :, 0]) * h_NEgF[:, :, 1], down_EFD)
    weight_NKE = jax.nn.one_hot(experts_NK, len(down_EFD), dtype=weights_NK.dtype) * weights_NK[..., None]
    return jnp.einsum("NED,NKE->ND", y_NED, weight_NKE.astype(y_NED.dtype))
