"""Products of activations with a weight that may lie in parts over a mesh. The mathematics is `einsum`'s.

A weight's parts are gathered where it is used, in the type of computation, and its gradient is scattered to them
(ZeRO-3, arXiv 1910.02054), one mesh axis after the other: XLA, left to itself, does both over all axes at once, for
TPU by all-reduces of twice the bytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from mla_moe.parallel.mesh import BATCH_SPEC, mesh_axes, token_mesh
from mla_moe.parallel.sharding import TRAINING_RULES, all_gather_weight, partition_spec

Einsum = Callable[[str, Array, nnx.Param, DTypeLike], Array]
"""One of the two below."""


def plain_einsum(equation: str, x: Array, weight: nnx.Param, dtype: DTypeLike) -> Array:
    """`einsum(equation, x, weight)` with the weight in `dtype`, wherever it lies."""
    return jnp.einsum(equation, x, weight[...].astype(dtype))


COMPUTE_SHARDED_AXES = ("heads", "hidden", "expert_hidden")
"""Axes of activations within a layer, which may stay in parts over `tensor`."""


def weight_spec(weight: nnx.Param, mesh: AbstractMesh) -> P:
    """Where the parts of one layer's weight are when it is used: by `sharding.RULES`, or by those that the model was
    made with (`nn.skeleton`), but with `tensor` only where it is the first to split an inner axis, so that what is not
    gathered is a run of that axis. From any other place XLA brings the parts there."""
    rules = dict(weight.get_metadata("rules", TRAINING_RULES))
    for axis, rule in rules.items():
        stays = axis in COMPUTE_SHARDED_AXES and (rule or "").startswith("tensor")
        others = (other for other in (rule or "").split("+") if other != "tensor")
        rules[axis] = "+".join(("tensor", *others) if stays else others)
    return partition_spec(weight.get_metadata("axes"), weight.shape, mesh, rules)


def sharded_einsum(equation: str, x: Array, weight: nnx.Param, dtype: DTypeLike) -> Array:
    """The same for activations `[B, T, …]` in training, to which the weight travels: all of it but for `tensor`."""
    mesh = token_mesh(x.shape)
    if mesh is None:
        return plain_einsum(equation, x, weight, dtype)
    place = weight_spec(weight, mesh)
    inputs, of_y = equation.split("->")
    of_x, of_weight = inputs.split(",")
    split = {letter for letter, part in zip(of_weight, place, strict=True) if "tensor" in mesh_axes(part)}

    def lies(letters: str) -> P:
        return P(*BATCH_SPEC, *("tensor" if letter in split else None for letter in letters[len(BATCH_SPEC) :]))

    def local(x, weight):
        y = jnp.einsum(equation, x, all_gather_weight(weight, place))
        return y if split <= set(of_y) else jax.lax.psum(y, "tensor")

    run = jax.shard_map(local, in_specs=(lies(of_x), place), out_specs=lies(of_y), check_vma=False)
    return run(x, weight[...].astype(dtype))
