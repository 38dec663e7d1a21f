"""The device mesh: its axes, how it is built, and the mesh around the present code."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mla_moe.config import ConfigError, MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

# Tokens: sequences over every axis that has its own data, time over `context`.
BATCH_SPEC = P(("data", "fsdp", "expert"), "context")
TOKEN_AXES = ("data", "fsdp", "expert", "context")
"""The mesh axes over which tokens are split."""


def make_mesh(sizes: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh over `devices` (all by default); where they come in slices with a slow network between, slices lie along
    `data`. Raises `ConfigError` when the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError("mesh", wanted, f"the sizes must multiply to the number of devices, {len(devices)}")
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)
    data, *inner = shape
    if data % slices:
        raise ConfigError("mesh.data", data, f"must be a multiple of the {slices} slices, which lie along it")
    between = (slices, *(1 for _ in inner))
    shape = data // slices, *inner
    grid = mesh_utils.create_hybrid_device_mesh(shape, between, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=kinds)


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else part or ()


def token_mesh(shape: Sequence[int]) -> jax.sharding.AbstractMesh | None:
    """The mesh around the present code (`jax.set_mesh`) if tokens `[B, T, …]` of this shape can be split over it.

    XLA then partitions other tokens on a mesh as it sees fit.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    rows = math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])
    return mesh if shape[0] % rows == 0 and shape[1] % mesh.shape[BATCH_SPEC[1]] == 0 else None


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh around the present code. None for a single device, for a mesh of other axes, and within a `shard_map`,
    where all is local already."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def require_auto_axes(x: jax.Array) -> None:
    """Raise `ConfigError` for an array that a mesh of Explicit axes splits: here XLA says where arrays lie."""
    split = any(part is not None for part in jax.typeof(x).sharding.spec)
    fix = "its axes must be left to XLA: jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
    if split:
        raise ConfigError("mesh", "of AxisType.Explicit", fix)


def dividing_axes(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int, axes: Sequence[str]
) -> tuple[str, ...]:
    """As many of the mesh axes as divide `rows`."""
    chosen: list[str] = []
    for axis in axes:
        if rows % math.prod(mesh.shape[other] for other in (*chosen, axis)) == 0:
            chosen.append(axis)
    return tuple(chosen)
