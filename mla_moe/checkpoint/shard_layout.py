"""Which process has which shards of a state, and arrays from the shards that are left of their replicas."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.parallel.mesh import mesh_axes


class ShardLayout:
    """Layout of the arrays of a tree, which have a sharding on one mesh and may be abstract."""

    def __init__(self, tree: Any):
        self._tree, self._arrays = jax.tree.structure(tree), _by_name(tree)
        self.mesh: Mesh = next(iter(self._arrays.values())).sharding.mesh
        self._owners = [device.process_index for device in self.mesh.devices.flat]
        self._keys = {name: self._keys_of(name, x) for name, x in self._arrays.items()}

    def _keys_of(self, name: str, x: jax.ShapeDtypeStruct) -> list[str]:
        """The key of the shard on each device of the mesh."""
        indices = x.sharding.devices_indices_map(x.shape)
        return [_key(name, x, indices[device]) for device in self.mesh.devices.flat]

    def alone(self) -> str:
        """The key of a shard that one process alone has; empty if there is none."""
        owner: dict[str, int] = {}
        several: set[str] = set()
        for keys in self._keys.values():
            for key, process in zip(keys, self._owners, strict=True):
                if owner.setdefault(key, process) != process:
                    several.add(key)
        return next((key for key in owner if key not in several), "")

    def lost(self, writers: Collection[int]) -> str:
        """A shard that none of the copies of these processes has; empty if there is none."""
        left = self.keys_at(writers)
        return next((key for keys in self._keys.values() for key in keys if key not in left), "")

    def keys_at(self, processes: Collection[int]) -> set[str]:
        """The shards that are on the devices of these processes."""
        positions = [i for i, owner in enumerate(self._owners) if owner in processes]
        return {keys[i] for keys in self._keys.values() for i in positions}

    def assemble(self, writers: list[int], shards: Mapping[str, np.ndarray]) -> Any:
        """The arrays, from copies that each process has of the process `writers[i]`, -1 for none.

        Each shard is the sum over its replicas, of which one gives its bits as integers and the others zeros. A process
        that has another one's copy, as when hosts were renumbered, first takes that one's position in the mesh.
        """
        mesh = self._mesh_of(writers)
        here = jax.process_index()
        restored = []
        for name, x in self._arrays.items():
            keys = self._keys[name]
            giver = {key: i for i, key in reversed(list(enumerate(keys))) if self._owners[i] in writers}
            shape, bits = x.sharding.shard_shape(x.shape), np.dtype(f"uint{8 * x.dtype.itemsize}")
            pieces = []
            for i, device in enumerate(mesh.devices.flat):
                if device.process_index == here:
                    given = shards[keys[i]].view(bits) if giver[keys[i]] == i else np.zeros(math.prod(shape), bits)
                    pieces.append(jax.device_put(given.reshape(1, *shape), device))
            used = {axis for entry in x.sharding.spec for axis in mesh_axes(entry)}
            over = tuple(axis for axis in mesh.axis_names if axis not in used)
            replicas = math.prod(mesh.shape[axis] for axis in over)
            sharding = NamedSharding(mesh, P(over, *x.sharding.spec))
            stacked = jax.make_array_from_single_device_arrays((replicas, *x.shape), sharding, pieces)
            summed = _sum_program(NamedSharding(mesh, x.sharding.spec), x.dtype)(stacked)
            restored.append(jax.device_put(summed, x.sharding))
        return jax.tree.unflatten(self._tree, restored)

    def _mesh_of(self, writers: list[int]) -> Mesh:
        """The mesh in which each process has the position of the one whose copy it has."""
        at = {writer: process for process, writer in reversed(list(enumerate(writers))) if writer >= 0}
        missing, free = ([p for p in range(len(writers)) if p not in known] for known in (at, at.values()))
        at |= dict(zip(missing, free, strict=True))
        devices = {process: iter([d for d in self.mesh.devices.flat if d.process_index == process]) for process in at}
        moved = np.array([next(devices[at[owner]]) for owner in self._owners])
        return Mesh(moved.reshape(self.mesh.devices.shape), self.mesh.axis_names)


def copy_to_host(tree: Any) -> dict[str, np.ndarray]:
    """This process's shards, once each. The step that comes next donates the arrays, so they are copied now."""
    shards: dict[str, jax.Array] = {}
    for name, x in _by_name(tree).items():
        for shard in x.addressable_shards:
            shards.setdefault(_key(name, x, shard.index), shard.data)
    for data in shards.values():
        data.copy_to_host_async()
    return {key: np.array(data) for key, data in shards.items()}


def _by_name(tree: Any) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): x for keys, x in named}


def _key(name: str, x: Any, index: Iterable[slice]) -> str:
    """A shard's name, such as `params.embed float32[0:64,0:32]`."""
    ranges = (slice_.indices(size) for slice_, size in zip(index, x.shape, strict=True))
    return f"{name} {x.dtype}[{','.join(f'{start}:{stop}' for start, stop, _ in ranges)}]"


@cache
def _sum_program(sharding: NamedSharding, dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
    """Sums replicas of an array's bits, which are zero in all but one."""

    def sum_bits(bits: jax.Array) -> jax.Array:
        total = bits.sum(0, dtype=bits.dtype)
        return total.astype(bool) if np.issubdtype(dtype, np.bool_) else jax.lax.bitcast_convert_type(total, dtype)

    return jax.jit(sum_bits, out_shardings=sharding)
