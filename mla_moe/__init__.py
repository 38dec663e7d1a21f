"""DeepSeek models in JAX: multi-head latent attention (MLA), mixture of experts (MoE), RL with verifiable rewards."""

from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.config import (
    AttentionConfig,
    ConfigError,
    KernelConfig,
    LinearScaling,
    Llama3Scaling,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ScheduleConfig,
    Yarn,
    preset,
    rope_scaling,
)
from mla_moe.inference.generate import generate
from mla_moe.nn.attention import MLAttention
from mla_moe.nn.kv_cache import KVCache
from mla_moe.nn.lora import add_adapters, merge_adapters
from mla_moe.nn.moe import MoE, RouterStats
from mla_moe.nn.param import Precision
from mla_moe.nn.router import Router, Routing
from mla_moe.nn.transformer import Transformer
from mla_moe.parallel.compiler_options import compiler_options
from mla_moe.parallel.mesh import make_mesh, use_mesh_axes
from mla_moe.parallel.sharding import TRAINING_RULES as sharding_rules
from mla_moe.parallel.sharding import named_shardings, set_sharding_rules
from mla_moe.training.optimizer import grouped_optimizer, parameter_groups

__all__ = [
    "AttentionConfig",
    "ConfigError",
    "KVCache",
    "KernelConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LoRAConfig",
    "MLAttention",
    "MeshConfig",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "Router",
    "RouterStats",
    "Routing",
    "ScheduleConfig",
    "Transformer",
    "Yarn",
    "add_adapters",
    "compiler_options",
    "generate",
    "grouped_optimizer",
    "load_pretrained",
    "make_mesh",
    "merge_adapters",
    "named_shardings",
    "parameter_groups",
    "preset",
    "rope_scaling",
    "save_pretrained",
    "set_sharding_rules",
    "sharding_rules",
    "use_mesh_axes",
]
