"""The checkpoints of a stage of a run in a bucket, in the layout of Orbax.

Orbax itself writes to a directory of this host, and to Google Cloud Storage alone of all buckets. So it writes a step's
JSON files here, with placeholders in place of the arrays; these are then written to the bucket with TensorStore, and
at last the step's last object. Without that a step is not there. A run in a bucket has one process (`open_run`).
"""

import contextlib
import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mla_moe.checkpoint.bucket_run import COMMIT, Mirror, location
from mla_moe.checkpoint.data_position import StreamsHandler
from mla_moe.checkpoint.orbax_layout import StateArrays, array_spec
from mla_moe.config import CheckpointConfig

_CHUNK_BYTES = 64 << 20
"""Larger shards are stored in chunks, as `manager` has Orbax do it. An object is written at once or not at all."""
_REQUESTS = 16
"""Arrays that are written or read at one time."""
_UNAVAILABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED", "RESOURCE_EXH")
"""Of TensorStore's errors those that say nothing of what is stored."""


class Shard(NamedTuple):
    """A shard of an array, copied to the host."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    index: tuple[slice, ...]
    values: np.ndarray


class BucketSteps:
    """As much of `ocp.CheckpointManager` as `CheckpointManager` uses."""

    def __init__(self, directory: Path, mirror: Mirror, config: CheckpointConfig):
        self.directory, self._mirror, self._config = directory, mirror, config
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._steps: set[int] = set()
        self.reload()
        mirror.remove_incomplete(directory, {str(step) for step in self._steps})

    def reload(self) -> None:
        """Find the complete steps."""
        self.directory.mkdir(parents=True, exist_ok=True)
        complete = (step for step in self.directory.iterdir() if (step / COMMIT).is_file())
        self._steps = {int(step.name) for step in complete if step.name.isdecimal()}

    def all_steps(self) -> list[int]:
        return sorted(self._steps)

    def latest_step(self) -> int | None:
        return max(self._steps, default=None)

    def save(self, step: int, args: Any, custom_metadata: dict[str, Any]) -> None:
        """Start to save: returns when the arrays are copied to the host."""
        self.wait_until_finished()
        staged = self.directory / f".{step}"
        shutil.rmtree(staged, ignore_errors=True)
        _write_json_files(staged, args, custom_metadata)
        shards = list(_copy_shards(args["state"].item))
        self._steps.add(step)
        self._pending = self._pool.submit(self._write, step, staged, shards)

    def wait_until_finished(self) -> None:
        """Wait for the save in the background. Raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait_until_finished()
        finally:
            self._pool.shutdown()

    def rename(self, step: int, name: str) -> None:
        """Rename a step in the bucket."""
        source, target = (self._mirror.object_of(self.directory / part) for part in (str(step), name))
        self._mirror.move(source, target)

    def _write(self, step: int, staged: Path, shards: list[Shard]) -> None:
        directory, mirror = self.directory / str(step), self._mirror
        mirror.require_held()  # before it writes over what the holder may have written
        _write_shards(mirror.url_of(directory / "state"), shards)
        if directory.exists():  # rewound to before it
            shutil.rmtree(directory)
        staged.rename(directory)
        for file in directory.rglob("*"):
            if file.is_file() and file.name != COMMIT:
                mirror.upload_file(file)
        mirror.upload()  # metrics up to this step are there before it is
        mirror.upload_file(directory / COMMIT)
        for old in self._superseded():
            self._steps.discard(old)
            shutil.rmtree(self.directory / str(old), ignore_errors=True)
            mirror.remove(mirror.object_of(self.directory / str(old)))

    def _superseded(self) -> list[int]:
        steps, every = self.all_steps(), self._config.keep_every
        return [step for step in steps[: -self._config.max_to_keep] if not every or step % every]


def _write_json_files(staged: Path, args: Any, custom_metadata: dict[str, Any]) -> None:
    """The JSON files of a step, by Orbax."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    placeholders = jax.tree.map(lambda x: np.zeros(1, x.dtype), args["state"].item)
    items = {name: item for name, item in args.items() if name != "state"}
    handlers: dict[str, Any] = {
        name: StreamsHandler() if name == "data" else ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        for name in items
    }
    handlers["state"] = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    composite = ocp.CompositeCheckpointHandler(**handlers)
    with ocp.Checkpointer(composite, multiprocessing_options=alone) as checkpointer:
        written = ocp.args.Composite(state=ocp.args.PyTreeSave(placeholders), **items)
        checkpointer.save(staged, written, custom_metadata=custom_metadata)
    for path in (staged / "state").iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _copy_shards(state: Any) -> Iterator[Shard]:
    """The shards of all arrays, once each. The step that comes next donates the arrays, so they are copied now."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    shards = [(keys, x, shard) for keys, x in leaves for shard in x.addressable_shards if shard.replica_id == 0]
    for _, _, shard in shards:
        shard.data.copy_to_host_async()
    for keys, x, shard in shards:
        chunk_shape = _chunk_shape(x.sharding.shard_shape(x.shape), x.dtype.itemsize)
        yield Shard(_key(keys), x.shape, chunk_shape, shard.index, np.array(shard.data))


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of chunks that a shard has a whole number of: no two shards, which are written at once, have one."""
    chunk = list(shape)
    for axis, size in enumerate(shape):
        while np.prod(chunk) * itemsize > _CHUNK_BYTES and chunk[axis] > 1:
            chunk[axis] = next(part for part in range(chunk[axis] - 1, 0, -1) if size % part == 0)
    return tuple(chunk)


def _key(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """The name of an array as Orbax has it."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _write_shards(state_url: str, shards: list[Shard]) -> None:
    context, arrays = ts.Context(), {shard.key: shard for shard in shards}

    def create(shard: Shard) -> ts.TensorStore:
        spec = array_spec(state_url, shard.key)
        spec |= {"metadata": {"chunks": list(shard.chunk_shape), "compressor": None}, "open": True, "create": True}
        return ts.open(spec, context=context, dtype=shard.values.dtype, shape=shard.shape).result()

    def write(shard: Shard) -> None:
        stores[shard.key][shard.index].write(shard.values).result()

    with ThreadPoolExecutor(_REQUESTS) as pool:
        stores = dict(zip(arrays, pool.map(create, arrays.values()), strict=True))  # once each, before any shard
        list(pool.map(write, shards))


def read_state(step: Path, abstract: Any) -> Any:
    """The arrays of a step in a bucket, each into its sharding. Raises an error of whatever type for a step that is
    damaged, and `ConnectionError` if the bucket cannot be read."""
    arrays = StateArrays(step)

    def read(keys: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        with _unavailable(step):
            store = arrays[_key(keys)]
            if store.shape != x.shape or store.dtype.numpy_dtype != x.dtype:
                found = f"{store.dtype.name}{list(store.shape)}"
                raise ValueError(f"{'.'.join(_key(keys))} is {found} instead of {x.dtype}{list(x.shape)}")
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: store[index].read().result())

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return jax.tree.unflatten(tree, pool.map(lambda leaf: read(*leaf), leaves))


@contextlib.contextmanager
def _unavailable(step: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:  # by TensorStore, whose types say little
        if any(name in str(error) for name in _UNAVAILABLE):
            fix = "check the connection and your credentials; the same command resumes"
            raise ConnectionError(f"{location(step)}: cannot be read ({str(error)[:200]}); {fix}") from None
        raise
