"""What a run is: frozen dataclasses of model, data, optimizer, mesh and stages. Each field is a flag of `train.py`."""

from mla_moe.recipe.lessons import RL, SFT, Rejection, Task
from mla_moe.recipe.reading import Data, Kernels, Mesh, Optimizer, Schedule, Training
from mla_moe.recipe.recipe import Checkpoint, Recipe, Sample, load, with_flags

__all__ = [
    "RL",
    "SFT",
    "Checkpoint",
    "Data",
    "Kernels",
    "Mesh",
    "Optimizer",
    "Recipe",
    "Rejection",
    "Sample",
    "Schedule",
    "Task",
    "Training",
    "load",
    "with_flags",
]
