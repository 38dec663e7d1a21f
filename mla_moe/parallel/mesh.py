"""The device mesh: its axes, how it is built, and the mesh under which the present code is traced."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.config import MeshConfig, require

MESH_AXES = ("pipeline", "data", "fsdp", "expert", "tensor", "context")

BATCH_SPEC = P(("pipeline", "data", "fsdp", "expert"), "context")
"""Sharding of tokens `[B, T]`: sequences over every axis that has its own data, time over `context`. The stages of a
pipeline have their own data outside of `parallel.pipeline`."""
TOKEN_AXES = ("pipeline", "data", "fsdp", "expert", "context")
"""The mesh axes over which tokens are sharded."""


def make_mesh(sizes: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a mesh over `devices` (by default all). Slices, which only a slow network connects, are laid out along
    `data`, or along `pipeline` if their number divides that alone. Raises `ConfigError` if the sizes do not multiply to
    the number of devices, or if the number of slices divides neither."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        sizes_by_axis = dict(zip(MESH_AXES, shape, strict=True))
        slow = next((axis for axis in ("data", "pipeline") if sizes_by_axis[axis] % slices == 0), None)
        fix = f"must be a multiple of the {slices} slices, which are laid out along it; or mesh.pipeline must be"
        require(slow is not None, "mesh.data", sizes_by_axis["data"], fix)
        across = [slices if axis == slow else 1 for axis in MESH_AXES]
        within = [size // n for size, n in zip(shape, across, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(sizes: MeshConfig, devices: int) -> list[int]:
    """The size of each of `MESH_AXES` on so many devices; -1 takes those that the others leave. Raises `ConfigError` if
    the sizes do not multiply to their number."""
    shape = [getattr(sizes, axis) for axis in MESH_AXES]
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % given == 0:
        shape[shape.index(-1)] = devices // given
    wanted = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if math.prod(shape) != devices:
        fits = _fitting_shape(shape, devices)
        fit = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, fits, strict=True))
        fix = f"the sizes must multiply to the number of devices, {devices}; {fit} fits"
        require(False, "mesh", wanted, fix)
    return shape


def _fitting_shape(shape: Sequence[int], devices: int) -> list[int]:
    """The part of each size that divides the devices that are left, from the innermost axis on, where devices are
    nearest; `fsdp` takes the rest."""
    sizes, left = [1] * len(shape), devices
    for i in reversed(range(len(shape))):
        sizes[i] = math.gcd(max(shape[i], 1), left)
        left //= sizes[i]
    sizes[MESH_AXES.index("fsdp")] *= left
    return sizes


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else entry or ()


def spec_entry(axes: Sequence[str]) -> str | tuple[str, ...] | None:
    """The entry of a `PartitionSpec` for these mesh axes, the inverse of `mesh_axes`."""
    return tuple(axes) if len(axes) > 1 else axes[0] if axes else None


_axis_names = jax.make_user_context(tuple((axis, axis) for axis in MESH_AXES))
"""Pairs of an axis of this package and its name in the caller's mesh. It is part of the key of `jax.jit`'s cache."""


def use_mesh_axes(axes: Mapping[str, str] | None = None, /, **more: str) -> AbstractContextManager[None]:
    """Name the axes of a mesh of your own: `with jax.set_mesh(mesh), use_mesh_axes(dp="fsdp", tp="tensor"):`, from its
    names to those of `MESH_AXES`. An axis that is not named here keeps its meaning if it has one of these names; any
    other is left to XLA. Raises `ConfigError` for an axis that is not of `MESH_AXES`, and for one that is named twice.
    """
    given = {**(axes or {}), **more}
    for theirs, ours in given.items():
        require(ours in MESH_AXES, f"use_mesh_axes.{theirs}", ours, f"the axes are {', '.join(MESH_AXES)}")
    names = {axis: axis for axis in MESH_AXES if axis not in given} | {ours: theirs for theirs, ours in given.items()}
    fix = "two axes of a mesh cannot have the same meaning"
    require(len(set(given.values())) == len(given), "use_mesh_axes", list(given.values()), fix)
    return _axis_names(tuple(names.items()))


def without_axis(axis: str) -> AbstractContextManager[None]:
    """For code inside a `shard_map` over one mesh axis alone: that axis has no meaning in it, as if the mesh lacked
    it."""
    return _axis_names(tuple(pair for pair in _axis_names.value if pair[0] != axis))


def physical_axes(axes: str | Sequence[str], mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """The names in the mesh, by default the current one, of axes of this package, without those that it lacks; other
    names are the mesh's own. With no mesh at all, the names that `use_mesh_axes` gives."""
    mesh, names = mesh or jax.sharding.get_abstract_mesh(), dict(_axis_names.value)
    wanted = mesh_axes(axes if isinstance(axes, str) else tuple(axes))
    found = (names.get(axis, axis) for axis in wanted if axis in names or axis not in MESH_AXES)
    return tuple(name for name in found if mesh.empty or name in mesh.shape)


