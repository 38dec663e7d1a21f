"""The gated MLP: dense first layers and shared experts."""

from flax import nnx
from jaxtyping import Array, Float

from mla_moe.config import ModelConfig
from mla_moe.nn.param import Precision, matrix
from mla_moe.ops.swiglu import swiglu
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum


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
        return self._run(x_BTD, sharded_einsum)

    def extend(self, x_bTD: Float[Array, "b T D"]) -> Float[Array, "b T D"]:
        """The same for inference."""
        return self._run(x_bTD, plain_einsum)

    def _run(self, x_BTD, product: Einsum):
        gu_BT2F = product("BTD,DgF->BTgF", x_BTD, self.gate_up, self.precision.compute)
        h_BTF = swiglu(gu_BT2F, 2)[:, :, 0]
        return product("BTF,FD->BTD", h_BTF, self.down, self.precision.compute)
