"""Parameters that know what their axes mean. Sharding and the optimizer read that; the mathematics does not.

`axes` names every axis of one layer's array. Layers stacked for a scan have further axes in front, so names count from
the right. `contracts` names the axes that the input is summed over; of the rest, those in `BATCH_AXES` index separate
matrices and the others are outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike

BATCH_AXES = ("layers", "experts", "gate_up")


class Matrix(nnx.Param):
    """A weight between activations."""


class Embedding(nnx.Param):
    """A weight between tokens and activations: the embedding and the head."""


class Scale(nnx.Param):
    """The elementwise scale of a norm."""


class RouterBias(nnx.Variable):
    """The bias that balances experts. It is set by counting tokens: no gradient, no decay (DeepSeek-V3, 2.1.2)."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """Types of parameters, of computation, and of what comes out. Router, norms, softmax and loss stay in float32."""

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32

    @classmethod
    def default(cls) -> "Precision":
        """Compute in bfloat16 on accelerators, in float32 on CPU."""
        return cls(compute=jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def matrix(
    rngs: nnx.Rngs,
    axes: dict[str, int],
    *,
    contracts: tuple[str, ...],
    std: float,
    dtype: DTypeLike,
    kind: type[nnx.Param] = Matrix,
) -> nnx.Param:
    """A normal-distributed parameter of the shape `axes.values()`."""
    value = _normal(rngs, tuple(axes.values()), std, dtype)
    return kind(value, axes=tuple(axes), contracts=contracts, std=std)


def scale(axis: str, width: int, dtype: DTypeLike) -> Scale:
    return Scale(jnp.ones(width, dtype), axes=(axis,), contracts=())


def stacked(variable: nnx.Variable, count: int, rngs: nnx.Rngs) -> nnx.Variable:
    """As many fresh copies of an (abstract) variable in one array, for layers under a scan."""
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
