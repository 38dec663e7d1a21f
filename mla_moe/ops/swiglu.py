"""The gate of every MLP: `silu(x · gate) * (x · up)` (SwiGLU, arXiv 2002.05202)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.checkpoint, static_argnums=1)
def swiglu(gate_up: Float[Array, "*both"], axis: int) -> Float[Array, "*half"]:
    """`gate_up` holds both products, one behind the other along `axis`, which comes out half as long.

    Its derivative begins with `gate_up` again: what lies between costs less to compute than to keep.
    """
    gate, up = jnp.split(gate_up, 2, axis)
    return jax.nn.silu(gate) * up
