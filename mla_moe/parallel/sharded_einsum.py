"""Einsum with a sharded weight: fully sharded data parallelism (FSDP, ZeRO-3; arXiv 1910.02054).

A weight is all-gathered before use, in the compute dtype, and its gradient is reduce-scattered, over one mesh axis
after the other. XLA's partitioner alone does both over all axes at once, and on TPU by all-reduces of twice the bytes.
"""

from collections.abc import Callable
from typing import Any

from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from mla_moe.ops.quantized_matrix import Matrix
from mla_moe.ops.weight_einsum import weight_einsum
from mla_moe.parallel.collectives import psum, shard_map
from mla_moe.parallel.mesh import BATCH_SPEC, MeshView, mesh_axes, token_mesh
from mla_moe.parallel.quantized_weight import (
    QuantizedWeight,
    Weight,
    all_gather_matrix,
    dequantized,
    matrix_of,
    matrix_specs,
)
from mla_moe.parallel.sharding import TRAINING_RULES, logical_axes, partition_spec

Einsum = Callable[[str, Array, Weight, DTypeLike], Array]
"""`plain_einsum` or `sharded_einsum`."""


def plain_einsum(equation: str, x: Array, weight: Weight, dtype: DTypeLike) -> Array:
    """`einsum(equation, x, weight)` with the weight cast or dequantized to `dtype`; XLA's partitioner moves the weight
    if needed."""
    return weight_einsum(equation, x, dequantized(matrix_of(weight, dtype), dtype))


COMPUTE_SHARDED_AXES = ("heads", "hidden", "expert_hidden")
"""Logical axes of activations within a layer that may stay sharded over `tensor` (tensor parallelism)."""


def weight_spec(weight: Weight, mesh: MeshView) -> Any:
    """The sharding that a layer's weight has when its all-gather starts.

    It follows the model's sharding rules (`nn.abstract_model`; by default `TRAINING_RULES`), except that `tensor` is
    used only where it comes first on an axis of `COMPUTE_SHARDED_AXES`, so that the shard left after the all-gather is
    contiguous. XLA reshards a weight that is stored in any other way. Of a quantized weight the shardings of both its
    arrays.
    """
    if isinstance(weight, QuantizedWeight):
        return matrix_specs(weight.matrix, weight_spec(weight.codes, mesh), mesh)
    rules = dict(weight.get_metadata("rules", TRAINING_RULES))
    for axis, rule in rules.items():
        stays = axis in COMPUTE_SHARDED_AXES and mesh_axes(rule)[:1] == ("tensor",)
        others = tuple(other for other in mesh_axes(rule) if other != "tensor")
        rules[axis] = ("tensor", *others) if stays else others
    return partition_spec(logical_axes(weight), weight.shape, mesh, rules)


def sharded_einsum(equation: str, x: Array, weight: Weight, dtype: DTypeLike) -> Array:
    """`plain_einsum` of activations `[B, T, …]` in training: the weight is all-gathered over all axes but `tensor`."""
    mesh = token_mesh(x.shape)
    if mesh is None:
        return plain_einsum(equation, x, weight, dtype)
    specs = weight_spec(weight, mesh)
    spec = specs.codes if isinstance(weight, QuantizedWeight) else specs
    inputs, y_letters = equation.split("->")
    x_letters, weight_letters = inputs.split(",")
    sharded = {letter for letter, entry in zip(weight_letters, spec, strict=True) if "tensor" in mesh_axes(entry)}

    def activation_spec(letters: str) -> P:
        return P(*BATCH_SPEC, *("tensor" if letter in sharded else None for letter in letters[len(BATCH_SPEC) :]))

    def local(x: Array, weight: Matrix) -> Array:
        y = weight_einsum(equation, x, dequantized(all_gather_matrix(weight, specs), dtype))
        return y if sharded <= set(y_letters) else psum(y, "tensor")

    run = shard_map(local, (activation_spec(x_letters), specs), activation_spec(y_letters))
    return run(x, matrix_of(weight, dtype))
