"""`jax.shard_map` and its collectives with the axis names of this package, under a mesh whose axes have other names.

`mesh.use_mesh_axes` says which axis of the mesh has which meaning. An axis that the mesh lacks has one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from mla_moe.parallel.mesh import physical_axes, physical_spec


def shard_map(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over the axes of the current mesh, with specs of this package's axes; inside another one, over
    the axes that it leaves."""
    inputs, outputs = jax.tree.map(physical_spec, (in_specs, out_specs), is_leaf=lambda spec: isinstance(spec, P))
    mesh = jax.sharding.get_abstract_mesh()
    axes = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, axis_names=axes, check_vma=False)


def psum(x: Any, axes: str | Sequence[str]) -> Any:
    """`jax.lax.psum` of a tree."""
    return jax.lax.psum(x, physical_axes(axes))


def all_gather(x: Array, axes: str | Sequence[str], *, axis: int = 0) -> Array:
    """`jax.lax.all_gather` along dimension `axis`, tiled."""
    names = physical_axes(axes)
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def axis_index(axis: str) -> Int[Array, ""]:
    """`jax.lax.axis_index`: the number of this device along a mesh axis."""
    names = physical_axes(axis)
    return jax.lax.axis_index(names) if names else jnp.int32(0)


def all_to_all(x: Array, axis: str, *, split_axis: int, concat_axis: int) -> Array:
    """`jax.lax.all_to_all`, tiled."""
    names = physical_axes(axis)
    return jax.lax.all_to_all(x, names, split_axis, concat_axis, tiled=True) if names else x


def permute(x: Array, axis: str, pairs: Sequence[tuple[int, int]]) -> Array:
    """`jax.lax.ppermute`, from the first to the second device of each pair."""
    names = physical_axes(axis)
    return jax.lax.ppermute(x, names, pairs) if names else x
