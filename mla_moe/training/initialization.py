"""Where a run begins: fresh parameters, those of a checkpoint, or the whole state of another run. And where its later
stages do."""

import dataclasses
from pathlib import Path

import optax
from jax.sharding import Mesh

from mla_moe.checkpoint.manager import DataPosition, restore_step
from mla_moe.checkpoint.orbax_arrays import OrbaxCheckpoint
from mla_moe.checkpoint.pretrained import read_arrays
from mla_moe.checkpoint.source import open_any_checkpoint
from mla_moe.config import ConfigError, DataConfig, ModelConfig, Recipe
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.training.step import TrainState, abstract_state, init_state

# What may differ between a checkpoint and the model that goes on from it: how far it reaches, how it was drawn, and a
# prediction module that is left behind.
_FREE = ("max_position_embeddings", "rope_theta", "rope_scaling", "initializer_range", "num_nextn_predict_layers")
# What may not, if the whole state is taken: what the optimizer is of, and the way through the data.
_SAME = (
    "seed",
    "model.num_nextn_predict_layers",
    "optimizer.name",
    *(f"data.{field.name}" for field in dataclasses.fields(DataConfig) if field.name != "prefetch"),
    "training.batch_size",
    "training.sequence_length",
)


def first_state(
    recipe: Recipe,
    abstract_model: AbstractModel,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    place: DataPosition,
) -> TrainState:
    """The state that `recipe.init_from` and `recipe.init_parts` ask for, each array straight to its place.

    A whole state moves the data to `place` too. Raises `ConfigError` for a checkpoint of another model, and for a
    whole state of a run on other data or with another optimizer.
    """
    if recipe.init_from is None:
        return init_state(abstract_model, tx, recipe.seed, mesh)
    if recipe.init_parts == "parameters":
        return loaded_state(recipe.init_from, recipe, abstract_model, tx, mesh)
    stage = Path(recipe.init_from) / "checkpoints" / "pretrain"
    source = open_any_checkpoint(stage if stage.is_dir() else recipe.init_from)
    _check_model(source.cfg, recipe.model, recipe.init_from)
    if not isinstance(source, OrbaxCheckpoint) or (run := source.run) is None:
        raise ConfigError("init_parts", "whole", f"{recipe.init_from} holds parameters only; ask for those")
    if source.directory.resolve().parent.name != "pretrain":
        raise ConfigError("init_parts", "whole", f"{source.directory} is of a later stage; ask for its parameters")
    other = Recipe.from_json((run / "recipe.json").read_text())
    for field in _SAME:
        ours, theirs = (_get(r, field) for r in (recipe, other))
        if ours != theirs:
            fix = f"{recipe.init_from} had {theirs!r}; keep that value, or take init_parts = 'parameters'"
            raise ConfigError(field, ours, fix)
    state = restore_step(source.directory, abstract_state(abstract_model, tx, mesh), place)
    if int(state.step) >= recipe.training.steps:
        raise ConfigError("training.steps", recipe.training.steps, f"{recipe.init_from} has done {state.step} already")
    return state


def model_before(stage: str, recipe: Recipe, run_dir: Path) -> Path:
    """Where a stage after pretraining finds its model: with the last stage before it that the run has, else at
    `recipe.init_from`. Raises `ConfigError` where there is neither."""
    steps = {"pretrain": recipe.training.steps, "sft": recipe.sft.steps, "rl": recipe.rl.steps, "rejection": 0}
    order = list(steps)
    for earlier in reversed(order[: order.index(stage)]):
        if steps[earlier]:
            return run_dir / "checkpoints" / earlier
    if recipe.init_from is None:
        raise ConfigError(
            "init_from", None, f"name a checkpoint for {stage} to begin with, or pretrain (training.steps)"
        )
    return Path(recipe.init_from)


def loaded_state(
    path: str | Path, recipe: Recipe, abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A state of step 0 with a checkpoint's parameters and biases. Raises `ConfigError` for one of another model."""
    source = open_any_checkpoint(path)
    _check_model(source.cfg, recipe.model, str(path))
    return init_state(abstract_model, tx, recipe.seed, mesh, read_arrays(source, abstract_model, mesh))


def _check_model(theirs: ModelConfig, ours: ModelConfig, path: str) -> None:
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(theirs, field.name), getattr(ours, field.name)
        idle = field.name == "mtp_shares_embedding" and not ours.num_nextn_predict_layers
        if there != here and field.name not in _FREE and not idle:
            raise ConfigError(f"model.{field.name}", here, f"{path} has {there!r}; give the recipe the same model")
    if ours.num_nextn_predict_layers > theirs.num_nextn_predict_layers:
        raise ConfigError("model.num_nextn_predict_layers", 1, f"{path} has no prediction module; set it to 0")


def _get(recipe: Recipe, field: str):
    value = recipe
    for name in field.split("."):
        value = getattr(value, name)
    return value
