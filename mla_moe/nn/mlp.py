"""The gated MLP: dense first layers and shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mla_moe.config import ModelConfig
from mla_moe.nn.param import Precision, matrix


class MLP(nnx.Module):
    """`(silu(x · gate) * (x · up)) · down` (SwiGLU, arXiv 2002.05202); gate and up are one matrix."""

    def __init__(self, cfg: ModelConfig, width: int, *, rngs: nnx.Rngs, precision: Precision):
        D = cfg.hidden_size
        std = cfg.initializer_range
        gate_up, down = {"embed": D, "gate_up": 2, "hidden": width}, {"hidden": width, "embed": D}
        self.gate_up = matrix(rngs, gate_up, contracts=("embed",), std=std, dtype=precision.param)
        self.down = matrix(rngs, down, contracts=("hidden",), std=std, dtype=precision.param)
        self.precision = precision

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up, down = (w[...].astype(self.precision.compute) for w in (self.gate_up, self.down))
        gu_BT2F = jnp.einsum("BTD,DgF->BTgF", x_BTD, gate_up)
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gu_BT2F[:, :, 0]) * gu_BT2F[:, :, 1], down)