def physical_spec(spec: P, mesh: Mesh | AbstractMesh | None = None) -> P:
    """A `PartitionSpec` of this package's axes by the names of the mesh."""
    return P(*(spec_entry(physical_axes(mesh_axes(entry), mesh)) for entry in spec))


@dataclasses.dataclass(frozen=True)
class MeshView:
    """A mesh by the axis names of this package: `shape` has each of `MESH_AXES`, of size 1 where the mesh has none."""

    mesh: Mesh | AbstractMesh

    @property
    def shape(self) -> dict[str, int]:
        return {axis: math.prod(self.mesh.shape[a] for a in physical_axes(axis, self.mesh)) for axis in MESH_AXES}

    def sharding(self, spec: P) -> NamedSharding:
        """The sharding by a spec of this package's axes."""
        return NamedSharding(self.mesh, physical_spec(spec, self.mesh))


def token_mesh(shape: Sequence[int]) -> MeshView | None:
    """The current mesh (`jax.set_mesh`) if tokens `[B, T, …]` of this shape can be sharded over it evenly. None
    otherwise: then XLA's partitioner chooses the sharding of such tokens."""
    mesh = current_mesh()
    if mesh is None:
        return None
    return mesh if shape[0] % batch_shards() == 0 and shape[1] % mesh.shape[BATCH_SPEC[1]] == 0 else None


def batch_shards() -> int:
    """Over how many devices the current mesh shards sequences; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_SPEC[0])


def current_mesh() -> MeshView | None:
    """The mesh set by `jax.set_mesh`. None for a single device, for a mesh of other axes only, and inside a
    `shard_map`, where every array is a local shard already; but not inside one over axes without a meaning here
    alone (`without_axis`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    named = physical_axes(MESH_AXES, mesh)
    kinds = {axis: kind for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)}
    foreign = {axis for axis, kind in kinds.items() if kind == AxisType.Manual and axis not in named}
    auto = all(kind == AxisType.Auto for axis, kind in kinds.items() if axis not in foreign)
    return MeshView(mesh) if named and auto else None


Method = TypeVar("Method", bound=Callable[..., Any])


def under_auto_axes(outputs: Callable[..., Any]) -> Callable[[Method], Method]:
    """For a method of a module: under mesh axes of type Explicit, which are JAX's default, run it with the same axes of
    type Auto, so that only its inputs and outputs have their sharding in their types. `outputs` gives the specs of the
    outputs, as a prefix of their tree, from those of as many of the method's first arguments as it takes."""

    def decorate(method: Method) -> Method:
        signature, count = inspect.signature(method), len(inspect.signature(outputs).parameters)

        @wraps(method)
        def run(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            if not jax.sharding.get_abstract_mesh().explicit_axes:
                return method(self, *args, **kwargs)
            first = [*signature.bind(self, *args, **kwargs).arguments.values()][1 : 1 + count]
            graph, state = nnx.split(self)
            streams = [name for name, value in kwargs.items() if isinstance(value, nnx.Rngs)]
            fix = "under Explicit mesh axes give a key of the stream, such as rngs.dropout()"
            require(not streams, ", ".join(streams), "nnx.Rngs", fix)  # a copy would repeat its random numbers
            leaves, tree = jax.tree.flatten((state, args, kwargs))
            arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]

            def with_auto_axes(*arrays: jax.Array) -> Any:
                given = iter(arrays)
                filled = [next(given) if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves]
                state, args, kwargs = tree.unflatten(filled)
                return method(nnx.merge(graph, state), *args, **kwargs)

            specs = (jax.tree.map(lambda x: jax.typeof(x).sharding.spec, argument) for argument in first)
            return jax.sharding.auto_axes(with_auto_axes, out_sharding=outputs(*specs))(*arrays)

        return cast(Method, run)

    return decorate


def dividing_axes(mesh: Mesh | AbstractMesh | MeshView, size: int, axes: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes, taken in order, whose product of sizes divides `size`."""
    chosen: list[str] = []
    for axis in axes:
        if size % math.prod(mesh.shape[other] for other in (*chosen, axis)) == 0:
            chosen.append(axis)
    return tuple(chosen)
