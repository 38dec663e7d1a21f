"""Save and restore the full training state of a stage with Orbax: `checkpoints/STAGE/STEP`, saved in the background.

A checkpoint has a checksum of each array and of each other file, so that a truncated or corrupted one is detected when
it is restored. Checksums are computed on the devices at the cost of one read of the arrays.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mla_moe.checkpoint.base_reference import BaseReference
from mla_moe.checkpoint.bucket_run import location, mirror_of
from mla_moe.checkpoint.bucket_steps import BucketSteps, read_state
from mla_moe.checkpoint.data_position import DataPosition, StreamsArgs, StreamsHandler
from mla_moe.checkpoint.files import CheckpointError
from mla_moe.checkpoint.orbax_checkpoint import array_checksums, base_directory, config_checksum
from mla_moe.checkpoint.orbax_layout import read_json_item, require_known_format
from mla_moe.checkpoint.save_errors import as_save_error, suppress_repeated_errors
from mla_moe.config import FORMAT_VERSION, CheckpointConfig, ConfigError
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import STACK_AXES
from mla_moe.parallel.sharding import logical_axes

_CHUNK_BYTES = 64 << 20
"""Larger arrays are stored in chunks, so that another mesh or a conversion reads little more than it needs."""


State = TypeVar("State", bound=NamedTuple)
"""The training state of a stage, such as `TrainState`."""


class CheckpointManager(contextlib.AbstractContextManager["CheckpointManager"]):
    """Saves and restores the full state of a stage: parameters, optimizer, router biases, step, and data position."""

    def __init__(self, run_dir: Path, stage: str, config: CheckpointConfig):
        directory, mirror = (run_dir / "checkpoints" / stage).absolute(), mirror_of(run_dir)
        self._manager = _orbax_manager(directory, config) if mirror is None else BucketSteps(directory, mirror, config)
        self._quiet = suppress_repeated_errors()
        self._quiet.__enter__()

    def __exit__(self, *error: Any) -> None:
        with self._as_save_error():
            self._manager.close()
        self._quiet.__exit__(*error)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def rewind(self, step: int) -> None:
        """Make `step` the newest checkpoint: later ones are renamed."""
        self._set_aside([later for later in self.steps if later > step], f"after_{step}")

    @property
    def base(self) -> BaseReference:
        """The `base` that was saved with the newest checkpoint."""
        step = Path(self._manager.directory) / str(self.latest)
        item = read_json_item(step, "adapter")
        item["directory"] = base_directory(step, item)
        return BaseReference(**{name: item[name] for name in BaseReference._fields if name in item})

    def save(
        self,
        step: int,
        state: NamedTuple,
        position: DataPosition,
        abstract_model: AbstractModel,
        base: BaseReference | None = None,
    ) -> None:
        """Start to save; returns as soon as the arrays are copied. Does nothing for a step that is saved already.

        Frozen parameters are not saved, but `base`, which says where they are.

        Raises `CheckpointSaveError` if this save or an earlier one in the background fails.
        """
        if step == self.latest:
            return
        model, arrays, adapter = dataclasses.asdict(abstract_model.cfg), saved_arrays(state), {}
        if base is not None:
            lora = {"lora": dataclasses.asdict(abstract_model.lora)}
            place = {}
            if Path(base.directory).is_dir():
                step_directory = Path(self._manager.directory) / str(step)
                place = {"relative_directory": os.path.relpath(base.directory, step_directory)}
            adapter = {"adapter": ocp.args.JsonSave(lora | base._asdict() | place)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays, save_args=_save_args(arrays, abstract_model)),
            data=StreamsArgs(position),
            model=ocp.args.JsonSave(model),
            digests=ocp.args.JsonSave({"model": config_checksum(model), "arrays": array_checksums(arrays)}),
            **adapter,
        )
        with self._as_save_error():
            self._manager.save(step, args=items, custom_metadata={"format_version": FORMAT_VERSION})

    def wait_until_saved(self) -> None:
        """Wait for the save in the background. Raises `CheckpointSaveError` if it fails."""
        with self._as_save_error():
            self._manager.wait_until_finished()

    def _as_save_error(self) -> contextlib.AbstractContextManager[None]:
        return as_save_error(Path(self._manager.directory), "the same command resumes from the checkpoint before")

    def restore(self, abstract: State, position: DataPosition, log: Callable[[str], None]) -> State:
        """Restore the newest checkpoint that is not damaged, each array into its sharding, and move `position`.

        Damaged ones are logged, and quarantined as `STEP.damaged` so that later saves can use the step. If all are
        damaged, none is renamed and `CheckpointError` is raised.
        """
        self._manager.wait_until_finished()
        self._manager.reload()
        directory = Path(self._manager.directory)
        steps = self.steps[::-1]
        with _suppress_read_errors():
            for number, step in enumerate(steps):
                try:
                    state = restore_step(directory / str(step), abstract, position)
                except CheckpointError as error:
                    log(f"{error}")
                    continue
                if number:
                    self._set_aside(steps[:number], "damaged")
                return state
        fix = "all its checkpoints are damaged; remove it to restart the stage"
        raise CheckpointError("checkpoint", location(directory), fix)

    def _set_aside(self, steps: Sequence[int], suffix: str) -> None:
        """Rename checkpoints to `STEP.suffix`, or `STEP.suffix.2` and so on where that exists."""
        in_bucket, directory = isinstance(self._manager, BucketSteps), Path(self._manager.directory)
        if jax.process_index() == 0 or in_bucket:  # where each process has a mirror
            for step in steps:
                names = itertools.chain([suffix], (f"{suffix}.{number}" for number in itertools.count(2)))
                free = next(path for name in names if not (path := directory / f"{step}.{name}").exists())
                if isinstance(self._manager, BucketSteps):
                    self._manager.rename(step, free.name)
                else:
                    (directory / str(step)).rename(free)
        multihost_utils.sync_global_devices(f"checkpoints are renamed to {suffix}")
        self._manager.reload()


def _orbax_manager(directory: Path, config: CheckpointConfig) -> ocp.CheckpointManager:
    policies = ocp.checkpoint_managers
    kept: list[Any] = [policies.LatestN(config.max_to_keep)]
    kept += [policies.EveryNSteps(config.keep_every)] if config.keep_every else []
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(directory, options=options)


def restore_step(directory: Path, abstract: State, position: DataPosition) -> State:
    """Restore the checkpoint in a step's directory, of any run, and move `position`. Frozen parameters stay abstract.
    Raises `CheckpointError` in all processes if it is damaged for any of them, `ConfigError` for a newer format
    version, and `ConnectionError` if a bucket cannot be read."""
    process = jax.process_index()  # no barriers with other processes, which would wait for one that fails
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    found, wrong = {}, ""
    try:
        require_known_format(directory)
        if mirror_of(directory):
            found = {
                "state": read_state(directory, saved_arrays(abstract)),
                "digests": read_json_item(directory, "digests"),
            }
            StreamsHandler().restore(directory / "data", StreamsArgs(position))
        else:
            state, digests = ocp.args.StandardRestore(saved_arrays(abstract)), ocp.args.JsonRestore()
            items = ocp.args.Composite(state=state, data=StreamsArgs(position), digests=digests)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as checkpointer:
                found = checkpointer.restore(directory.absolute(), items)
    except CheckpointError as error:
        wrong = f"{error.value}: {error.message}"
    except (ConfigError, MemoryError, PermissionError, ConnectionError, jax.errors.JaxRuntimeError):
        raise  # not an error in the files
    except Exception as error:  # Orbax does not document what a corrupted byte can raise
        wrong = _first_line(error)
    if not _any_process(wrong):
        actual, expected = array_checksums(found["state"]), found["digests"]["arrays"]
        wrong = ", ".join(name for name in actual if actual[name] != expected.get(name))
    if _any_process(wrong):
        raise CheckpointError("checkpoint", location(directory), f"is damaged: {wrong or 'see another process'}")
    return abstract._replace(**found["state"])


def saved_arrays(state: NamedTuple) -> dict[str, Any]:
    """What a checkpoint has of a state."""
    return {name: part for name, part in state._asdict().items() if name != "frozen"}


@contextlib.contextmanager
def _suppress_read_errors() -> Generator[None]:
    """Orbax reads arrays concurrently and closes its event loop when one read fails. Each of the other reads would
    print that it failed too, was never awaited, or found the loop closed, whenever Python collects it: here."""
    repeated = "Event loop is closed", "was never awaited", "exception was never retrieved"
    previous_hook, asyncio_log = sys.unraisablehook, logging.getLogger("asyncio")

    def is_new(message: object) -> bool:
        return not any(phrase in str(message) for phrase in repeated)

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if is_new(unraisable.exc_value):
            previous_hook(unraisable)

    def log_filter(record: logging.LogRecord) -> bool:
        return is_new(record.msg)

    with contextlib.ExitStack() as at_exit:
        sys.unraisablehook = hook
        at_exit.callback(setattr, sys, "unraisablehook", previous_hook)
        asyncio_log.addFilter(log_filter)
        at_exit.callback(asyncio_log.removeFilter, log_filter)
        at_exit.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
        at_exit.callback(gc.collect)
        yield


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _any_process(wrong: str) -> bool:
    return bool(multihost_utils.process_allgather(np.bool_(wrong)).any())


def _save_args(arrays: dict[str, Any], abstract_model: AbstractModel) -> Any:
    """For each array its chunking: large ones are split along the layer and expert axes first."""

    def args(keys: tuple[Any, ...], x: jax.Array) -> ocp.SaveArgs:
        variable = abstract_model.variables.get(getattr(keys[-1], "key", None))
        if variable is None or x.nbytes <= _CHUNK_BYTES:
            return ocp.SaveArgs()
        stacked = (i for i, axis in enumerate(logical_axes(variable)) if axis in (*STACK_AXES, "experts"))
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(stacked))

    return jax.tree_util.tree_map_with_path(args, arrays)
