"""The teacher: another model on the student's mesh, whose distributions are distilled (`rl.teacher`), or whose
completions (`rejection.sampler`)."""

import dataclasses
from functools import cached_property

from mla_moe.checkpoint.reader import load_arrays, open_checkpoint
from mla_moe.checkpoint.tokenizer_files import tokenizer_file
from mla_moe.config import ModelConfig, Recipe, require
from mla_moe.nn.abstract_model import AbstractModel, Arrays
from mla_moe.nn.model_costs import count_parameters
from mla_moe.nn.param import Precision
from mla_moe.parallel.sharding import bytes_per_device, check_model_divisible
from mla_moe.text.tokenizer import ByteTokenizer, HFTokenizer
from mla_moe.training.console import si
from mla_moe.training.run_context import RunContext


class Teacher:
    """A checkpoint whose vocabulary is the student's; its architecture and size may be others."""

    def __init__(self, path: str, field: str, context: RunContext):
        """`field` is the recipe field that errors name. Raises `ConfigError` for a teacher that cannot follow the
        student's tokens, or that the mesh does not divide."""
        self._context, self._checkpoint = context, open_checkpoint(path)
        check_teacher(self._checkpoint.cfg, field, path, context.recipe)
        check_model_divisible(self._checkpoint.cfg, context.mesh, field)
        file, student = tokenizer_file(self._checkpoint.directory), context.tokenizer
        theirs = HFTokenizer(file) if file else ByteTokenizer()
        names = [[of.token_name(token) for token in range(of.vocab_size)] for of in (theirs, student)]
        fix = f"its tokenizer, {theirs.name}, has other tokens than {student.name}; distillation needs the same ones"
        require(names[0] == names[1], field, path, fix)

    @cached_property
    def model(self) -> AbstractModel:
        return abstract_teacher(self._checkpoint.cfg, self._context.abstract_model)

    @property
    def size(self) -> str:
        """For the start-up table."""
        return f"{si(count_parameters(self.model.cfg).total)} parameters"

    @property
    def bytes_per_device(self) -> float:
        return bytes_per_device(self.model.abstract(self._context.mesh))

    def load(self) -> Arrays:
        """Its parameters, sharded over the mesh. Adapters of a checkpoint are merged."""
        return load_arrays(self._checkpoint, self.model, self._context.mesh)


def check_teacher(cfg: ModelConfig, field: str, path: str, recipe: Recipe) -> None:
    """Raise `ConfigError` for a model that has other logits than the student, or too few positions."""
    size, length = recipe.model.vocab_size, recipe.rl.max_prompt_tokens + recipe.rl.max_new_tokens
    fix = "name a teacher with the student's vocabulary"
    require(cfg.vocab_size == size, field, path, f"has {cfg.vocab_size} logits and the student {size}; {fix}")
    fix = f"has {cfg.max_position_embeddings} positions, fewer than rl.max_prompt_tokens + rl.max_new_tokens = {length}"
    fix += "; lower them, or name another teacher"
    require(cfg.max_position_embeddings >= length, field, path, fix)


def abstract_teacher(cfg: ModelConfig, student: AbstractModel) -> AbstractModel:
    """A model that is not trained: its parameters are in the student's compute dtype, and it has no MTP module. It is
    dropless, also where the student's tokens are dropped at capacity: no metric would show what it loses."""
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    precision = Precision(param=student.precision.compute, compute=student.precision.compute)
    kernels = dataclasses.replace(student.kernels, capacity_factor=None)
    return AbstractModel(cfg, precision=precision, kernels=kernels, rules=student.rules)
