"""Presets: the configurations of released models, from the registry of architectures, and of a tiny one."""

from collections.abc import Mapping

from mla_moe.config.architectures import ARCHITECTURES
from mla_moe.config.errors import require
from mla_moe.config.model import ModelConfig

PRESETS: Mapping[str, ModelConfig] = {
    name: ModelConfig(model_type=architecture.field_value, **fields)
    for architecture in ARCHITECTURES.values()
    for name, fields in architecture.presets.items()
}


def preset(name: str) -> ModelConfig:
    """The configuration of a released model, from `PRESETS`. Raises `ConfigError` with the choices for another name."""
    require(name in PRESETS, "preset", name, f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
