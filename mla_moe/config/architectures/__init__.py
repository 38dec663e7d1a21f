"""The registry of architectures: what a `model_type` in `config.json` means. Each is a file in this package. No
other file names one but `config/model.py`, for a missing `model_type`."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture
from mla_moe.config.errors import require

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


def _discover() -> dict[str, Architecture]:
    """The architecture of each file, by its values of `model_type`."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("architecture", "ignored"):
            architecture = importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURE
            found |= dict.fromkeys((architecture.model_type, *architecture.aliases), architecture)
    return found


ARCHITECTURES: Mapping[str, Architecture] = _discover()


def find_architecture(model_type: Any) -> Architecture:
    """The architecture with this `model_type`. Raises `ConfigError` with the choices for another."""
    known = isinstance(model_type, str) and model_type in ARCHITECTURES
    require(known, "model_type", model_type, f"another architecture; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
