"""This project's own checkpoints, array by array: what Orbax wrote is opened with TensorStore, and the reverse.

A step's directory holds the items `state` (arrays by path under `params` and `biases`, in a run also the optimizer) and
`model` (its configuration). Orbax restores whole trees; a conversion must not hold one.
"""

import contextlib
import dataclasses
import functools
import json
import zlib
from collections import deque
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mla_moe.checkpoint.hf_mapping import Index, ShardSlice, Slices, TensorMapping
from mla_moe.checkpoint.safetensors_reader import CheckpointError, read_json
from mla_moe.checkpoint.safetensors_writer import flush
from mla_moe.config import ModelConfig, structure
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.ops.checksum import checksum, checksum_of_shard

_CACHE_BYTES = 256 << 20  # parts of one stored chunk are asked for one after the other
_PENDING = 4  # parts on their way to the disk
_METADATA = "_CHECKPOINT_METADATA"


def array_checksums(tree: Any) -> dict[str, int]:
    """Of each array on a mesh, by its path, `.` between the keys: the same on any mesh and in every process."""
    leaves = {
        jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    if not leaves:
        return {}
    mesh = next(iter(leaves.values())).sharding.mesh
    return dict(zip(leaves, np.asarray(_digester(mesh)(list(leaves.values()))).tolist(), strict=True))


@functools.cache
def _digester(mesh: Mesh) -> Callable[[list[jax.Array]], jax.Array]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays: jnp.stack([checksum(x) for x in arrays]), out_shardings=everywhere)


