"""Checkpoints of a stage: `checkpoints/STAGE/STEP`, written by Orbax in the background, the newest N kept."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp

from mla_moe import recipe
from mla_moe.nn.param import logical_axes
from mla_moe.nn.skeleton import Skeleton

_CHUNK_BYTES = 64 << 20
"""Larger arrays are stored in parts, so that another mesh, or a conversion, reads no more than it needs."""


class Place(Protocol):
    """How far the data have been read: `data.Batches` over text, or a count of the questions that were asked."""

    def states(self) -> Mapping[int, str]:
        """As JSON, one for each stream of data."""
        ...

    def restore(self, read: Callable[[int], str]) -> None:
        """Go to where `states` was called, given how to read a stream's place."""
        ...


State = TypeVar("State", bound=NamedTuple)
"""A `TrainState`, or one with more in it."""


class Checkpoints:
    """Saves and restores a run's whole state: parameters, optimizer, router biases, step, and place in the data."""

    def __init__(self, run_dir: Path, stage: str, keep: recipe.Checkpoint):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep.keep, save_interval_steps=1, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager((run_dir / "checkpoints" / stage).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: NamedTuple, data: Place, skeleton: Skeleton) -> None:
        """Begin to save; returns once the arrays are copied. A step that is saved already is left as it is."""
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict(), save_args=_save_args(state, skeleton)),
            data=StreamsSave(data),
            model=ocp.args.JsonSave(dataclasses.asdict(skeleton.cfg)),
        )
        self._manager.save(step, args=items)

    def restore(self, abstract: State, data: Place) -> State:
        """The newest checkpoint, each array straight into its sharding; `data` is moved to its place."""
        return _restore(self._manager, self.latest, abstract, data)


def restore_step(directory: Path, abstract: State, data: Place) -> State:
    """The same from the directory of one step, of whatever run."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(directory.parent.absolute(), options=options) as manager:
        return _restore(manager, int(directory.name), abstract, data)


def _restore(manager, step: int | None, abstract: State, data: Place) -> State:
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()), data=StreamsRestore(data))
    return type(abstract)(**manager.restore(step, args=items)["state"])


def _save_args(state: NamedTuple, skeleton: Skeleton):
    """How arrays are cut for storage: first by layer and by expert."""

    def args(keys, x: jax.Array) -> ocp.SaveArgs:
        variable = skeleton.variables.get(getattr(keys[-1], "key", None))
        if variable is None or x.nbytes <= _CHUNK_BYTES:
            return ocp.SaveArgs()
        stacked = (i for i, axis in enumerate(logical_axes(variable)) if axis in ("layers", "experts"))
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(stacked))

    return jax.tree_util.tree_map_with_path(args, state._asdict())


class StreamsHandler(ocp.CheckpointHandler):
    """The place in the data, a file for each stream. Processes that share a stream write the same file."""

    def save(self, directory: Path, args: "StreamsSave") -> None:
        for number, state in args.item.states().items():
            unfinished = directory / f".stream_{number}.{jax.process_index()}"
            unfinished.write_text(state)
            unfinished.replace(directory / f"stream_{number}.json")

    def restore(self, directory: Path, args: "StreamsRestore") -> None:
        args.item.restore(lambda number: (directory / f"stream_{number}.json").read_text())


@ocp.args.register_with_handler(StreamsHandler, for_save=True)
@dataclasses.dataclass
class StreamsSave(ocp.args.CheckpointArgs):
    item: Place


@ocp.args.register_with_handler(StreamsHandler, for_restore=True)
@dataclasses.dataclass
class StreamsRestore(ocp.args.CheckpointArgs):
    item: Place
