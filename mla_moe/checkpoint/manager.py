"""Checkpoints of a stage: `checkpoints/STAGE/STEP`, written by Orbax in the background, the newest N kept.

A checkpoint says what it must hold, a digest for each array and for each other file: one that is cut short or changed
is known when it is read. Digests are computed where the arrays are, and cost one reading of device memory.
"""

import contextlib
import dataclasses
import gc
import logging
import sys
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mla_moe.checkpoint.orbax_arrays import array_checksums, config_checksum
from mla_moe.checkpoint.safetensors_reader import CheckpointError
from mla_moe.config import CheckpointConfig, ConfigError
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import logical_axes
from mla_moe.training.loss_monitor import TrainingHaltedError

_CHUNK_BYTES = 64 << 20
"""Larger arrays are stored in parts, so that another mesh, or a conversion, reads no more than it needs."""


class DataPosition(Protocol):
    """How far the data have been read: `data.Batches` over text, or a count of the questions that were asked."""

    def states(self) -> Mapping[int, str]:
        """As JSON, one for each stream of data."""
        ...

    def restore(self, read: Callable[[int], str]) -> None:
        """Go to where `states` was called, given how to read a stream's place."""
        ...


class FixedPosition:
    """A place that stays where it is, whatever a checkpoint says."""

    def states(self) -> Mapping[int, str]:
        return {}

    def restore(self, read: Callable[[int], str]) -> None:
        pass


State = TypeVar("State", bound=NamedTuple)
"""A `TrainState`, or one with more in it."""


@contextlib.contextmanager
def _silence_late_reads() -> Generator[None]:
    """Orbax reads arrays side by side, and closes its loop when one cannot be read. Each of the others would print that
    it failed too, that it was never awaited, or that it found the loop closed, whenever Python collects it: here."""
    late = "Event loop is closed", "was never awaited", "exception was never retrieved"
    before, log = sys.unraisablehook, logging.getLogger("asyncio")

    def news(message: object) -> bool:
        return not any(phrase in str(message) for phrase in late)

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if news(unraisable.exc_value):
            before(unraisable)

    def heard(record: logging.LogRecord) -> bool:
        return news(record.msg)

    sys.unraisablehook = hook
    log.addFilter(heard)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
            try:
                yield
            finally:
                gc.collect()
    finally:
        sys.unraisablehook = before
        log.removeFilter(heard)


class CheckpointManager:
    """Saves and restores a run's whole state: parameters, optimizer, router biases, step, and place in the data."""

    def __init__(self, run_dir: Path, stage: str, keep: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep.max_to_keep,
            save_interval_steps=1,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager((run_dir / "checkpoints" / stage).absolute(), options=options)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_) -> None:
        with self._saving():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: NamedTuple, data: DataPosition, abstract_model: AbstractModel) -> None:
        """Begin to save; returns once the arrays are copied. A step that is saved already is left as it is."""
        if step == self.latest:
            return
        model = dataclasses.asdict(abstract_model.cfg)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict(), save_args=_save_args(state, abstract_model)),
            data=StreamsSave(data),
            model=ocp.args.JsonSave(model),
            digests=ocp.args.JsonSave({"model": config_checksum(model), "arrays": array_checksums(state._asdict())}),
        )
        with self._saving():
            self._manager.save(step, args=items)

    @contextlib.contextmanager
    def _saving(self) -> Generator[None]:
        """Orbax says of a save in the background what went wrong with it at the next one, or at the end."""
        try:
            yield
        except Exception as error:
            fix = "make room, or see to the disk, and the same command goes on from the checkpoint before"
            raise TrainingHaltedError(
                f"{self._manager.directory}: a checkpoint could not be saved ({_first(error)}); {fix}"
            ) from error

    @_silence_late_reads()
    def restore(self, abstract: State, data: DataPosition, say: Callable[[str], None]) -> State:
        """The newest checkpoint that is whole, each array straight into its sharding; `data` is moved to its place.

        Damaged ones are said. They are put aside as `STEP.damaged`, out of the way of the steps to come, once there is
        one to go on from; with none left this raises `CheckpointError`, and touches nothing.
        """
        self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            try:
                state = restore_step(Path(self._manager.directory) / str(step), abstract, data)
            except CheckpointError as error:
                say(f"{error}")
                continue
            if number and jax.process_index() == 0:
                for damaged in steps[:number]:
                    directory = Path(self._manager.directory) / str(damaged)
                    directory.rename(directory.with_name(f"{damaged}.damaged"))
            if number:
                multihost_utils.sync_global_devices("damaged checkpoints are put aside")
                self._manager.reload()
            return state
        fix = "no checkpoint in it is whole; remove it to begin the stage anew"
        raise CheckpointError("checkpoint", str(self._manager.directory), fix)


def restore_step(directory: Path, abstract: State, data: DataPosition) -> State:
    """The same from the directory of one step, of whatever run. Raises `CheckpointError` in every process for one that
    is damaged for any of them."""
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract._asdict()), data=StreamsRestore(data), digests=ocp.args.JsonRestore()
    )
    me = jax.process_index()  # each reads for itself: one that fails would leave the others waiting
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    found, wrong = {}, ""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
            found = checkpointer.restore(directory.absolute(), items)
    except (ConfigError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # says nothing of the files
    except Exception as error:  # Orbax has no list of what a changed byte may lead to
        wrong = _first(error)
    if not _any_process(wrong):
        now, then = array_checksums(found["state"]), found["digests"]["arrays"]
        wrong = ", ".join(name for name in now if now[name] != then.get(name))
    if _any_process(wrong):
        raise CheckpointError("checkpoint", str(directory), f"is damaged: {wrong or 'another process says where'}")
    return type(abstract)(**found["state"])


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _any_process(wrong: str) -> bool:
    return bool(multihost_utils.process_allgather(np.bool_(wrong)).any())


def _save_args(state: NamedTuple, abstract_model: AbstractModel):
    """How arrays are cut for storage: first by layer and by expert."""

    def args(keys, x: jax.Array) -> ocp.SaveArgs:
        variable = abstract_model.variables.get(getattr(keys[-1], "key", None))
        if variable is None or x.nbytes <= _CHUNK_BYTES:
            return ocp.SaveArgs()
        stacked = (i for i, axis in enumerate(logical_axes(variable)) if axis in ("layers", "experts"))
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(stacked))

    return jax.tree_util.tree_map_with_path(args, state._asdict())


class StreamsHandler(ocp.CheckpointHandler):
    """The place in the data, a file for each stream with its digest behind it. Processes that share a stream write the
    same file."""

    def save(self, directory: Path, args: "StreamsSave") -> None:
        for number, state in args.item.states().items():
            unfinished = directory / f".stream_{number}.{jax.process_index()}"
            unfinished.write_text(f"{state}\n{_crc(state)}")
            unfinished.replace(directory / f"stream_{number}.json")

    def restore(self, directory: Path, args: "StreamsRestore") -> None:
        def read(number: int) -> str:
            state, _, crc = (directory / f"stream_{number}.json").read_text().partition("\n")
            if crc != _crc(state):
                raise ValueError(f"the place in stream {number} of the data is not as it was written")
            return state

        args.item.restore(read)


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


@ocp.args.register_with_handler(StreamsHandler, for_save=True)
@dataclasses.dataclass
class StreamsSave(ocp.args.CheckpointArgs):
    item: DataPosition


@ocp.args.register_with_handler(StreamsHandler, for_restore=True)
@dataclasses.dataclass
class StreamsRestore(ocp.args.CheckpointArgs):
    item: DataPosition
