"""A quantized weight, sharded over a mesh: its codes are all-gathered, and dequantized after that.

Scales are sharded as the codes are, along each axis whose shards are complete blocks, and replicated along the others.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from mla_moe.ops.quantized_matrix import Matrix, QuantizedMatrix
from mla_moe.parallel.collectives import axis_index
from mla_moe.parallel.mesh import MeshView, mesh_axes
from mla_moe.parallel.sharding import all_gather_weight


class QuantizedWeight(NamedTuple):
    """A weight of a module as a `QuantizedMatrix`, whose `block` and `packed_axis` are metadata of the scales. Metadata
    of the codes are those of the weight."""

    codes: nnx.Param
    scale: nnx.Param

    @property
    def matrix(self) -> QuantizedMatrix:
        block, packed_axis = (self.scale.get_metadata(name) for name in ("block", "packed_axis"))
        return QuantizedMatrix(self.codes.get_value(), self.scale.get_value(), block, packed_axis)


Weight = nnx.Param | QuantizedWeight


def matrix_of(weight: Weight, dtype: DTypeLike) -> Matrix:
    """The array of a weight in `dtype`, or a quantized weight as it is."""
    return weight.matrix if isinstance(weight, QuantizedWeight) else weight[...].astype(dtype)


def matrix_specs(matrix: QuantizedMatrix, spec: P, mesh: MeshView) -> QuantizedMatrix:
    """The shardings of codes and scales, from that of the codes."""

    def entry(axis: int) -> Any:
        shards = math.prod(mesh.shape[name] for name in mesh_axes(spec[axis]))
        return spec[axis] if matrix.shape[axis] % (shards * matrix.block_of(axis)) == 0 else None

    return dataclasses.replace(matrix, codes=spec, scale=P(*map(entry, range(matrix.ndim))))


def dequantized(matrix: Matrix, dtype: DTypeLike) -> Array:
    """The array, dequantized to `dtype` if it is quantized."""
    return matrix.dequantize(dtype) if isinstance(matrix, QuantizedMatrix) else matrix


def all_gather_matrix(matrix: Matrix, spec: Any, keep_sharded: Sequence[str] = ("tensor",)) -> Matrix:
    """`all_gather_weight` of an array, or of the codes and the scales of a quantized one: fewer bytes than of the
    dequantized one. `spec` is that of `weight_spec`."""
    if not isinstance(matrix, QuantizedMatrix):
        return all_gather_weight(matrix, spec, keep_sharded)
    gather = partial(all_gather_weight, keep_sharded=keep_sharded)
    matrix = jax.tree.map(gather, matrix, spec)
    for axis, entry in enumerate(spec.codes):
        kept = [name for name in mesh_axes(entry) if name in keep_sharded]
        blocks = -(-matrix.shape[axis] // matrix.block_of(axis))
        if kept and matrix.scale.shape[axis] not in (1, blocks):  # codes are a shard, and scales are not
            matrix = matrix.shard(axis, axis_index(kept[0]) * matrix.shape[axis])
    return matrix