def config_checksum(config: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def step_directory(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest of a stage's or a run's directory; None where there is none.

    Raises `CheckpointError` for what is no directory, and for a run that has not come to its first checkpoint."""
    if not path.is_dir():
        raise CheckpointError("checkpoint", str(path), "no such directory")
    if (path / "state").is_dir() and (path / "model").is_dir():
        return path
    stages = (path / "checkpoints").glob("*") if (path / "checkpoints").is_dir() else [path]
    steps = [step for stage in stages if stage.is_dir() for step in stage.iterdir() if step.name.isdigit()]
    whole = [step for step in steps if (step / _METADATA).is_file()]  # others were being removed when a run was killed
    if not whole and (path / "recipe.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError("checkpoint", str(path), "is a run without a checkpoint yet")
    return max(whole, key=_committed, default=None)


def _committed(step: Path) -> tuple[int, int]:
    return read_json(step / _METADATA).get("commit_timestamp_nsecs") or 0, int(step.name)


def run_directory(step: Path) -> Path | None:
    """The run that a step's directory is part of, however it is reached: by a link to it, or over a link within."""
    runs = [run for path in (step.resolve(), step.absolute()) for run in path.parents[2:3]]
    return next((run for run in runs if (run / "recipe.json").is_file()), None)


class OrbaxCheckpoint:
    """The parameters and router biases of a step's directory. Nothing is read before it is asked for."""

    def __init__(self, step: Path):
        self.directory = step
        config, written = read_json(step / "model" / "metadata"), step / "digests" / "metadata"
        self._digests = read_json(written) if written.is_file() else None  # a converted checkpoint has none
        if self._digests and self._digests.get("model") != config_checksum(config):
            raise CheckpointError("checkpoint", str(step), "is damaged: its model is not as it was written")
        self.cfg: ModelConfig = structure(ModelConfig, config, "model")
        tree = read_json(step / "state" / "_METADATA").get("tree_metadata")
        if not isinstance(tree, dict):
            raise CheckpointError("checkpoint", str(step), "has no list of its arrays; it was not written by Orbax")
        keys = [[entry["key"] for entry in leaf["key_metadata"]] for leaf in tree.values()]
        self._has_optimizer = any(key[0] == "optimizer" for key in keys)
        self._groups = {key[1]: key[0] for key in keys if len(key) == 2 and key[0] in ("params", "biases")}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._open: dict[str, ts.TensorStore] = {}
        self._unread: dict[str, tuple[int, int]] = {}
        self._parts: dict[str, dict[str, int]] = {}
        self._check()

    def _check(self) -> None:
        variables = AbstractModel(self.cfg).variables
        wrong = [f"{path} is missing" for path in sorted(variables.keys() - self._groups)]
        wrong += [f"{path} is unknown" for path in sorted(self._groups.keys() - variables)]
        for path in variables.keys() & self._groups:
            shape, wanted = self._store(path).shape, variables[path].get_value().shape
            wrong += [f"{path} has shape {list(shape)}, not {list(wanted)}"] if shape != wanted else []
        if wrong:
            raise CheckpointError("checkpoint", str(self.directory), f"does not fit its model: {'; '.join(wrong[:20])}")

    def _store(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            spec = _spec(self.directory / "state", f"{self._groups[path]}.{path}", self._is_ocdbt)
            try:
                self._open[path] = ts.open(spec, context=self._context, open=True, read=True).result()
            except ValueError as error:
                raise CheckpointError("checkpoint", path, f"cannot be opened: {str(error)[:200]}") from None
        return self._open[path]

    @property
    def run(self) -> Path | None:
        """The run whose whole state this is; None for parameters alone."""
        return run_directory(self.directory) if self._has_optimizer else None

    @functools.cached_property
    def _is_ocdbt(self) -> bool:
        return (self.directory / "state" / "manifest.ocdbt").exists()

    def dtype(self, path: str) -> np.dtype:
        return self._store(path).dtype.numpy_dtype

    def bytes(self, path: str) -> int:
        return self._store(path).size * self.dtype(path).itemsize

    def check(self, arrays: Arrays) -> None:
        """Raise `CheckpointError` where an array that has been read, on a mesh, is not as it was written."""
        if not self._digests:
            return
        now = array_checksums({path: x for path, x in arrays.items() if x.dtype == self.dtype(path)})
        cast = [path for path in arrays if path not in now]
        parts = [[self._parts[path][str(s.index)] for s in _once(arrays[path])] for path in cast]
        ours = np.array([sum(numbers) % 2**32 for numbers in parts], np.uint32)
        everywhere = np.reshape(multihost_utils.process_allgather(ours), (jax.process_count(), len(cast)))
        now |= dict(zip(cast, everywhere.sum(0, np.uint32).tolist(), strict=True))
        for path, number in now.items():
            self._compare(path, number)

    def _compare(self, path: str, number: int) -> None:
        if self._digests and number != self._digests["arrays"].get(f"{self._groups[path]}.{path}"):
            raise CheckpointError("checkpoint", str(self.directory), f"is damaged: {path} is not as it was written")

    def read(self, path: str, dtype: DTypeLike, index: Slices) -> np.ndarray:
        """A part of an array. Raises `CheckpointError` for a file that is cut short or changed.

        What is cast cannot be looked at later: its share of the digest is kept for `check`.
        """
        part = self._part(path, index)
        if self._digests and part.dtype != dtype:
            shape = self._store(path).shape
            self._parts.setdefault(path, {})[str(index)] = checksum_of_shard(part, index, shape)
        return part.astype(dtype, copy=False)

    def rows(self, piece: TensorMapping, dtype: DTypeLike, cut: ShardSlice) -> np.ndarray:
        """Some rows of a tensor. With an array's last ones it is compared with what was written."""
        part, path = self._part(piece.path, cut.index), piece.path
        if self._digests:
            store = self._store(path)
            left, number = self._unread.pop(path, (store.size, 0))
            left, number = left - part.size, (number + checksum_of_shard(part, cut.index, store.shape)) % 2**32
            if left:
                self._unread[path] = left, number
            else:
                self._compare(path, number)
        return piece.to_hf_tensor(part.astype(dtype, copy=False))

    def _part(self, path: str, index: Index) -> np.ndarray:
        try:
            return self._store(path)[index].read().result()
        except ValueError as error:
            raise CheckpointError("checkpoint", path, f"cannot be read: {str(error)[:200]}") from None


def _once(array: jax.Array) -> list[jax.Shard]:
    """This process's parts of an array, each of them in one process alone."""
    return [shard for shard in array.addressable_shards if shard.replica_id == 0]


class ArraySpec(NamedTuple):
    """An array to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    """The shape of a part that is stored on its own."""


class OrbaxWriter:
    """Arrays that are being filled, a part at a time, in any order."""

    def __init__(self, stores: Mapping[str, ts.TensorStore]):
        self._stores = stores
        self._pending: deque[ts.WriteFutures] = deque()

    def write(self, path: str, index: Index, part: np.ndarray) -> None:
        self._pending.append(self._stores[path][index].write(part))
        self.wait(_PENDING)

    def wait(self, left: int = 0) -> None:
        while len(self._pending) > left:
            self._pending.popleft().result()


@contextlib.contextmanager
def create(directory: Path, cfg: ModelConfig, plan: Mapping[str, ArraySpec]) -> Generator[OrbaxWriter]:
    """Make a step's directory to be filled within the block.

    Orbax writes the tree, with an empty array for each; TensorStore then puts the real ones in their place, stored in
    chunks that are the parts they come in.
    """
    biases = set(AbstractModel(cfg).bias_paths)
    groups = {path: "biases" if path in biases else "params" for path in plan}
    tree: dict[str, dict[str, np.ndarray]] = {"params": {}, "biases": {}}
    for path, planned in plan.items():
        tree[groups[path]][path] = np.zeros(1, planned.dtype)
    handlers = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_ocdbt=False), model=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handlers) as checkpointer:
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), model=ocp.args.JsonSave(dataclasses.asdict(cfg)))
        checkpointer.save(directory.absolute(), items, force=True)
    stores, context = {}, ts.Context({"file_io_sync": False})  # all at once, below
    for path, (dtype, shape, chunk) in plan.items():
        spec = _spec(directory / "state", f"{groups[path]}.{path}", ocdbt=False)
        metadata = {"chunks": list(chunk), "compressor": None}
        stores[path] = ts.open(
            spec | {"metadata": metadata}, context=context, create=True, delete_existing=True, dtype=dtype, shape=shape
        ).result()
    writer = OrbaxWriter(stores)
    yield writer
    writer.wait()
    for file in (directory / "state").rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                flush(opened.fileno())


def _spec(state: Path, name: str, ocdbt: bool) -> dict[str, Any]:
    state = state.resolve()  # TensorStore takes no `..`
    base = {"driver": "file", "path": f"{state}/"}
    if ocdbt:
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return {"driver": "zarr", "kvstore": base | {"path": f"{state / name}/"}}
