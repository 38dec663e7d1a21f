"""Parameters with named axes, from which sharding and optimizer decide what to do with them.

`axes` names every axis of one layer's array. Layers stacked for a scan have further axes in front, so names count from
the right. `contracts` names the axes that a product with the input sums over; of the rest, those in `BATCH_AXES` index
separate matrices, and the others are outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from mla_moe.config.parallelism import KernelConfig
from mla_moe.ops.attention import default_attention_kernel
from mla_moe.ops.grouped_matmul import default_grouped_matmul_kernel
from mla_moe.parallel.expert_parallel import default_dispatch

BATCH_AXES = ("layers", "experts", "gate_up")


class Matrix(nnx.Param):
    """A weight between activations."""


class Embedding(nnx.Param):
    """A weight between tokens and activations: the embedding and the output head."""


class Scale(nnx.Param):
    """The elementwise scale of a norm."""


class RouterBias(nnx.Variable):
    """The router's bias of auxiliary-loss-free load balancing. It is updated from the expert load, not by gradients,
    and has no weight decay (DeepSeek-V3, section 2.1.2)."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of parameters, of computation and of logits. Router, norms, softmax and loss are float32 always."""

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32

    @classmethod
    def default(cls) -> "Precision":
        """Compute in bfloat16 on accelerators, in float32 on CPU."""
        return cls(compute=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def resolve_kernels(kernels: KernelConfig, platform: str | None = None) -> KernelConfig:
    """`kernels` with the defaults of `platform` (`tpu`, `gpu`, `cpu`) for names that are None. Ahead-of-time
    compilation passes the target; by default the platform is the attached one."""
    return dataclasses.replace(
        kernels,
        attention=kernels.attention or default_attention_kernel(platform),
        grouped_matmul=kernels.grouped_matmul or default_grouped_matmul_kernel(platform),
        dispatch=kernels.dispatch or default_dispatch(platform),
    )


def matrix(
    rngs: nnx.Rngs,
    axes: dict[str, int],
    *,
    contracts: tuple[str, ...],
    std: float,
    dtype: DTypeLike,
    kind: type[nnx.Param] = Matrix,
) -> nnx.Param:
    """A parameter of shape `axes.values()`, initialised from a normal distribution."""
    value = _normal(rngs, tuple(axes.values()), std, dtype)
    return kind(value, axes=tuple(axes), contracts=contracts, std=std)


def scale(axis: str, width: int, dtype: DTypeLike) -> Scale:
    """The scale of a norm, initialised to ones."""
    return Scale(jnp.ones(width, dtype), axes=(axis,), contracts=())


def stacked(variable: nnx.Variable, count: int, rngs: nnx.Rngs) -> nnx.Variable:
    """An (abstract) variable of one layer, initialised for `count` layers in one array, which a scan runs over."""
    abstract = variable.get_value()
    shape = (count, *abstract.shape)
    if isinstance(variable, Scale | RouterBias):
        return variable.replace(jnp.full(shape, isinstance(variable, Scale), abstract.dtype))
    return variable.replace(_normal(rngs, shape, variable.get_metadata("std"), abstract.dtype))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> jax.Array:
    """Random numbers, from NumPy unless traced: a random kernel per shape takes 10 s to compile for a small model."""
    key = rngs.params()
    if isinstance(key, Tracer):
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    random = np.random.Generator(np.random.Philox(np.asarray(jax.random.key_data(key)).tolist()))
    return jnp.asarray(np.float32(std) * random.standard_normal(shape, np.float32)).astype(dtype)


def logical_axes(variable: nnx.Variable) -> tuple[str, ...]:
    """The names of all axes of a parameter, `layers` first where it is stacked."""
    axes = variable.get_metadata("axes")
    return ("layers",) * (variable.get_value().ndim - len(axes)) + axes
