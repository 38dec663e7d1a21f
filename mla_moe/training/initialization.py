"""Initialization of a stage: fresh parameters, the parameters of a checkpoint, or the full state of another run."""

import dataclasses
from pathlib import Path

import optax
from jax.sharding import Mesh

from mla_moe.checkpoint.manager import DataPosition, restore_step
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.config import ConfigError, ModelConfig, Recipe
from mla_moe.config.resume import leaves
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.training.step import TrainState, abstract_state, init_state


def initial_state(
    recipe: Recipe, abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh, position: DataPosition
) -> TrainState:
    """The first state of pretraining, from `recipe.init_from` and `recipe.init_parts`, sharded over the mesh.

    A full state restores the `position` in the data too. Raises `ConfigError` for a checkpoint of another model, and
    for the full state of a run with other data or another optimizer.
    """
    if recipe.init_from is None:
        return init_state(abstract_model, tx, recipe.seed, mesh)
    if recipe.init_parts == "params":
        return state_from_checkpoint(recipe.init_from, recipe, abstract_model, tx, mesh)
    stage = Path(recipe.init_from) / "checkpoints" / "pretrain"
    source = open_checkpoint(stage if stage.is_dir() else recipe.init_from)
    _check_model(source.cfg, recipe.model, recipe.init_from)
    if (run := source.full_state_run) is None:
        fix = f"{recipe.init_from} has parameters only; set init_parts = 'params'"
        raise ConfigError("init_parts", "full_state", fix)
    if source.directory.resolve().parent.name != "pretrain":
        fix = f"{source.directory} is of a later stage; set init_parts = 'params'"
        raise ConfigError("init_parts", "full_state", fix)
    other = leaves(Recipe.from_json((run / "recipe.json").read_text()))
    for name, leaf in leaves(recipe).items():
        if leaf.equal_for_full_state and leaf.value != other[name].value:
            fix = f"{recipe.init_from} had {other[name].value!r}; keep that value, or set init_parts = 'params'"
            raise ConfigError(name, leaf.value, fix)
    state = restore_step(source.directory, abstract_state(abstract_model, tx, mesh), position)
    if int(state.step) >= recipe.training.steps:
        fix = f"{recipe.init_from} has done {state.step} already; set more steps"
        raise ConfigError("training.steps", recipe.training.steps, fix)
    return state


def starting_checkpoint(stage: str, recipe: Recipe, run_dir: Path) -> Path:
    """The checkpoint from which a stage after pretraining starts: that of the last earlier stage in the run, else
    `recipe.init_from`. Raises `ConfigError` if there is neither."""
    steps = {"pretrain": recipe.training.steps, "sft": recipe.sft.steps, "rl": recipe.rl.steps, "rejection": 0}
    order = list(steps)
    for earlier in reversed(order[: order.index(stage)]):
        if steps[earlier]:
            return run_dir / "checkpoints" / earlier
    if recipe.init_from is None:
        raise ConfigError("init_from", None, f"name a checkpoint for {stage} to start from, or set training.steps")
    return Path(recipe.init_from)


def state_from_checkpoint(
    path: str | Path, recipe: Recipe, abstract_model: AbstractModel, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A state of step 0 with a checkpoint's parameters and router biases, and a new optimizer state.

    Raises `ConfigError` for a checkpoint of another model.
    """
    source = open_checkpoint(path)
    _check_model(source.cfg, recipe.model, str(path))
    return init_state(abstract_model, tx, recipe.seed, mesh, load_arrays(source, abstract_model, mesh))


def _check_model(theirs: ModelConfig, ours: ModelConfig, path: str) -> None:
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(theirs, field.name), getattr(ours, field.name)
        unused = field.name == "mtp_shares_embedding" and not ours.num_nextn_predict_layers
        if there != here and field.metadata.get("init_from") != "may_differ" and not unused:
            raise ConfigError(f"model.{field.name}", here, f"{path} has {there!r}; give the recipe the same model")
    if ours.num_nextn_predict_layers > theirs.num_nextn_predict_layers:
        raise ConfigError("model.num_nextn_predict_layers", 1, f"{path} has no MTP module; set it to 0")
