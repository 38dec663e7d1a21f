"""Checkpoints of a stage: `checkpoints/STAGE/STEP`, written by Orbax in the background, the newest N kept."""

import dataclasses
from pathlib import Path

import grain
import orbax.checkpoint as ocp

from mla_moe import recipe
from mla_moe.config import ModelConfig
from mla_moe.training.step import TrainState


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

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator, model: ModelConfig) -> None:
        """Begin to save; returns once the arrays are copied. A step that is saved already is left as it is."""
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            data=grain.checkpoint.CheckpointSave(data),
            model=ocp.args.JsonSave(dataclasses.asdict(model)),
        )
        self._manager.save(step, args=items)

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint, each array straight into its sharding; `data` is moved to its place."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract._asdict()), data=grain.checkpoint.CheckpointRestore(data)
        )
        return TrainState(**self._manager.restore(self.latest, args=items)["state"])
