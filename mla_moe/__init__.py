"""DeepSeek models in JAX: multi-head latent attention (MLA), mixture of experts (MoE), RL with verifiable rewards."""

from mla_moe.checkpoint.pretrained import load_pretrained, save_pretrained
from mla_moe.config import ConfigError, ModelConfig, Yarn, preset
from mla_moe.inference.generate import generate
from mla_moe.nn.attention import MLAttention
from mla_moe.nn.moe import MoE
from mla_moe.nn.param import Precision
from mla_moe.nn.transformer import Transformer

__all__ = [
    "ConfigError",
    "MLAttention",
    "MoE",
    "ModelConfig",
    "Precision",
    "Transformer",
    "Yarn",
    "generate",
    "load_pretrained",
    "preset",
    "save_pretrained",
]
