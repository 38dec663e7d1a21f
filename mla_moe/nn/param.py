"""Parameters with named axes, from which sharding and optimizer decide what to do with them.

Every weight is an `nnx.Param`, so that Flax's filters and `nnx.bridge` treat it as they treat Flax's own. Its metadata
say what it is: `role`; `out_sharding`, the logical name of each axis, as in `nnx.with_partitioning`; `sharding_rules`,
from which `nnx.get_partition_spec` finds the mesh axes; `contracts`, the axes that a product with the input sums over
(of the rest, those in `BATCH_AXES` index separate matrices, and the others are outputs); `std`, `bound` or `fill`,
its initialization; `frozen`, where no gradient reaches it and the optimizer leaves it as it is.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

from mla_moe.config.parallelism import KernelConfig
from mla_moe.ops.kernel_choice import default_attention_kernel, default_grouped_matmul_kernel, target_platform
from mla_moe.parallel.dispatch_plan import default_dispatch
from mla_moe.parallel.sharding import axis_metadata

STACK_AXES = ("layers", "dense_layers")
"""Axes of stacked layers. Those with experts can be the stages of a pipeline."""
BATCH_AXES = (*STACK_AXES, "experts", "gate_up")


Role = Literal["matrix", "embedding", "scale"]
"""A matrix between activations; a weight between tokens and activations, which are the embedding and the output head;
or the elementwise scale or bias of a norm."""


class RouterBias(nnx.Variable):
    """The router's bias of auxiliary-loss-free load balancing. It is updated from the expert load, not by gradients,
    and has no weight decay (DeepSeek-V3, section 2.1.2). In Linen it is the collection `router_bias`."""


nnx.register_variable_name("router_bias", RouterBias)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes. Router, norms, softmax and loss are float32 always."""

    param: DTypeLike = jnp.float32
    """Dtype of parameters."""
    compute: DTypeLike = jnp.float32
    """Dtype in which modules compute: their outputs have it too, whatever the dtype of the inputs."""
    logits: DTypeLike = jnp.float32
    """Dtype of `Transformer`'s logits."""

    @classmethod
    def default(cls) -> "Precision":
        """Compute in bfloat16 on accelerators, in float32 on CPU."""
        return cls(compute=jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)


def resolve_kernels(kernels: KernelConfig, platform: str | None = None) -> KernelConfig:
    """`kernels` with the defaults of `platform` (`tpu`, `gpu`, `cpu`) for names that are None. Ahead-of-time
    compilation passes the target; by default the platform is the target's (`ops.kernel_choice`)."""
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
    role: Role = "matrix",
) -> nnx.Param:
    """A parameter of shape `axes.values()`, initialised from a normal distribution."""
    value = normal(rngs, tuple(axes.values()), std, dtype)
    return nnx.Param(value, role=role, contracts=contracts, std=std, **axis_metadata(tuple(axes)))


def scale(axis: str, width: int, dtype: DTypeLike, fill: float = 1.0) -> nnx.Param:
    """The scale of a norm, initialised to 1, or its bias (`fill` = 0)."""
    value = jnp.full(width, fill, dtype)
    return nnx.Param(value, role="scale", contracts=(), fill=fill, **axis_metadata((axis,)))


def router_bias(num_experts: int) -> RouterBias:
    """A router's bias, initialised to 0."""
    return RouterBias(jnp.zeros(num_experts, jnp.float32), contracts=(), fill=0.0, **axis_metadata(("router",)))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> jax.Array:
    """Random numbers, from NumPy unless traced: a random kernel per shape takes 10 s to compile for a small model."""
    key = rngs.params()
    if isinstance(key, Tracer):
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jnp.asarray(np.float32(std) * _generator(key).standard_normal(shape, np.float32)).astype(dtype)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float, dtype: DTypeLike) -> jax.Array:
    """The same, uniform in [−bound, bound)."""
    key = rngs.params()
    if isinstance(key, Tracer):
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
    return jnp.asarray(np.float32(bound) * (2 * _generator(key).random(shape, np.float32) - 1)).astype(dtype)


def _generator(key: jax.Array) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.asarray(jax.random.key_data(key)).tolist()))
