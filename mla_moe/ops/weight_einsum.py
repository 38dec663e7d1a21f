"""Einsum of activations and a weight, whose gradient is fast on CPU too."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_moe.ops.kernel_choice import target_platform
from mla_moe.ops.materialize import materialize


def weight_einsum(
    equation: str, x: Float[Array, "*tokens"], w: Float[Array, "*axes"], dtype: DTypeLike | None = None
) -> Float[Array, "*outputs"]:
    """`jnp.einsum(equation, x, w, preferred_element_type=dtype)`; each letter is in two of the three arrays, or in all.

    JAX derives the weight's gradient as `(gᵀ x)ᵀ`, which XLA makes a product of two transposed matrices. On CPU it
    takes 1.2 to 2.5 times as long as `xᵀ g`, so the derivative is given there, in reverse mode alone
    (docs/decisions/training-on-cpu.md)."""
    if target_platform() != "cpu":
        return jnp.einsum(equation, x, w, preferred_element_type=dtype)
    return _weight_einsum(equation, dtype, x, w)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight_einsum(equation: str, dtype: DTypeLike | None, x: Array, w: Array) -> Array:
    return jnp.einsum(equation, x, w, preferred_element_type=dtype)


def _forward(equation: str, dtype: DTypeLike | None, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    x = materialize(x)  # and not computed again, transposed, for the gradient
    return _weight_einsum(equation, dtype, x, w), (x, w)


def _backward(equation: str, _: DTypeLike | None, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = operands
    inputs, y_letters = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    g_x = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", g, w, preferred_element_type=g.dtype)
    g_w = jnp.einsum(f"{x_letters},{y_letters}->{w_letters}", x, g, preferred_element_type=g.dtype)
    return g_x.astype(x.dtype), g_w.astype(w.dtype)


_weight_einsum.defvjp(_forward, _backward)
