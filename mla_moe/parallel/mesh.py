"""The device mesh: its axes, how it is built, and the mesh under which the present code is traced."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mla_moe.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

BATCH_SPEC = P(("data", "fsdp", "expert"), "context")
"""Sharding of tokens `[B, T]`: sequences over every axis that has its own data, time over `context`."""
TOKEN_AXES = ("data", "fsdp", "expert", "context")
"""The mesh axes over which tokens are sharded."""


def make_mesh(sizes: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Build a mesh over `devices` (by default all). Slices, which only a slow network connects, are laid out along
    `data`. Raises `ConfigError` if the sizes do not multiply to the number of devices, or if the number of slices does
    not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError("mesh", wanted, f"the sizes must multiply to the number of devices, {len(devices)}")
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=axis_types)
    data, *inner = shape
    if data % slices:
        raise ConfigError("mesh.data", data, f"must be a multiple of the {slices} slices, which are laid out along it")
    across_slices = (slices, *(1 for _ in inner))
    within_slice = data // slices, *inner
    grid = mesh_utils.create_hybrid_device_mesh(within_slice, across_slices, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=axis_types)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def token_mesh(shape: Sequence[int]) -> jax.sharding.AbstractMesh | None:
    """The current mesh (`jax.set_mesh`) if tokens `[B, T, …]` of this shape can be sharded over it evenly.

    None otherwise: then XLA's partitioner chooses the sharding of such tokens.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    batch_shards = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    return mesh if shape[0] % batch_shards == 0 and shape[1] % mesh.shape[BATCH_SPEC[1]] == 0 else None


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`. None for a single device, for a mesh of other axes, and inside a `shard_map`,
    where every array is a local shard already."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def require_auto_axes(x: jax.Array) -> None:
    """Raise `ConfigError` for an array sharded over mesh axes of type Explicit: this package leaves sharding to XLA."""
    sharded = any(entry is not None for entry in jax.typeof(x).sharding.spec)
    fix = "its axes must be left to XLA: jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
    if sharded:
        raise ConfigError("mesh", "of AxisType.Explicit", fix)


def dividing_axes(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, size: int, axes: Sequence[str]
) -> tuple[str, ...]:
    """Those of the mesh axes, taken in order, whose product of sizes divides `size`."""
    chosen: list[str] = []
    for axis in axes:
        if size % math.prod(mesh.shape[other] for other in (*chosen, axis)) == 0:
            chosen.append(axis)
    return tuple(chosen)
