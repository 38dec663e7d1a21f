"""Kinds of rotary position embedding (RoPE), by the `rope_type` of a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mla_moe.config.errors import require, require_each, require_field, structure


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """`linear`: every frequency divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float
    """Context length divided by the original context length."""

    def __post_init__(self):
        _require_factor(self)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """`yarn`: YaRN context extension (arXiv 2309.00071), as in `rope_scaling` of DeepSeek's `config.json`."""

    factor: float
    """Context length divided by the original context length."""
    original_max_position_embeddings: int
    """Context length of the training before the extension."""
    beta_fast: float = 32.0
    """Dimensions with more rotations than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions with fewer rotations than this have their frequency divided by `factor`."""
    mscale: float = 1.0
    """Coefficient of the scale of the rotary part of queries and keys."""
    mscale_all_dim: float = 1.0
    """Coefficient of the softmax scale."""
    llama_4_scaling_beta: float = 0.0
    """Queries at position p are multiplied by `1 + β ln(1 + ⌊p / original_max_position_embeddings⌋)` (Mistral 4)."""

    def __post_init__(self):
        require_each(
            self, "rope_scaling", "beta_fast beta_slow", lambda x: 0 < x < math.inf, "must be a positive number"
        )
        names = "mscale mscale_all_dim llama_4_scaling_beta"
        require_each(self, "rope_scaling", names, lambda x: 0 <= x <= 100, "must be in [0, 100]")
        _require_factor(self)
        _require_original_length(self)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """`llama3`: Llama 3.1's context extension. Wavelengths are compared with the original context length."""

    factor: float
    """Context length divided by the original context length."""
    original_max_position_embeddings: int
    """Context length of the training before the extension."""
    low_freq_factor: float = 1.0
    """Frequencies of fewer rotations than this over the original context are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Frequencies of more rotations than this over the original context stay; those between are interpolated."""

    def __post_init__(self):
        names = "low_freq_factor high_freq_factor"
        require_each(self, "rope_scaling", names, lambda x: 0 < x < math.inf, "must be a positive number")
        ok = self.high_freq_factor > self.low_freq_factor
        require_field(self, "rope_scaling.high_freq_factor", ok, f"above low_freq_factor = {self.low_freq_factor}")
        _require_factor(self)
        _require_original_length(self)


RopeScaling = LinearScaling | Yarn | Llama3Scaling

_KINDS: dict[str, type[RopeScaling] | None] = {
    "default": None, "linear": LinearScaling, "yarn": Yarn, "llama3": Llama3Scaling,
}  # fmt: skip


def rope_scaling(parameters: Mapping[str, Any], field: str = "rope_scaling") -> RopeScaling | None:
    """The scaling that `rope_scaling` or `rope_parameters` of a `config.json` describe by `rope_type` (or `type`); None
    for `default`. `rope_theta` is left to the caller. Raises `ConfigError` for another kind, for a missing field and
    for one that the kind does not have, unless its value has no effect."""
    given = {name: value for name, value in parameters.items() if name not in ("type", "rope_type", "rope_theta")}
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    require(isinstance(name, str) and name in _KINDS, f"{field}.type", name, f"use one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    known = {f.name: f for f in dataclasses.fields(kind)} if kind else {}
    for key, value in list(given.items()):
        if value is None or (key in _NO_EFFECT and value == _NO_EFFECT[key]):
            del given[key]
        else:
            require(key in known, f"{field}.{key}", value, f"is not supported with rope type {name!r}")
    for key, f in known.items():
        fix = "is required: the original length" if key.startswith("original") else "is required"
        require(key in given or f.default is not dataclasses.MISSING, f"{field}.{key}", None, f"{fix}, for {name!r}")
    if kind is Yarn:
        given = {"mscale_all_dim": 0.0} | given  # the default of transformers
    return structure(kind, given, field) if kind else None


_NO_EFFECT = {"truncate": True, "partial_rotary_factor": 1}
"""Values that transformers writes for an unchanged setting."""


def _require_factor(scaling: RopeScaling) -> None:
    require_field(scaling, "rope_scaling.factor", 1 <= scaling.factor < math.inf, "a context extension is at least 1")


def _require_original_length(scaling: Yarn | Llama3Scaling) -> None:
    ok = scaling.original_max_position_embeddings >= 1
    message = "set the context length of the training before the extension"
    require_field(scaling, "rope_scaling.original_max_position_embeddings", ok, message)
