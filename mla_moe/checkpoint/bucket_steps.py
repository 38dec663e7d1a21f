"""The checkpoints of a stage of a run in a bucket, in the layout of Orbax.

Orbax itself writes to a directory of this host, and to Google Cloud Storage alone of all buckets. So it writes a step's
JSON files here, with placeholders in place of the arrays; these are then written to the bucket with TensorStore, and
at last the step's last object. Without that a step is not there.

Of several processes each writes its own shards and data position. The first one writes everything else, and the last
object when all others have finished: if one of them fails, the step is not there.
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

from mla_moe.checkpoint.bucket_run import COMMIT, Barriers, Mirror, location
from mla_moe.checkpoint.data_position import StreamsHandler
from mla_moe.checkpoint.orbax_layout import StateArrays, array_spec
from mla_moe.config import CheckpointConfig

_CHUNK_BYTES = 64 << 20
"""Larger shards are stored in chunks, as `manager` has Orbax do it. An object is written atomically."""
_REQUESTS = 16
"""Arrays that are written or read at one time."""
_DAMAGED = ("FAILED_PRECONDITION: ", 'NOT_FOUND: Error opening "zarr" driver: Metadata at')
"""TensorStore's errors about what is stored: it cannot be parsed, or is not there. All others are of
the connection or of credentials, such as an expired token, for which S3 has the status of an invalid request."""


class Metadata(NamedTuple):
    """What is stored of an array besides its shards. All processes compute the same."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]

    def open(self, state_url: str, context: ts.Context, **options: bool) -> ts.TensorStore:
        spec = array_spec(state_url, self.key) | options
        spec["metadata"] = {"chunks": list(self.chunk_shape), "compressor": None}
        return ts.open(spec, context=context, dtype=self.dtype, shape=self.shape).result()


class Shard(NamedTuple):
    """A shard of an array, copied to the host."""

    array: Metadata
    index: tuple[slice, ...]
    values: np.ndarray


class BucketSteps:
    """The part of `ocp.CheckpointManager` that `CheckpointManager` uses."""

    def __init__(self, directory: Path, mirror: Mirror, config: CheckpointConfig):
        self.directory, self._mirror, self._config = directory, mirror, config
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._steps: set[int] = set()
        self._barriers = Barriers()
        self.reload()
        if mirror.is_first:
            mirror.remove_incomplete(directory, {str(step) for step in self._steps})
        self._barriers.wait()  # before any process writes

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
        state = args["state"].item
        arrays = list(_array_metadata(state)) if self._mirror.is_first else []
        shards = list(_copy_shards(state))
        self._steps.add(step)
        self._pending = self._pool.submit(self._write, step, staged, arrays, shards)

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
        """Rename a step."""
        (self.directory / str(step)).rename(self.directory / name)
        if self._mirror.is_first:
            source, target = (self._mirror.object_of(self.directory / part) for part in (str(step), name))
            self._mirror.move(source, target)

    def _write(self, step: int, staged: Path, arrays: list[Metadata], shards: list[Shard]) -> None:
        directory, mirror = self.directory / str(step), self._mirror
        mirror.require_held()  # before it writes over what the holder may have written
        _write_arrays(mirror.url_of(directory / "state"), arrays, shards)
        if directory.exists():  # rewound to before it
            shutil.rmtree(directory)
        staged.rename(directory)
        for file in (directory if mirror.is_first else directory / "data").rglob("*"):
            if file.is_file() and file.name != COMMIT:
                mirror.upload_file(file)
        mirror.upload()  # metrics up to this step are there before it is
        self._barriers.wait()
        if mirror.is_first:
            mirror.upload_file(directory / COMMIT)
        self._barriers.wait()
        for old in self._superseded():
            self._steps.discard(old)
            shutil.rmtree(self.directory / str(old), ignore_errors=True)
            if mirror.is_first:
                mirror.remove(mirror.object_of(self.directory / str(old)))

    def _superseded(self) -> list[int]:
        steps, every = self.all_steps(), self._config.keep_every
        return [step for step in steps[: -self._config.max_to_keep] if not every or step % every]


def _write_json_files(staged: Path, args: Any, custom_metadata: dict[str, Any]) -> None:
    """The JSON files of a step, by Orbax; each process writes all of them, but the positions of its own streams."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    placeholders = jax.tree.map(lambda x: np.zeros(1, x.dtype), args["state"].item)
    items = {name: item for name, item in args.items() if name != "state"}
    handlers: dict[str, Any] = {
        name: StreamsHandler() if name == "data" else ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        for name in items
    }
    handlers["state"] = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    # Synchronous: when several processes save concurrently, Orbax would take another process's signal for its own.
    synchronous = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(multiprocessing_options=alone, async_options=synchronous)
    composite = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
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
        yield Shard(_metadata(keys, x), shard.index, np.array(shard.data))


def _array_metadata(state: Any) -> Iterator[Metadata]:
    return (_metadata(keys, x) for keys, x in jax.tree_util.tree_leaves_with_path(state))


def _metadata(keys: tuple[Any, ...], x: jax.Array) -> Metadata:
    chunk_shape = _chunk_shape(x.sharding.shard_shape(x.shape), x.dtype.itemsize)
    return Metadata(_key(keys), x.shape, x.dtype, chunk_shape)


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunk shape that divides the shard's: no two shards, which are written concurrently, share a chunk."""
    chunk = list(shape)
    for axis, size in enumerate(shape):
        while np.prod(chunk) * itemsize > _CHUNK_BYTES and chunk[axis] > 1:
            chunk[axis] = next(part for part in range(chunk[axis] - 1, 0, -1) if size % part == 0)
    return tuple(chunk)


def _key(keys: tuple[Any, ...]) -> tuple[str, ...]:
    """The name of an array as Orbax has it."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _write_arrays(state_url: str, arrays: list[Metadata], shards: list[Shard]) -> None:
    """Write the metadata of `arrays`, and shards, of these arrays or of others."""
    context = ts.Context()

    def create(array: Metadata) -> None:
        array.open(state_url, context, open=True, create=True)

    def write(shard: Shard) -> None:
        # The first process may not have written the metadata yet.
        store = shard.array.open(state_url, context, open=True, assume_metadata=True)
        store[shard.index].write(shard.values).result()

    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(create, arrays))
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
        with _unavailable(step):
            return jax.make_array_from_callback(x.shape, x.sharding, lambda index: store[index].read().result())

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return jax.tree.unflatten(tree, pool.map(lambda leaf: read(*leaf), leaves))


@contextlib.contextmanager
def _unavailable(step: Path) -> Generator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # by TensorStore, whose types carry little information
        if not any(name in str(error) for name in _DAMAGED):
            fix = "check the connection and your credentials; the same command resumes"
            raise ConnectionError(f"{location(step)}: cannot be read ({str(error)[:200]}); {fix}") from None
        raise
