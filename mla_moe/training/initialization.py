"""Initialization of a stage: fresh parameters, the parameters of a checkpoint, or the full state of another run."""

import dataclasses
import logging
from pathlib import Path

import optax

from mla_moe.checkpoint.adapter import AdapterCheckpoint
from mla_moe.checkpoint.data_position import DataPosition
from mla_moe.checkpoint.hub import local_checkpoint
from mla_moe.checkpoint.manager import restore_step
from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.config import ConfigError, ModelConfig, Recipe, load_recipe, require
from mla_moe.config.resume import STAGES, leaves
from mla_moe.nn.abstract_model import Arrays
from mla_moe.training.run_context import RunContext
from mla_moe.training.step import TrainState, abstract_state, init_state

logger = logging.getLogger(__name__)


def initial_state(
    context: RunContext, tx: optax.GradientTransformation, steps: int, position: DataPosition
) -> TrainState:
    """The first state of pretraining for so many `steps`, from `recipe.init_from` and `recipe.init_parts`, sharded over
    the mesh.

    A full state restores the `position` in the data too. Raises `ConfigError` for a checkpoint of another model, and
    for the full state of a run with other data or another optimizer.
    """
    recipe = context.recipe
    if recipe.init_from is None:
        return init_state(context.abstract_model, tx, recipe.seed, context.mesh)
    if recipe.init_parts == "params":
        return state_from_checkpoint(recipe.init_from, context, tx)
    path = local_checkpoint(recipe.init_from, "init_from")
    stage = path / "checkpoints" / "pretrain"
    source = open_checkpoint(stage if stage.is_dir() else path)
    _check_model(source.cfg, recipe.model, recipe.init_from)
    if (run := source.full_state_run) is None:
        fix = f"{recipe.init_from} has parameters only; set init_parts = 'params'"
        raise ConfigError("init_parts", "full_state", fix)
    fix = f"{source.directory} is of a later stage; set init_parts = 'params'"
    require(source.directory.resolve().parent.name == "pretrain", "init_parts", "full_state", fix)
    other = leaves(load_recipe(run / "recipe.json"))
    for name, leaf in leaves(recipe).items():
        if leaf.equal_for_full_state and leaf.value != other[name].value:
            fix = f"{recipe.init_from} had {other[name].value!r}; keep that value, or set init_parts = 'params'"
            raise ConfigError(name, leaf.value, fix)
    state = restore_step(source.directory, abstract_state(context.abstract_model, tx, context.mesh), position)
    fix = f"{recipe.init_from} has done {state.step} already; set more steps"
    require(int(state.step) < steps, "training.steps", steps, fix)
    return state


def starting_checkpoint(stage: str, recipe: Recipe, run_dir: Path) -> str | Path:
    """The checkpoint from which a stage after pretraining starts: that of the last earlier stage in the run, else
    `recipe.init_from`. Raises `ConfigError` if there is neither."""
    active = {"pretrain": recipe.training.active, "sft": recipe.sft.active, "dpo": recipe.dpo.active}
    active["rl"] = recipe.rl.steps
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        if active[earlier]:
            return run_dir / "checkpoints" / earlier
    if recipe.init_from is None:
        raise ConfigError("init_from", None, f"name a checkpoint for {stage} to start from, or set training.steps")
    return recipe.init_from


def state_from_checkpoint(path: str | Path, context: RunContext, tx: optax.GradientTransformation) -> TrainState:
    """A state of step 0 with a checkpoint's parameters and router biases, and a new optimizer state.

    Raises `ConfigError` for a checkpoint of another model, or with other adapters.
    """
    arrays = starting_arrays(path, context)
    return init_state(context.abstract_model, tx, context.recipe.seed, context.mesh, arrays)


def starting_arrays(path: str | Path, context: RunContext, *, trained_only: bool = False) -> Arrays:
    """A checkpoint's arrays for the model of a stage; with `trained_only` its trained parameters and router biases.

    With LoRA the adapters are the checkpoint's, which are then trained on, or new ones. Without LoRA a checkpoint's
    adapters are merged into its weights. Raises as `state_from_checkpoint` does.
    """
    source, model, mesh = open_checkpoint(path), context.abstract_model, context.mesh
    _check_model(source.cfg, context.recipe.model, str(path))
    paths = [*model.param_paths, *model.bias_paths, *([] if trained_only else model.frozen_paths)]
    if not model.adapter_paths:
        return load_arrays(source, model, mesh, paths=paths)
    if isinstance(source, AdapterCheckpoint):
        mine, theirs = (sorted(lora.sizes(model.adaptable_paths).items()) for lora in (model.lora, source.lora))
        fix = f"{path} has adapters of other matrices or sizes, {source.lora}; give the recipe the same `lora`"
        same = mine == theirs and model.lora.rslora == source.lora.rslora
        require(same, "lora", str(model.lora), f"{fix}, or merge them first: mla-moe convert --merge-adapter")
        here, there = model.lora.quantize_base or "no format", source.lora.quantize_base or "no format"
        if here != there:
            logger.warning("lora.quantize_base = %s, and the adapters of %s were trained with %s", here, path, there)
        return load_arrays(source.unmerged(), model, mesh, paths=paths)
    base = [path for path in paths if path not in model.adapter_paths]
    return load_arrays(source, model, mesh, paths=base) | model.init(context.recipe.seed, mesh, model.adapter_paths)


def _check_model(theirs: ModelConfig, ours: ModelConfig, path: str) -> None:
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(theirs, field.name), getattr(ours, field.name)
        unused = field.name == "mtp_shares_embedding" and not ours.num_nextn_predict_layers
        if there != here and field.metadata.get("init_from") != "may_differ" and not unused:
            raise ConfigError(f"model.{field.name}", here, f"{path} has {there!r}; give the recipe the same model")
    if ours.num_nextn_predict_layers > theirs.num_nextn_predict_layers:
        raise ConfigError("model.num_nextn_predict_layers", 1, f"{path} has no MTP module; set it to 0")
