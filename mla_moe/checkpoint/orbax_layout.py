"""The file layout of Orbax checkpoints, and their arrays one by one through TensorStore.

Orbax restores complete trees only, which a conversion cannot hold in memory. No other module depends on the layout;
`tests/checkpoint/test_orbax_layout.py` checks each of these points against the installed Orbax. In a step's directory:

    _CHECKPOINT_METADATA   JSON, written when the save is complete, with custom_metadata
    ITEM/metadata          the JSON object of an item (model, digests)
    state/_METADATA        JSON; the values of tree_metadata have the keys of each array
    state/manifest.ocdbt   exists if all arrays are stored in one OCDBT database
    state/params.PATH/     otherwise a Zarr array, in a directory named by its keys, joined with "."
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mla_moe.checkpoint.bucket_run import COMMIT, location
from mla_moe.checkpoint.files import CheckpointError, check, flush_to_disk, read_json
from mla_moe.checkpoint.hf_mapping import Index
from mla_moe.checkpoint.save_errors import suppress_repeated_errors
from mla_moe.config import FORMAT_VERSION
from mla_moe.config.errors import require_local
from mla_moe.config.migrations import require_known_version
from mla_moe.config.resume import STAGES
from mla_moe.config.storage import is_bucket, kvstore
from mla_moe.nn.abstract_model import AbstractModel

_CACHE_BYTES = 256 << 20  # consecutive reads often need the same stored chunk
_MAX_PENDING_WRITES = 4


def find_step(path: Path) -> Path | None:
    """The step's directory that `path` is, or the newest of a stage's or a run's directory; None if it has none.

    The newest checkpoint of a run is the last step of the last stage that has one, whatever the clock said. Raises
    `CheckpointError` if `path` is no directory, and for a run that has not saved a checkpoint yet.
    """
    require_local("checkpoint", path)
    check(path.is_dir(), "checkpoint", str(path), "no such directory; check the path")
    if (path / "state").is_dir() and (path / "model").is_dir():
        return path
    stages = [path / "checkpoints" / stage for stage in STAGES] if (path / "checkpoints").is_dir() else [path]
    steps = [step for stage in stages if stage.is_dir() for step in stage.iterdir() if step.name.isdecimal()]
    complete = [step for step in steps if (step / COMMIT).is_file()]  # a kill during a removal leaves the others
    empty_run = not complete and (path / "recipe.json").is_file() and not (path / "config.json").is_file()
    fix = "is a run without a checkpoint yet; train it until one is saved, or name another"
    check(not empty_run, "checkpoint", location(path), fix)
    return max(complete, key=lambda step: (stages.index(step.parent), int(step.name)), default=None)


def run_directory(step: Path) -> Path | None:
    """The run that a step's directory is part of, also if a link leads to the step, or from within the run to it."""
    runs = [run for path in (step.resolve(), step.absolute()) for run in path.parents[2:3]]
    return next((run for run in runs if (run / "recipe.json").is_file()), None)


def require_known_format(step: Path) -> None:
    """Raise `ConfigError` for a checkpoint of a newer format version. The reader needs no migration for older ones."""
    custom = read_json(step / COMMIT).get("custom_metadata") if (step / COMMIT).is_file() else None
    version = custom.get("format_version") if isinstance(custom, dict) else None
    if isinstance(version, int):
        require_known_version(version, str(step / COMMIT))


def read_json_item(step: Path, item: str, *, required: bool = True) -> dict[str, Any]:
    """An item that was saved with `ocp.args.JsonSave`; empty if there is none and it is not `required`."""
    file = step / item / "metadata"
    return read_json(file) if required or file.is_file() else {}


class StateArrays:
    """The arrays of a step's `state`, opened when needed. Raises `CheckpointError` if there is no list of them."""

    def __init__(self, step: Path):
        tree: Any = read_json(step / "state" / "_METADATA").get("tree_metadata")
        fix = "has no list of its arrays; it was not written by Orbax"
        check(isinstance(tree, dict), "checkpoint", str(step), fix)
        self.keys = [tuple(str(entry["key"]) for entry in leaf["key_metadata"]) for leaf in tree.values()]
        self.uses_ocdbt = (step / "state" / "manifest.ocdbt").exists()
        self._location = location((step / "state").resolve())  # TensorStore rejects `..`
        self._open: dict[tuple[str, ...], ts.TensorStore] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def __getitem__(self, key: tuple[str, ...]) -> ts.TensorStore:
        """Raises `CheckpointError` for an array whose metadata are missing or damaged."""
        if key not in self._open:
            spec = array_spec(self._location, key, self.uses_ocdbt)
            try:
                spec |= {"recheck_cached_data": "open"}  # a step that is complete does not change
                self._open[key] = ts.open(spec, context=self._context, open=True, read=True).result()
            except ValueError as error:
                raise CheckpointError("checkpoint", key[-1], f"cannot be opened: {str(error)[:200]}") from None
        return self._open[key]


@contextlib.contextmanager
def create_step(
    directory: Path, model: AbstractModel, dtypes: Mapping[str, np.dtype], chunks: Mapping[str, tuple[int, ...]]
) -> Generator[Callable[[str, Index, np.ndarray], None]]:
    """Fill an empty directory with a step of parameters and router biases, whose dtypes and shapes of chunks are given
    by path. Yields a function that writes a chunk to a path and index, in any order and in the background.

    Orbax writes the tree with placeholders, which TensorStore replaces by empty arrays.
    """
    keys = {path: ("biases" if path in model.bias_paths else "params", path) for path in dtypes}
    tree: dict[str, dict[str, np.ndarray]] = {"params": {}, "biases": {}}
    for group, path in keys.values():
        tree[group][path] = np.zeros(1, dtypes[path])
    handlers = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(use_ocdbt=False), model=ocp.JsonCheckpointHandler()
    )
    config = ocp.args.JsonSave(dataclasses.asdict(model.cfg))
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), model=config)
    created = directory.absolute() / "step"  # Orbax fills new directories only
    with suppress_repeated_errors(), ocp.Checkpointer(handlers) as checkpointer:
        checkpointer.save(created, items, custom_metadata={"format_version": FORMAT_VERSION})
    for item in created.iterdir():
        item.rename(directory / item.name)
    created.rmdir()
    stores, context = {}, ts.Context({"file_io_sync": False})  # flushed below, all files at once
    for path, chunk_shape in chunks.items():
        spec = array_spec((directory / "state").resolve(), keys[path])
        spec |= {"metadata": {"chunks": list(chunk_shape), "compressor": None}, "create": True, "delete_existing": True}
        shape = model.variables[path].get_value().shape
        stores[path] = ts.open(spec, context=context, dtype=dtypes[path], shape=shape).result()
    pending: deque[ts.WriteFutures] = deque()

    def write(path: str, index: Index, chunk: np.ndarray) -> None:
        pending.append(stores[path][index].write(chunk))
        if len(pending) > _MAX_PENDING_WRITES:
            pending.popleft().result()

    try:
        yield write
    finally:  # after an error the directory is removed, and no write may recreate a file in it
        for future in pending:
            future.result()
    for file in (directory / "state").rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                flush_to_disk(opened.fileno())


def array_spec(state: str | Path, key: tuple[str, ...], ocdbt: bool = False) -> dict[str, Any]:
    """TensorStore's name of an array of a step's `state`, by its directory or its URL."""
    name, base = ".".join(key), kvstore(str(state)) if is_bucket(state) else {"driver": "file", "path": f"{state}/"}
    if ocdbt:
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return {"driver": "zarr", "kvstore": base | {"path": f"{base['path']}{name}/"}}
