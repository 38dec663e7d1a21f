"""Configuration of a run: frozen dataclasses of model, data, optimizer, parallelism and stages. A field is a flag."""

from mla_moe.config.data import DataConfig
from mla_moe.config.errors import ConfigError, require, structure
from mla_moe.config.lora import LoRAConfig
from mla_moe.config.migrations import FORMAT_VERSION
from mla_moe.config.model import ModelConfig
from mla_moe.config.modules import AttentionConfig, MoEConfig
from mla_moe.config.optimizer import OptimizerConfig, ScheduleConfig
from mla_moe.config.parallelism import KernelConfig, MeshConfig
from mla_moe.config.post_training import DPOConfig, RejectionConfig, RLConfig, SFTConfig, TaskConfig
from mla_moe.config.presets import PRESETS, preset
from mla_moe.config.pretraining import TrainingConfig
from mla_moe.config.profile import ProfileConfig
from mla_moe.config.recipe import CheckpointConfig, Recipe, SampleConfig, load_recipe, with_overrides
from mla_moe.config.rope import LinearScaling, Llama3Scaling, RopeScaling, Yarn, rope_scaling

__all__ = [
    "FORMAT_VERSION", "PRESETS", "AttentionConfig", "CheckpointConfig", "ConfigError", "DPOConfig", "DataConfig",
    "KernelConfig", "LinearScaling", "Llama3Scaling", "LoRAConfig", "MeshConfig", "MoEConfig", "ModelConfig",
    "OptimizerConfig", "ProfileConfig", "RLConfig", "Recipe", "RejectionConfig", "RopeScaling", "SFTConfig",
    "SampleConfig", "ScheduleConfig", "TaskConfig",
    "TrainingConfig", "Yarn", "load_recipe", "preset", "require", "rope_scaling", "structure", "with_overrides",
]  # fmt: skip
