"""Configuration of a run: frozen dataclasses of model, data, optimizer, parallelism and stages. A field is a flag."""

from mla_moe.config.data import DataConfig
from mla_moe.config.errors import ConfigError, require, structure
from mla_moe.config.migrations import FORMAT_VERSION
from mla_moe.config.model import PRESETS, ModelConfig, Yarn, preset
from mla_moe.config.optimizer import OptimizerConfig, ScheduleConfig
from mla_moe.config.parallelism import KernelConfig, MeshConfig
from mla_moe.config.post_training import RejectionConfig, RLConfig, SFTConfig, TaskConfig
from mla_moe.config.pretraining import TrainingConfig
from mla_moe.config.recipe import CheckpointConfig, Recipe, SampleConfig, load_recipe, with_overrides

__all__ = [
    "FORMAT_VERSION",
    "PRESETS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "KernelConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RLConfig",
    "Recipe",
    "RejectionConfig",
    "SFTConfig",
    "SampleConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TrainingConfig",
    "Yarn",
    "load_recipe",
    "preset",
    "require",
    "structure",
    "with_overrides",
]
